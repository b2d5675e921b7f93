"""data.py: what is cut lies together, what the teacher sees, batches by step."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision.transforms.v2 import functional as TF
from trees import draw_tree

import clip
import data
import sources
from losses import IGNORE, cross_entropy_loss
from toy import world


def recipe(crop, low, high=None, jitter=False):
    return sources.Recipe(1, crop=crop, scale=(low, high or low), jitter=jitter)


def drawn(image, labels, *args, count=200, view=8):
    """`count` draws of data.augment, from seeds 0, 1, …"""
    for seed in range(count):
        torch.manual_seed(seed)
        yield data.augment(image, labels, recipe(*args), view)


# ---------------------------------------------------------------- crops


def test_image_and_labels_are_cut_alike():
    """A picture whose colour is its own label must still be so after any crop, scale and flip."""
    rng = np.random.RandomState(0)
    labels = torch.from_numpy(np.kron(rng.randint(0, 250, (6, 8)), np.ones((20, 20))).astype(np.uint8))
    corners = {64: set(), 200: set()}
    for crop, *scale in ((64, 1.0, 2.0), (200, 0.5, 0.6)):
        for out, cut, _ in drawn(labels.expand(3, -1, -1), labels, crop, *scale, count=20):
            assert out.shape == (3, crop, crop) and cut.shape == (crop, crop) and out.dtype == cut.dtype == torch.uint8
            padded = cut == data.PADDING
            assert padded.any() == (crop == 200) and not padded[:100 if crop == 200 else 0, :100].any()
            assert (out[:, padded] == torch.tensor(data.PAD_COLOUR)[:, None]).all()
            flat = ~padded
            for dy, dx in itertools.product((-2, 0, 2), repeat=2):  # edges blend: only the inside of a block counts
                flat &= cut.roll((dy, dx), (0, 1)) == cut
            assert (out[0][flat] == cut[flat]).float().mean() > 0.98
            corners[crop].add(cut[3, 3].item())
    assert len(corners[64]) > 10 and corners[200] == {labels[0, 0].item(), labels[0, -1].item()}  # flipped or not


def test_labels_lie_where_the_image_lies_and_at_its_scale():
    """On a ramp the image tells where each pixel was read: the labels must be from there, at any scale."""
    across = torch.arange(100, dtype=torch.uint8).expand(100, 100).contiguous()
    for scale, ramp in itertools.product((0.5, 0.75, 1.0, 1.5, 2.0), (across, across.T.contiguous())):
        (image, labels, _), = drawn(ramp.expand(3, -1, -1), ramp, 64, scale * 100 / 64, count=1)
        inside = (labels > 2) & (labels < 97)
        shift = (labels.float() - image[0].float())[inside].mean() * scale  # in pixels of the crop
        assert shift.abs() < 0.26, (scale, shift)  # the image is rounded to whole pixels of the source
    stripes = (torch.arange(80) // 10 % 2).to(torch.uint8).expand(40, 80).contiguous()  # each 10 · 64 / 40 · 1.5 wide
    for _, labels, _ in drawn(stripes.expand(3, -1, -1), stripes, 64, 1.5, count=10):
        widths = labels[0].int().diff().nonzero()[:, 0].diff().tolist()
        assert widths and set(widths) <= {23, 24}  # windows are of whole pixels


def test_crops_of_one_class_or_none_are_drawn_again():
    """One draw alone would show both classes in 121 of 301 places, and a quarter of the second in 25 of 301."""
    image = torch.zeros(3, 100, 400, dtype=torch.uint8)
    labels = torch.full((100, 400), IGNORE, dtype=torch.uint8)
    labels[:50, 180:200], labels[50:, 180:200] = 0, 1
    assert sum((cut == IGNORE).all().item() for _, cut, _ in drawn(image, labels, 100, 1.0)) < 10
    labels[:, :350], labels[:, 350:] = 0, 1
    assert sum(cut.float().mean() >= 0.25 for _, cut, _ in drawn(image, labels, 100, 1.0)) > 100


def test_padding_is_told_from_what_is_hidden():
    """A picture of 30 rows and 22 columns in a crop of 40, a grid of 10: position (i, j) is read at pixel 4i + 2."""
    labels = torch.full((2, 40, 40), data.PADDING, dtype=torch.uint8)
    labels[0, :30, :22], labels[0, :10, :22], labels[1] = 7, IGNORE, IGNORE
    told, inside = data.split_padding(labels, (10, 10))
    for i, j in itertools.product(range(10), repeat=2):
        assert inside[0, 10 * i + j] == (4 * i + 2 < 30 and 4 * j + 2 < 22)
    assert told[0].unique().tolist() == [7, 255] and (told[0] == 7).sum() == 20 * 22
    assert inside[1].all()  # nothing to learn, but all of it picture


def test_hidden_pixels_give_no_gradient(tmp_path):
    """From the file to the loss: pixels of unseen classes, background and void pull at nothing."""
    source = sources.open_dataset("voc", draw_tree("voc", tmp_path / "voc", train=1, val=1))
    _, image, raw = sources.files.read_pair(source.train[0], torch.arange(256, dtype=torch.uint8), 20)
    image, labels, _ = data.TrainSet(source, recipe(96, 0.6), 8)[0, 0]
    labels, _ = data.split_padding(labels[None], (1, 1))
    z = F.normalize(torch.randn(1, 8, 96, 96), dim=1).requires_grad_()
    cross_entropy_loss(z, F.normalize(torch.randn(15, 8), dim=1), labels, 0.07).backward()
    pulled = z.grad.abs().sum(1)[0] > 0
    assert torch.equal(pulled, labels[0] != IGNORE) and 0 < pulled.float().mean() < 0.5
    there = {source.seen.index(v - 1) for v in raw.unique().tolist() if 0 < v < 21 and v - 1 not in source.unseen}
    assert set(labels.unique().tolist()) - {IGNORE} == there and len(raw.unique()) - 2 > len(there)  # one is unseen


# ---------------------------------------------------------------- what the teacher sees


def test_the_view_is_the_crop_without_padding():
    """Same window, flip and colours, none of the grey; a picture of 40×56 under a crop of 64."""
    torch.manual_seed(0)
    image = (255 * F.interpolate(torch.rand(1, 3, 5, 7), (40, 56), mode="bicubic").clamp(0, 1)[0]).byte()
    image[0].clamp_(max=60)  # nothing in the picture is near the padding's grey
    labels = torch.arange(40 * 56).view(40, 56).fmod(200).byte()
    views, grey = [], torch.tensor(data.PAD_COLOUR)[:, None, None]
    for (low, high), jitter in itertools.product(((0.5, 0.9), (1.0, 2.0)), (False, True)):
        for crop, cut, view in drawn(image, labels, 64, low, high, jitter, count=10, view=32):
            h, w = ((cut != data.PADDING).any(dim=d).sum().item() for d in (1, 0))
            assert (h, w) == (64, 64) if low == 1 else h < 64
            same = TF.resize(view, [h, w], antialias=True).float()
            gap, mirrored = ((same - x).abs().mean() for x in (crop[:, :h, :w], crop[:, :h, :w].flip(2)))
            assert view.shape == (3, 32, 32) and gap < 4 and gap < 0.5 * mirrored
            assert jitter or ((view - grey).abs().amax(0) > 20).all()  # no grey in it
            views.append(view)
    assert min((a.float() - b.float()).abs().mean() for a, b in itertools.combinations(views[20:30], 2)) > 1
    for crop, _, view in drawn(image, labels, 64, 1.0, 2.0, count=3, view=64):
        assert torch.equal(crop, view)  # nothing to pad and one size


def test_clip_takes_the_view_for_the_picture():
    """Cosine of the view's CLS embedding and that of the unpadded crop at its own aspect ratio, over twenty scenes."""
    model, rng = clip.load("toy/clip.pt"), np.random.RandomState(5)

    def embed(image):
        return F.normalize(model.encode_image(image[None].float() / 255), dim=1)[0]

    cosines = []
    for seed in range(20):
        image, mask, _ = (torch.from_numpy(x) if isinstance(x, np.ndarray) else x for x in world.draw(rng))
        torch.manual_seed(seed)
        crop, labels, view = data.augment(image.permute(2, 0, 1)[:, :40, :56], mask[:40, :56], recipe(64, 0.7, 1.0), 64)
        h, w = ((labels != data.PADDING).any(dim=d).sum() for d in (1, 0))
        cosines.append([embed(crop[:, :h, :w]) @ embed(view), embed(crop[:, :h, :w]) @ embed(crop)])
    ours, padded = torch.tensor(cosines).mean(0)
    assert ours >= 0.94 and padded <= 0.8  # 0.948 and 0.796; over 200 scenes 0.922 and 0.797


