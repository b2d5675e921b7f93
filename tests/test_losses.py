"""losses.py against naive loops in float64. (Several processes: test_commands.py.)"""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

import losses
from losses import IGNORE


def world(B=3, D=6, K=4, h=3, w=5, size=(12, 20)):
    """Random z, t, c, labels with a fifth ignored, k, inside (pictures of 9, 10 and 15 positions), and a bank."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)

    labels = torch.randint(K, (B, *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = IGNORE
    labels[1][labels[1] == 2] = IGNORE  # a class that this image does not show
    inside = torch.ones(B, h, w, dtype=torch.bool)
    inside[0, :, 3:] = inside[1, 2:] = False
    inside = inside.flatten(1)
    return unit(B, D, h, w), unit(K, D), unit(B, D), labels, losses.k_at(5, 11, inside, 0.1), inside, unit(7, D)


def every(z, t, c, labels, k, inside, bank):
    return {"seg": losses.cross_entropy_loss(z, t, labels, 0.5), "sgd": losses.sgd_loss(z, c, k, inside, bank),
            "sam": losses.sam_loss(z, t, labels, 0.5)}


def by_hand(z, t, c, labels, k, inside, bank):
    logits = F.interpolate(torch.einsum("bdhw,kd->bkhw", z, t) / 0.5, labels.shape[1:], mode="bilinear")
    rows, columns = ([int((i + 0.5) * side / cells) for i in range(cells)]  # where nearest-exact reads labels
                     for side, cells in zip(labels.shape[1:], z.shape[2:]))
    sgd, sam = [], []
    for b in range(len(z)):
        places = sorted(inside[b].nonzero()[:, 0].tolist(), key=lambda i: -(z[b].flatten(1)[:, i] @ c[b]).item())
        p = normalize(sum(z[b].flatten(1)[:, i] for i in places[:k[b]]), dim=0)
        sgd.append(torch.stack([p @ key / 0.07 for key in [*c, *bank]]).exp().sum().log() - p @ c[b] / 0.07)
        for j in range(len(t)):
            if places := (labels[b, rows][:, columns] == j).nonzero().tolist():
                r = normalize(sum(z[b, :, y, x] for y, x in places), dim=0)
                sam.append(-torch.stack([r @ t_j / 0.5 for t_j in t]).log_softmax(0)[j])
    return {"seg": F.cross_entropy(logits, labels, ignore_index=IGNORE), "sgd": sum(sgd) / len(sgd),
            "sam": sum(sam) / len(sam)}


def with_gradient(values, z):
    return {name: (value, torch.autograd.grad(value, z, retain_graph=True)[0]) for name, value in values.items()}


@pytest.mark.parametrize("k, size, band", [((1, 1, 1), (12, 20), 1), ((4, 2, 7), (30, 23), 500),
                                           ((15, 15, 15), (13, 11), 2000), ((2, 3, 4), (3, 23), 2**23)])
def test_values_and_gradients_are_those_of_naive_loops(k, size, band, monkeypatch):
    """For SGD the padding is most similar of all, and it is left out. L_seg is the same, whatever is held at a time."""
    monkeypatch.setattr(losses, "BAND", {"cpu": band})
    z, t, c, labels, _, inside, bank = world(size=size)
    z[0, :, :, 4] = c[0][:, None]
    z.requires_grad_()
    ours = with_gradient(every(z, t, c, labels.byte(), torch.tensor(k), inside, bank), z)
    for name, (value, grad) in with_gradient(by_hand(z, t, c, labels, k, inside, bank), z).items():
        assert torch.allclose(ours[name][0], value, rtol=1e-6), name
        assert torch.allclose(ours[name][1], grad, rtol=1e-5, atol=1e-8), name
    height = max(rows.stop - rows.start for rows in losses.bands(losses.pixel_text_logits(z, t, 1), size))
    assert height == 1 or height * 3 * 4 * size[1] <= band


def test_a_gpu_gets_few_bands_and_not_too_much_memory():
    logits = SimpleNamespace(shape=(16, 171, 32, 32), device=torch.device("cuda"))  # COCO-Stuff, batch size 16
    bands = losses.bands(logits, (512, 512))
    assert len(bands) < 20 and max(16 * 171 * 512 * (rows.stop - rows.start) * 4 for rows in bands) <= 300e6  # bytes
    assert [y for rows in bands for y in range(rows.start, rows.stop)] == list(range(512))


def test_without_a_label_there_is_no_loss_and_no_gradient():
    z, t, _, labels, *_ = world()
    z.requires_grad_()
    for loss in (losses.cross_entropy_loss, losses.sam_loss):
        value = loss(z, t, torch.full_like(labels, IGNORE), 0.07)
        assert value.item() == 0 and torch.autograd.grad(value, z)[0].abs().max() == 0


def test_k_is_a_share_of_each_pictures_own_positions():
    """Pictures of 10, 7 and 0 positions: share 1 at the first of 11 steps, 0.55 in the middle, 0.1 at the last."""
    inside = torch.arange(15) < torch.tensor([[10], [7], [0]])
    for step, end, want in ((0, 0.1, [10, 7, 1]), (5, 0.1, [6, 4, 1]), (10, 0.1, [1, 1, 1]), (10, 1, [10, 7, 1])):
        assert losses.k_at(step, 11, inside, end).tolist() == want  # 5.5 and 3.85 are rounded up
    assert losses.k_at(0, 1, inside, 0.1).tolist() == [10, 7, 1]
    assert losses.k_at(444, 1000, torch.ones(1, 100, dtype=torch.bool), 0.1) == 60  # not 61, despite rounding


def test_bank_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(losses, "BANK", 5)
    bank = torch.empty(0, 2)
    for i in range(4):
        bank = losses.push(bank, torch.full((2, 2), float(i)))
    assert bank[:, 0].tolist() == [3, 3, 2, 2, 1]


def test_no_loss_looks_at_the_numbers(monkeypatch):
    """Tensors without numbers (device meta) pass through every loss and back: a GPU is not waited for."""
    monkeypatch.setattr(losses, "BAND", {"cpu": 300})
    z, *given = [x.to("meta") for x in world()]
    sum(every(z.requires_grad_(), *given).values()).backward()
    losses.push(given[-1], given[1])
    losses.k_at(3, 10, given[-2], 0.1)


def test_half_precision_is_taken_to_fp32():
    *given, bank = [x.bfloat16() if x.is_floating_point() else x for x in world()]
    want = every(*(x.float() if x.is_floating_point() else x for x in given), bank.float())
    for name, value in every(*given, bank.float()).items():
        assert value.dtype == torch.float32 and value.item() == want[name].item()
