"""losses.py against naive loops in float64. (Several processes: test_commands.py.)"""
import pytest
import torch
import torch.nn.functional as F
from torch.nn.functional import normalize

import losses
from losses import IGNORE


def world(B=3, D=6, K=4, h=3, w=5, size=(12, 20)):
    """Random z, t, c, a, labels with a fifth ignored, k, inside (pictures of 9, 10 and 15 positions), and a bank."""
    g = torch.Generator().manual_seed(0)

    def unit(*shape):
        return normalize(torch.randn(*shape, generator=g, dtype=torch.float64), dim=1)

    labels = torch.randint(K, (B, *size), generator=g)
    labels[torch.rand(labels.shape, generator=g) < 0.2] = IGNORE
    labels[1][labels[1] == 2] = IGNORE  # a class that this image does not show
    inside = torch.ones(B, h, w, dtype=torch.bool)
    inside[0, :, 3:] = inside[1, 2:] = False
    a = torch.rand(B, h * w, generator=g, dtype=torch.float64)
    return unit(B, D, h, w), unit(K, D), unit(B, D), a, labels, losses.k_at(5, 11, inside, 0.1), inside, unit(7, D)


def every(z, t, c, a, labels, k, inside, bank):
    return {"seg": losses.seg_loss(z, t, labels, 0.5), "sgd": losses.sgd_loss(z, c, a, k, inside, bank),
            "sam": losses.sam_loss(z, t, labels)}


def by_hand(z, t, c, a, labels, k, inside, bank):
    logits = F.interpolate(torch.einsum("bdhw,kd->bkhw", z, t) / 0.5, labels.shape[1:], mode="bilinear")
    rows, columns = ([int((i + 0.5) * side / cells) for i in range(cells)]  # where nearest-exact reads labels
                     for side, cells in zip(labels.shape[1:], z.shape[2:]))
    sgd, sam = [], []
    for b in range(len(z)):
        places = sorted(inside[b].flatten().nonzero()[:, 0].tolist(), key=lambda i: -a[b, i].item())
        p = normalize(sum(z[b].flatten(1)[:, i] for i in places[:k[b]]), dim=0)
        sgd.append(torch.stack([p @ key / 0.07 for key in [*c, *bank]]).exp().sum().log() - p @ c[b] / 0.07)
        for j in range(len(t)):
            if places := (labels[b, rows][:, columns] == j).nonzero().tolist():
                r = normalize(sum(z[b, :, y, x] for y, x in places), dim=0)
                sam.append(-torch.stack([r @ t_j / 0.07 for t_j in t]).log_softmax(0)[j])
    return {"seg": F.cross_entropy(logits, labels, ignore_index=IGNORE), "sgd": sum(sgd) / len(sgd),
            "sam": sum(sam) / len(sam)}


def with_gradient(values, z):
    return {name: (value, torch.autograd.grad(value, z, retain_graph=True)[0]) for name, value in values.items()}


@pytest.mark.parametrize("k, size, held, at_a_time", [
    ((1, 1, 1), (12, 20), 1, [1, 1, 1]), ((4, 2, 7), (30, 23), 6000, [2, 1]), ((15, 15, 15), (13, 11), 2**23, [3]),
    ((2, 3, 4), (3, 23), 2**21, [3])])
def test_values_and_gradients_are_those_of_naive_loops(k, size, held, at_a_time, monkeypatch):
    """For SGD the padding has the largest a, and it is left out. L_seg never holds more than HELD upsampled logits, but
    at least one image's."""
    seen, whole = [], losses.upsampled_cross_entropy
    monkeypatch.setattr(losses, "upsampled_cross_entropy", lambda x, labels: seen.append(len(x)) or whole(x, labels))
    monkeypatch.setattr(losses, "HELD", {"cpu": held})
    z, t, c, a, labels, _, inside, bank = world(size=size)
    a[0].view(3, 5)[:, 4] = 2
    z.requires_grad_()
    ours = with_gradient(every(z, t, c, a, labels.byte(), torch.tensor(k), inside, bank), z)
    again = sorted(at_a_time) * (len(at_a_time) > 1)  # in the backward pass
    assert seen[:len(at_a_time)] == at_a_time and sorted(seen[len(at_a_time):]) == again
    for name, (value, grad) in with_gradient(by_hand(z, t, c, a, labels, k, inside, bank), z).items():
        assert torch.allclose(ours[name][0], value, rtol=1e-6), name
        assert torch.allclose(ours[name][1], grad, rtol=1e-5, atol=1e-8), name


