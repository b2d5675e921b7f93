"""losses.py against naive loops in float64, gradcheck, and the same batch on two processes."""
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

import losses

ROOT = Path(__file__).parent.parent


def world(B=3, D=6, K=4, h=3, w=5, scale=4, seed=0):
    """Random z, t, c and labels at `scale` times the grid; a fifth of the pixels are ignored."""
    g = torch.Generator().manual_seed(seed)
    z = normalize(torch.randn(B, D, h, w, generator=g, dtype=torch.float64), dim=1)
    t = normalize(torch.randn(K, D, generator=g, dtype=torch.float64), dim=1)
    c = normalize(torch.randn(B, D, generator=g, dtype=torch.float64), dim=1)
    labels = torch.randint(K, (B, h * scale, w * scale), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = losses.IGNORE
    return z, t, c, labels


def upsampled_logits(z, t, labels, tau):
    """z · t / τ by loops at the grid, then at each pixel by the bilinear rule (half-pixel centres, clamped)."""
    B, D, h, w = z.shape
    H, W = labels.shape[1:]
    out = torch.zeros(B, len(t), H, W, dtype=z.dtype)

    def ends(i, small, large):
        x = max((i + 0.5) * small / large - 0.5, 0)
        low = min(int(x), small - 1)
        return low, min(low + 1, small - 1), x - low

    for y in range(H):
        y0, y1, fy = ends(y, h, H)
        for x in range(W):
            x0, x1, fx = ends(x, w, W)
            for b in range(B):
                for k in range(len(t)):
                    def at(i, j, b=b, k=k):
                        return (z[b, :, i, j] * t[k]).sum() / tau
                    out[b, k, y, x] = ((1 - fy) * ((1 - fx) * at(y0, x0) + fx * at(y0, x1))
                                       + fy * ((1 - fx) * at(y1, x0) + fx * at(y1, x1)))
    return out


def test_cross_entropy_is_the_mean_over_valid_pixels():
    z, t, _, labels = world(B=2, h=2, w=3, scale=3)
    logits = upsampled_logits(z, t, labels, 0.1)
    total, count = 0.0, 0
    for b, y, x in (labels != 255).nonzero().tolist():
        row = logits[b, :, y, x]
        total -= row[labels[b, y, x]] - row.exp().sum().log()
        count += 1
    assert losses.cross_entropy_loss(z, t, labels, 0.1).item() == pytest.approx((total / count).item(), rel=1e-9)


def test_nel_is_focal_plus_dice_without_ignored_pixels():
    z, t, _, labels = world(B=2, h=2, w=3, scale=3)
    labels[1][labels[1] == 0] = 255  # class 0 is in the first image alone
    assert (labels[0] == 0).any()
    logits = upsampled_logits(z, t, labels, 0.5)
    focal, count, dice, present = 0.0, 0, 0.0, 0
    for b in range(2):
        for k in range(len(t)):
            overlap = squares = truths = 0.0
            for y, x in (labels[b] != 255).nonzero().tolist():
                p, truth = 1 / (1 + math.exp(-logits[b, k, y, x])), int(labels[b, y, x] == k)
                right = p if truth else 1 - p
                focal += (0.25 if truth else 0.75) * (1 - right) ** 2 * -math.log(right)
                count += k == 0
                overlap, squares, truths = overlap + p * truth, squares + p * p, truths + truth
            if truths:
                dice += 1 - (2 * overlap + 1) / (squares + truths + 1)
                present += 1
    assert losses.nel_loss(z, t, labels, 0.5).item() == pytest.approx(focal / count + dice / present, rel=1e-9)


@pytest.mark.parametrize("k", [1, 4, 15])
def test_sgd_is_infonce_of_the_most_similar_features(k):
    z, _, c, _ = world()
    bank = normalize(torch.randn(7, 6, dtype=torch.float64), dim=1)
    total = 0.0
    for b in range(3):
        features = sorted((z[b, :, i, j] for i in range(3) for j in range(5)), key=lambda f: -(f @ c[b]).item())[:k]
        p = sum(features) / k
        p = p / p.norm()
        keys = [*c, *bank]
        total -= p @ c[b] / 0.07 - torch.stack([p @ key / 0.07 for key in keys]).exp().sum().log()
    assert losses.sgd_loss(z, c, k, bank, 0.07).item() == pytest.approx((total / 3).item(), rel=1e-9)


@pytest.mark.parametrize("k", [1, 4, 12])
def test_sgd_selects_inside_the_picture(k):
    """Padding is left out though most similar of all; of a picture of fewer than k positions all are taken."""
    z, _, c, _ = world()
    inside = torch.ones(3, 3, 5, dtype=torch.bool)
    inside[0, :, 3:] = inside[1, 2:] = False  # 9, 10 and 15 of 15 positions
    z[0, :, :, 4] = c[0][:, None]
    z.requires_grad_()
    total = 0.0
    for b in range(3):
        features = [z[b, :, i, j] for i in range(3) for j in range(5) if inside[b, i, j]]
        p = sum(sorted(features, key=lambda f: -(f @ c[b]).item())[:k])
        total -= (c @ (p / p.norm()) / 0.07).log_softmax(0)[b]
    loss = losses.sgd_loss(z, c, k, inside=inside.flatten(1))
    assert loss.item() == pytest.approx((total / 3).item(), rel=1e-9)
    loss.backward()
    assert z.grad.movedim(1, -1)[~inside].abs().max() == 0 and z.grad.abs().max() > 0


def test_sgd_reaches_only_the_chosen_positions():
    z, _, c, _ = world()
    z.requires_grad_()
    losses.sgd_loss(z, c, 4).backward()
    a = torch.einsum("bdhw,bd->bhw", z.detach(), c).flatten(1)
    for b in range(3):
        moved = z.grad[b].abs().sum(0).flatten() > 0
        assert set(moved.nonzero()[:, 0].tolist()) == set(a[b].topk(4).indices.tolist())


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_sam_compares_class_prototypes_with_text(kind):
    z, t, _, labels = world()
    total, count = 0.0, 0
    for b in range(3):
        for k in range(4):
            # nearest-exact at scale 4 reads pixel 4i + 2
            features = [z[b, :, i, j] for i in range(3) for j in range(5) if labels[b, 4 * i + 2, 4 * j + 2] == k]
            if features:
                r = sum(features) / len(features)
                logits = torch.stack([r / r.norm() @ t_k / 0.07 for t_k in t])
                if kind == "ce":
                    total -= logits.log_softmax(0)[k]
                else:
                    total -= sum((logits[j] if j == k else -logits[j]).sigmoid().log() for j in range(4)) / 4
                count += 1
    assert losses.sam_loss(z, t, labels, 0.07, kind).item() == pytest.approx((total / count).item(), rel=1e-9)


@pytest.mark.parametrize("band", [1, 300, 2 ** 20])
def test_cross_entropy_in_bands_is_the_plain_one(band, monkeypatch):
    """Value and gradient, whatever is held at a time; sides that are no multiples of the grid's."""
    monkeypatch.setitem(losses.BAND, "cpu", band)
    torch.manual_seed(0)
    z, t = normalize(torch.randn(2, 8, 4, 5, dtype=torch.double), dim=1), torch.randn(7, 8, dtype=torch.double)
    labels = torch.randint(7, (2, 30, 23), dtype=torch.uint8)
    labels[torch.rand(labels.shape) < 0.3] = 255
    found = []
    for banded in (True, False):
        x = z.clone().requires_grad_()
        logits = F.interpolate(losses.pixel_text_logits(x, t, 0.2), labels.shape[1:], mode="bilinear")
        loss = (losses.cross_entropy_loss(x, t, labels, 0.2) if banded else
                F.cross_entropy(logits, labels.long(), ignore_index=255))
        loss.backward()
        found.append((loss.detach(), x.grad))
    assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-14) for a, b in zip(*found))