# ---------------------------------------------------------------- colours


def test_distortion_against_a_way_through_each_step(monkeypatch):
    image, same = torch.randint(60, 180, (3, 8, 9), dtype=torch.uint8), 0
    for seed in range(64):
        torch.manual_seed(seed)
        same += torch.equal(data.distort(image), image)
    assert 1 <= same <= 12  # each of the four comes in half of the cases: 4 of 64 stay as they are
    draws = iter([0.0, 20.0, 0.0, 0.8, 0.0, 1.3, 0.0, 30.0])  # of a coin and a value, four times
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(next(draws)))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(next(draws)))
    got = data.distort(image)
    x = (image.double() + 20) * 0.8
    x = (x.mean(0) + 1.3 * (x - x.mean(0))).permute(1, 2, 0)
    axis, angle = torch.full((3,), 3 ** -0.5, dtype=torch.float64), np.deg2rad(30)
    turned = x * np.cos(angle) + torch.linalg.cross(axis.expand_as(x), x) * np.sin(angle) + \
        axis * (x @ axis)[..., None] * (1 - np.cos(angle))  # Rodrigues
    assert (got.double() - turned.permute(2, 0, 1).clamp(0, 255)).abs().max() <= 0.501


# ---------------------------------------------------------------- batches


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "toy"
    world.write(root, train=12, val=4)
    return sources.open_dataset("toy", root)


