"""losses.py against naive loops in float64, gradcheck, and the same batch on two processes."""
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import finish, start
from torch.nn.functional import normalize

import losses
from support import processes

IGNORE = 255


def world(B=3, D=6, K=4, h=3, w=5, scale=4, seed=0):
    """Random z, t, c and labels at `scale` times the grid, a fifth of them ignored; pictures of 9, 10 and 15 positions,
    and a bank."""
    g = torch.Generator().manual_seed(seed)

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)

    labels = torch.randint(K, (B, h * scale, w * scale), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = IGNORE
    inside = torch.ones(B, h, w, dtype=torch.bool)
    inside[0, :, 3:] = inside[1, 2:] = False
    return unit(B, D, h, w), unit(K, D), unit(B, D), labels, inside.flatten(1), unit(7, D)


# ---------------------------------------------------------------- L_seg


@pytest.mark.parametrize("grid, size", [((3, 5), (12, 20)), ((4, 5), (30, 23)), ((7, 9), (3, 4)), ((4, 5), (4, 11)),
                                        ((9, 2), (13, 2)), ((1, 1), (5, 3))])
def test_rows_are_those_of_interpolate(grid, size):
    logits = torch.randn(2, 6, *grid, dtype=torch.float64)
    want = F.interpolate(logits, size, mode="bilinear").permute(0, 2, 3, 1)
    for first in range(size[0]):
        for last in range(first + 1, size[0] + 1):
            got = losses.upsampled_rows(logits, size, slice(first, last))
            assert torch.allclose(got, want[:, first:last], atol=1e-5)


@pytest.mark.parametrize("band", [1, 300, 1000, 2**23])
def test_cross_entropy_in_bands_is_the_plain_one(band, monkeypatch):
    """Value and gradient, whatever is held at a time; the sides are no multiples of the grid's."""
    monkeypatch.setattr(losses, "BAND", band)
    z, t, *_ = world(B=2, D=8, K=7, h=4)
    labels = torch.randint(7, (2, 30, 23), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.3] = IGNORE
    x, y = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = losses.cross_entropy_loss(x, t, labels, 0.2)
    logits = F.interpolate(torch.einsum("bdhw,kd->bkhw", y, t) / 0.2, labels.shape[1:], mode="bilinear")
    want = F.cross_entropy(logits, labels.long(), ignore_index=IGNORE)
    loss.backward()
    want.backward()
    assert torch.allclose(loss, want, rtol=1e-6) and torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-8)
    rows = losses.bands(logits, (30, 23))
    assert [i for part in rows for i in range(30)[part]] == list(range(30))
    height = max(part.stop - part.start for part in rows)
    assert height == 1 or height * 2 * 7 * 23 <= band


def test_ignored_pixels_give_no_loss_and_no_gradient():
    z, t, _, labels, *_ = world()
    z.requires_grad_()
    for loss in (losses.cross_entropy_loss, losses.sam_loss):
        value = loss(z, t, torch.full_like(labels, IGNORE), 0.07)
        assert value.item() == 0 and torch.autograd.grad(value, z)[0].abs().max() == 0
        hidden = torch.full_like(labels, IGNORE)
        hidden[:, :, :8] = labels[:, :, :8]  # columns 0 and 1 of the grid, and what is upsampled from column 2
        pulled = torch.autograd.grad(loss(z, t, hidden, 0.07), z)[0].abs().sum((0, 1, 2)) > 0
        assert pulled[:2].all() and not pulled[3:].any()


# ---------------------------------------------------------------- L_sgd


def test_k_is_a_share_of_each_pictures_own_positions():
    """Pictures of 10 and 7 of 15 positions: share 1 at the first of 11 steps, 0.55 in the middle, 0.1 at the last."""
    inside = torch.arange(15) < torch.tensor([[10], [7]])
    assert losses.k_at(0, 11, inside, 0.1).tolist() == [10, 7]
    assert losses.k_at(5, 11, inside, 0.1).tolist() == [6, 4]  # 5.5 and 3.85 are rounded up
    assert losses.k_at(10, 11, inside, 0.1).tolist() == [1, 1]
    every = torch.tensor([losses.k_at(step, 11, inside, 0.1).tolist() for step in range(11)])
    assert (every.diff(dim=0) <= 0).all()
    assert all(losses.k_at(step, 11, inside, 1).tolist() == [10, 7] for step in range(11))  # distil all
    big = torch.ones(1, 4096, dtype=torch.bool)
    assert losses.k_at(100, 101, big, 0.1).tolist() == [410] and losses.k_at(0, 1, big, 0.1).tolist() == [4096]
    for n in range(10, 1000, 10):  # ⌈0.1 · n⌉ is n / 10, whatever the product's last digit says
        assert losses.k_at(99, 100, torch.ones(1, n, dtype=torch.bool), 0.1) == n // 10
    assert losses.k_at(10, 11, torch.zeros(1, 15, dtype=torch.bool), 0.1) == 1