def test_gradients():
    z, t, c, labels = world(B=2, h=2, w=2, scale=2)
    raw = torch.randn_like(z).requires_grad_()
    for loss in (lambda x: losses.cross_entropy_loss(normalize(x, dim=1), t, labels, 0.5),
                 lambda x: losses.nel_loss(normalize(x, dim=1), t, labels, 0.5),
                 lambda x: losses.sgd_loss(normalize(x, dim=1), c, 2, None, 0.5),
                 lambda x: losses.sam_loss(normalize(x, dim=1), t, labels, 0.5)):
        assert torch.autograd.gradcheck(loss, raw)


def test_ignored_pixels_give_no_loss_and_no_gradient():
    z, t, c, labels = world()
    z.requires_grad_()
    nothing = torch.full_like(labels, 255)
    for loss in (losses.cross_entropy_loss, losses.nel_loss, losses.sam_loss):
        value = loss(z, t, nothing)
        assert value.item() == 0
        z.grad = None
        value.backward()
        assert z.grad is None or z.grad.abs().max() == 0
    assert losses.sgd_loss(z, c, 5).item() > 0  # the picture still teaches
    # and what lies under an ignored pixel makes no difference
    hidden = torch.full_like(labels, 255)
    hidden[:, :, :8] = labels[:, :, :8].clamp(max=3)  # columns 0 and 1 of the grid are labelled
    other = z.detach().clone()
    other[..., 3:] = normalize(torch.randn_like(other[..., 3:]), dim=1)
    assert losses.sam_loss(z, t, hidden).item() == losses.sam_loss(other, t, hidden).item()
    one, two = (losses.cross_entropy_loss(x, t, hidden).item() for x in (z, other))
    assert one == pytest.approx(two)