def test_a_batch_depends_on_neither_processes_nor_interruption(source):
    whole = list(data.Steps(12, 6, 0, 8, seed=3))
    epochs = [sorted(i for batch in whole[e:e + 2] for _, i in batch) for e in range(0, 8, 2)]
    assert epochs == [list(range(12))] * 4 and whole[0] != whole[2]  # every image once, in another order each time
    assert [position for batch in whole for position, _ in batch] == list(range(48))
    assert list(data.Steps(12, 6, 5, 8, seed=3)) == whole[5:] and data.Steps(12, 6, 0, 8, seed=3).batch(5) == whole[5]
    assert list(data.Steps(12, 6, 0, 8, seed=4)) != whole
    halves = [list(data.Steps(12, 6, 0, 8, seed=3, rank=r, ranks=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    train = data.TrainSet(source, sources.TOY, 64, seed=3)
    first = train[whole[4][2]]
    torch.rand(7)
    before = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, train[whole[4][2]]))
    assert torch.equal(before, torch.random.get_rng_state())
    position, i = whole[4][2]
    assert not torch.equal(train[position + 12, i][0], first[0])  # the next epoch draws another crop
    assert not torch.equal(data.TrainSet(source, sources.TOY, 64, seed=4)[position, i][0], first[0])
    crops, labels, views = next(iter(data.train_loader(train, data.Steps(12, 6, 4, 8, seed=3), 0, torch.device("cpu"))))
    assert torch.equal(crops[2], first[0]) and torch.equal(labels[2], first[1]) and torch.equal(views[2], first[2])


def test_val_parts_have_no_repeats(source):
    parts = [[item[2] for item in data.ValSet(source, r, 3)] for r in range(3)]
    assert sorted(sum(parts, [])) == sorted(name for name, *_ in source.val)
    image, labels, name = data.ValSet(source)[1]
    assert name == source.val[1][0] and torch.equal(labels, torch.from_numpy(np.array(Image.open(source.val[1][2]))))