def test_the_teachers_grid_lies_on_the_image_without_its_padding():
    """Each image alone, by F.interpolate to the rows and columns inside it; from 14×14 patches as ViT-B/16's, too."""
    torch.manual_seed(0)
    for n, (h, w), sizes in ((8, (16, 16), [(16, 16), (9, 16), (12, 5)]), (14, (32, 32), [(21, 32), (1, 1), (32, 32)])):
        c, d = torch.randn(3, 6), torch.randn(3, n * n, 6)
        a, inside = losses.teacher_similarity(c, d), torch.zeros(3, h, w, dtype=torch.bool)
        assert torch.allclose(a[1, 2, 3], d[1, 2 * n + 3] @ c[1])
        for b, (rows, columns) in enumerate(sizes):
            inside[b, :rows, :columns] = True
        placed = losses.at_positions(a, inside).view(3, h, w)
        for b, size in enumerate(sizes):
            want = F.interpolate(a[b][None, None], size, mode="bilinear")[0, 0]
            assert torch.allclose(placed[b, :size[0], :size[1]], want, atol=1e-5)


def test_without_a_label_there_is_no_loss_and_no_gradient():
    z, t, _, _, labels, *_ = world()
    z.requires_grad_()
    for loss, *tau in ((losses.seg_loss, 0.07), (losses.sam_loss,)):
        value = loss(z, t, torch.full_like(labels, IGNORE), *tau)
        assert value.item() == 0 and torch.autograd.grad(value, z)[0].abs().max() == 0


def test_k_is_a_share_of_each_pictures_own_positions():
    """Pictures of 10, 7 and 0 positions: share 1 at the first of 11 steps, 0.55 in the middle, 0.1 at the last."""
    inside = (torch.arange(15) < torch.tensor([[10], [7], [0]])).view(3, 3, 5)
    for step, end, want in ((0, 0.1, [10, 7, 1]), (5, 0.1, [6, 4, 1]), (10, 0.1, [1, 1, 1]), (10, 1, [10, 7, 1])):
        assert losses.k_at(step, 11, inside, end).tolist() == want  # 5.5 and 3.85 are rounded up
    assert losses.k_at(0, 1, inside, 0.1).tolist() == [10, 7, 1]
    assert losses.k_at(444, 1000, torch.ones(1, 10, 10, dtype=torch.bool), 0.1) == 60  # not 61, despite rounding


def test_bank_keeps_the_newest(monkeypatch):
    monkeypatch.setattr(losses, "BANK", 5)
    bank = torch.empty(0, 2)
    for i in range(4):
        bank = losses.push(bank, torch.full((2, 2), float(i)))
    assert bank[:, 0].tolist() == [3, 3, 2, 2, 1]
    assert losses.push(bank, torch.tensor([[torch.nan, torch.inf]]))[:2].tolist() == [[0, 0], [3, 3]]  # fp16's


def test_no_loss_looks_at_the_numbers(monkeypatch):
    """Tensors without numbers (device meta) pass through every loss and back: a GPU is not waited for."""
    monkeypatch.setattr(losses, "HELD", {"meta": 300})
    z, *given = [x.to("meta") for x in world()]
    sum(every(z.requires_grad_(), *given).values()).backward()
    losses.push(given[-1], given[1])
    losses.at_positions(losses.teacher_similarity(given[1], given[1].new_empty(3, 16, 6)), given[-2])
    losses.k_at(3, 10, given[-2], 0.1)


def test_half_precision_is_taken_to_fp32():
    *given, bank = [x.bfloat16() if x.is_floating_point() else x for x in world()]
    want = every(*(x.float() if x.is_floating_point() else x for x in given), bank.float())
    for name, value in every(*given, bank.float()).items():
        assert value.dtype == torch.float32 and value.item() == want[name].item()