def test_no_loss_looks_at_the_numbers(monkeypatch):
    """Tensors without numbers (device meta) pass through every loss and back: a GPU is not waited for."""
    monkeypatch.setitem(losses.BAND, "meta", 300)
    z, t, c, labels = (x.to("meta") for x in world())
    z.requires_grad_()
    total = (losses.cross_entropy_loss(z, t, labels) + losses.nel_loss(z, t, labels) + losses.sgd_loss(z, c, 4)
             + losses.sam_loss(z, t, labels) + losses.sam_loss(z, t, labels, kind="bce"))
    total.backward()
    assert z.grad.shape == z.shape
    with pytest.raises((NotImplementedError, RuntimeError)):
        z[labels[:, ::4, ::4][:, None].expand_as(z) > 0]  # what a loss must not do


def test_one_image_and_half_precision():
    z, t, c, labels = world(B=1)
    for dtype in (torch.bfloat16, torch.float32):
        args = z.to(dtype), t.to(dtype)
        for value in (losses.cross_entropy_loss(*args, labels), losses.nel_loss(*args, labels),
                      losses.sam_loss(*args, labels), losses.sgd_loss(args[0], c.to(dtype), 3)):
            assert value.dtype == torch.float32 and value.isfinite()


def test_k_schedule():
    ks = [losses.k_at(s, 101, 1000, 0.1) for s in range(101)]
    assert ks[0] == 1000 and ks[50] == 550 and ks[100] == 100 and ks == sorted(ks, reverse=True)
    assert [losses.k_at(s, 101, 1000, 0.1, "cosine") for s in (0, 50, 100)] == [1000, 550, 100]
    assert losses.k_at(25, 101, 1000, 0.1, "cosine") > ks[25]
    assert {losses.k_at(s, 101, 1000, 0.3, "constant") for s in range(101)} == {300}
    assert losses.k_at(100, 101, 4, 0.01) == 1 and losses.k_at(0, 1, 9) == 9
    with pytest.raises(ValueError, match="linear, cosine or constant"):
        losses.k_at(0, 1, 9, schedule="steps")


def test_bank_keeps_the_newest():
    bank = torch.empty(0, 2)
    for i in range(4):
        bank = losses.push(bank, torch.full((2, 2), float(i)), 5)
    assert bank[:, 0].tolist() == [3, 3, 2, 2, 1]
    assert len(losses.push(bank, torch.ones(3, 2), 0)) == 0


TWO = """
import sys, torch, torch.distributed as dist, losses
sys.path.insert(0, "tests")
from test_losses import world
dist.init_process_group("gloo")
r = dist.get_rank()
z, t, c, labels = world(B=4)
generator = torch.Generator().manual_seed(1)
bank = torch.nn.functional.normalize(torch.randn(5, 6, generator=generator, dtype=torch.float64), dim=1)
part = slice(2 * r, 2 * r + 2)
labels[0] = 255  # the ranks hold different numbers of valid pixels
z = z[part].clone().requires_grad_()
loss = dict(ce=losses.cross_entropy_loss(z, t, labels[part]), nel=losses.nel_loss(z, t, labels[part]),
            sgd=losses.sgd_loss(z, c[part], 4, bank), sam=losses.sam_loss(z, t, labels[part]))
out = {"bank": losses.push(bank, c[part], 7)}
for name, value in loss.items():
    (grad,) = torch.autograd.grad(value, z, retain_graph=True)
    total = value.detach().clone()
    dist.all_reduce(total)
    out[name] = total / 2, grad / 2  # what DDP's mean over ranks makes of it
torch.save(out, f"{sys.argv[1]}/{r}.pt")
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_with_half_the_batch_each(tmp_path):
    (tmp_path / "two.py").write_text(textwrap.dedent(TWO))
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                    str(tmp_path / "two.py"), str(tmp_path)], cwd=ROOT, env=env, check=True, timeout=300)
    parts = [torch.load(tmp_path / f"{r}.pt") for r in range(2)]
    z, t, c, labels = world(B=4)
    labels[0] = 255
    generator = torch.Generator().manual_seed(1)
    bank = normalize(torch.randn(5, 6, generator=generator, dtype=torch.float64), dim=1)
    z.requires_grad_()
    alone = dict(ce=losses.cross_entropy_loss(z, t, labels), nel=losses.nel_loss(z, t, labels),
                 sgd=losses.sgd_loss(z, c, 4, bank), sam=losses.sam_loss(z, t, labels))
    for name, value in alone.items():
        (grad,) = torch.autograd.grad(value, z, retain_graph=True)
        for part in parts:
            assert part[name][0].item() == pytest.approx(value.item(), rel=1e-12), name
        assert torch.allclose(torch.cat([part[name][1] for part in parts]), grad, atol=1e-12), name
    assert all(torch.equal(part["bank"], losses.push(bank, c, 7)) for part in parts)