@pytest.mark.parametrize("k", [(1, 1, 1), (4, 2, 7), (9, 10, 15)])
def test_sgd_is_infonce_of_the_most_similar_features_inside(k):
    """Padding is left out though most similar of all; nothing but the chosen positions is pulled."""
    z, _, c, _, inside, bank = world()
    z[0, :, :, 4] = c[0][:, None]
    z.requires_grad_()
    total, chosen = 0.0, torch.zeros(3, 15, dtype=torch.bool)
    for b in range(3):
        places = [i for i in range(15) if inside[b, i]]
        places = sorted(places, key=lambda i: -(z[b].flatten(1)[:, i] @ c[b]).item())[:k[b]]
        chosen[b, places] = True
        p = sum(z[b].flatten(1)[:, i] for i in places) / k[b]
        p = p / p.norm()
        total -= p @ c[b] / 0.07 - torch.stack([p @ key / 0.07 for key in [*c, *bank]]).exp().sum().log()
    loss = losses.sgd_loss(z, c, torch.tensor(k), inside, bank)
    assert loss.item() == pytest.approx((total / 3).item(), rel=1e-9)
    loss.backward()
    assert torch.equal(z.grad.abs().sum(1).flatten(1) > 0, chosen)


def test_bank_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(losses, "BANK", 5)
    bank = torch.empty(0, 2)
    for i in range(4):
        bank = losses.push(bank, torch.full((2, 2), float(i)))
    assert bank[:, 0].tolist() == [3, 3, 2, 2, 1]
    assert losses.push(bank, torch.empty(0, 2)).tolist() == bank.tolist()  # SGD off


# ---------------------------------------------------------------- L_sam


def test_sam_compares_class_prototypes_with_text():
    z, t, _, labels, *_ = world()
    labels[1][labels[1] == 2] = IGNORE  # a class that this image does not show
    total, count = 0.0, 0
    for b in range(3):
        for k in range(4):  # nearest-exact at scale 4 reads pixel 4i + 2
            features = [z[b, :, i, j] for i in range(3) for j in range(5) if labels[b, 4 * i + 2, 4 * j + 2] == k]
            if features:
                r = sum(features) / len(features)
                total -= torch.stack([r / r.norm() @ t_k / 0.07 for t_k in t]).log_softmax(0)[k]
                count += 1
    assert count < 12 and losses.sam_loss(z, t, labels, 0.07).item() == pytest.approx((total / count).item(), rel=1e-9)


# ---------------------------------------------------------------- all of them


def every(z, t, c, labels, inside, bank, k):
    return {"seg": losses.cross_entropy_loss(z, t, labels, 0.5), "sgd": losses.sgd_loss(z, c, k, inside, bank),
            "sam": losses.sam_loss(z, t, labels, 0.5)}


def test_gradients():
    given = world(B=2, h=2, w=3, scale=2)
    inside, k = torch.ones(2, 6, dtype=torch.bool), torch.tensor([2, 3])
    for name in ("seg", "sgd", "sam"):
        def loss(raw, name=name):
            return every(normalize(raw, dim=1), *given[1:4], inside, given[5], k)[name]

        assert torch.autograd.gradcheck(loss, torch.randn_like(given[0]).requires_grad_())


def test_no_loss_looks_at_the_numbers(monkeypatch):
    """Tensors without numbers (device meta) pass through every loss and back: a GPU is not waited for."""
    monkeypatch.setattr(losses, "BAND", 300)
    given = [x.to("meta") for x in world()]
    given[0].requires_grad_()
    k = losses.k_at(3, 10, given[4], 0.1)
    sum(every(*given, k).values()).backward()
    assert given[0].grad.shape == given[0].shape and losses.push(given[5], given[2]).shape == (10, 6)
    with pytest.raises((NotImplementedError, RuntimeError)):
        given[0].max().item()  # what a loss must not do


def test_half_precision_is_taken_to_fp32():
    given, k = world(B=3), torch.tensor([3, 4, 5])
    half = [x.bfloat16() if x.is_floating_point() else x for x in given]
    want = every(*(x.float() if x.is_floating_point() else x for x in half), k)
    got = every(*half[:5], half[5].float(), k)
    for name, value in got.items():
        assert value.dtype == torch.float32 and value.item() == want[name].item()


def half(folder):
    """What one of two processes makes of its half of the batch."""
    processes.start("cpu")
    part = slice(2 * processes.rank(), 2 * processes.rank() + 2)
    *given, bank = world(B=4)
    given[3][0] = IGNORE  # the processes hold different numbers of labelled pixels
    z, t, c, labels, inside = (x if x is given[1] else x[part] for x in given)
    z.requires_grad_()
    out = {"bank": losses.push(bank, c)}
    for name, value in every(z, t, c, labels, inside, bank, losses.k_at(5, 11, inside, 0.1)).items():
        grad, = torch.autograd.grad(value, z)
        total = value.detach().clone()
        dist.all_reduce(total)
        out[name] = total / 2, grad / 2  # what DDP's mean over processes makes of it
    torch.save(out, f"{folder}/{processes.rank()}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_processes_with_half_the_batch_each(tmp_path):
    finish(*start(tmp_path, half, str(tmp_path), ranks=2))
    parts = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    z, t, c, labels, inside, bank = world(B=4)
    labels[0] = IGNORE
    z.requires_grad_()
    for name, value in every(z, t, c, labels, inside, bank, losses.k_at(5, 11, inside, 0.1)).items():
        grad, = torch.autograd.grad(value, z)
        for part in parts:
            assert part[name][0].item() == pytest.approx(value.item(), rel=1e-12), name
        assert torch.allclose(torch.cat([part[name][1] for part in parts]), grad, atol=1e-12), name
    assert all(torch.equal(part["bank"], losses.push(bank, c)) for part in parts)
