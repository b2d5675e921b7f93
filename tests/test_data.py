"""data.py: what is cut lies together, what the teacher sees, batches by step."""
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as TF
from trees import draw_tree

import data
import sources
from losses import IGNORE
from sources.files import read_pair, read_values


def recipe(crop, low, high=None, jitter=False):
    return sources.Recipe(1, crop=crop, scale=(low, high or low), jitter=jitter)


def drawn(image, labels, *args, count=200, view=8):
    """`count` draws of data.augment, from seeds 0, 1, …"""
    for seed in range(count):
        torch.manual_seed(seed)
        yield data.augment(image, labels, recipe(*args), view)


@pytest.fixture
def source(tmp_path):
    return sources.open_dataset("voc", draw_tree("voc", tmp_path / "voc"))


@pytest.mark.parametrize("scale", [0.5, 0.75, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("turned", [False, True])
def test_labels_lie_where_the_image_lies_and_at_its_scale(scale, turned):
    """On a ramp the image tells where each pixel was read: the labels must be from there."""
    ramp, slopes, starts = torch.arange(130, dtype=torch.uint8).expand(100, 130), set(), set()
    ramp = ramp.T.contiguous() if turned else ramp.contiguous()
    for image, labels, _ in drawn(ramp.expand(3, -1, -1), ramp, 64, scale * 100 / 64, count=20):
        padding = torch.ones(64, 64, dtype=torch.bool)
        padding[:round(scale * ramp.shape[0]), :round(scale * ramp.shape[1])] = False
        assert image.dtype == labels.dtype == torch.uint8 and torch.equal(labels == data.PADDING, padding)
        assert (image[:, padding] == torch.tensor(data.PAD_COLOUR)[:, None]).all()
        gap = (labels.float() - image[0].float())[~padding & (labels > 2) & (labels < 127)]
        assert gap.abs().max() <= 2 and gap.mean().abs() * scale < 0.26  # the image is rounded to whole values
        line = (labels[:, 0] if turned else labels[0])[~padding[:, 0] if turned else ~padding[0]].float()
        slopes.add(round((line[-1] - line[0]).item() / (len(line) - 1) * scale, 1))
        starts.add(line.min().item())
    assert slopes == ({1.0} if turned else {1.0, -1.0})  # flipped or not, never upside down
    assert len(starts) > 10 or scale < 1


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
    want = [[[4 * i + 2 < 30 and 4 * j + 2 < 22 for j in range(10)] for i in range(10)], [[True] * 10] * 10]
    assert inside.tolist() == want  # of the second nothing is learned, but all of it is picture
    assert told[0].unique().tolist() == [7, 255] and (told[0] == 7).sum() == 20 * 22


def test_training_labels_hide_unseen_classes(source):
    """From the file to the labels: none of an unseen class, of background or void."""
    raw = set(np.unique(read_values(source.train[0][2])).tolist()) - {0, 255}
    labels = data.TrainSet(source, recipe(96, 0.6), 8)[0, 0][1]
    there = {source.seen.index(value - 1) for value in raw if value - 1 not in source.unseen}
    assert set(labels.unique().tolist()) == there | {IGNORE, data.PADDING} and len(raw) > len(there)


def test_the_view_is_the_crop_without_padding():
    """Same window, flip and colours, none of the grey; a picture of 40×56 under a crop of 64."""
    torch.manual_seed(0)
    image = (255 * F.interpolate(torch.rand(1, 3, 5, 7), (40, 56), mode="bicubic").clamp(0, 1)[0]).byte()
    image[0].clamp_(max=60)  # nothing in the picture is near the padding's grey
    labels, grey = torch.arange(40 * 56).view(40, 56).fmod(200).byte(), torch.tensor(data.PAD_COLOUR)[:, None, None]
    redder = [False, False]  # without and with distortion
    for (low, high), jitter in itertools.product(((0.5, 0.9), (1.0, 2.0)), (False, True)):
        for crop, cut, view in drawn(image, labels, 64, low, high, jitter, count=10, view=32):
            h, w = ((cut != data.PADDING).any(dim=d).sum().item() for d in (1, 0))
            same = TF.resize(view, [h, w], antialias=True).float()
            gap, mirrored = ((same - x).abs().mean() for x in (crop[:, :h, :w], crop[:, :h, :w].flip(2)))
            assert view.shape == (3, 32, 32) and gap < 4 and gap < 0.5 * mirrored
            assert jitter or ((view - grey).abs().amax(0) > 20).all()  # no grey in it
            redder[jitter] |= crop[0, :h, :w].max().item() > 60
    assert redder == [False, True]
    for crop, _, view in drawn(image, labels, 64, 1.0, 2.0, count=3, view=64):
        assert torch.equal(crop, view)  # nothing to pad and one size


def test_a_batch_depends_on_neither_processes_nor_interruption(source):
    whole = list(data.Steps(12, 6, 0, 8, seed=3))
    epochs = [sorted(i for batch in whole[e:e + 2] for _, i in batch) for e in range(0, 8, 2)]
    assert epochs == [list(range(12))] * 4 and [i for _, i in whole[0]] != [i for _, i in whole[2]]  # in another order
    assert [position for batch in whole for position, _ in batch] == list(range(48))
    assert list(data.Steps(12, 6, 5, 8, seed=3)) == whole[5:] and list(data.Steps(12, 6, 0, 8, seed=4)) != whole
    halves = [list(data.Steps(12, 6, 0, 8, seed=3, rank=r, ranks=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole

    train, (position, i) = data.TrainSet(source, recipe(64, 0.5, 2.0), 64, seed=3), whole[4][2]
    first, other = train[position, i], data.TrainSet(source, recipe(64, 0.5, 2.0), 64, seed=4)
    torch.rand(7)
    before = torch.random.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(first, train[position, i]))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not torch.equal(train[position + 12, i][0], first[0])  # the next epoch draws another crop
    assert not torch.equal(other[position, i][0], first[0])
    batch = next(iter(data.train_loader(train, data.Steps(12, 6, 4, 8, seed=3), 0, torch.device("cpu"))))
    assert all(torch.equal(a[2], b) for a, b in zip(batch, first))


def test_each_process_tests_its_part_with_labels_of_all_classes(source):
    parts = [[name for *_, name in data.ValSet(source, r, 2)] for r in range(2)]
    assert [len(part) for part in parts] == [2, 1] and sorted(sum(parts, [])) == [name for name, *_ in source.val]
    _, labels, _ = data.ValSet(source, 1, 2)[0]
    assert torch.equal(labels, read_pair(source.val[1], source.table(training=False), 20)[2])
