"""data.py and toy/: the folder layout, the seen-only view, transforms, and what broken folders say."""
import hashlib
import itertools
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

import data
import sources
from toy import world

WORLD_DIGEST = "9d0cd483c99ed80f"  # of the first 20 scenes, images and masks


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("data") / "toy"
    world.write(root, train=12, val=4)
    return root


@pytest.fixture
def copy(small_world, tmp_path):
    return shutil.copytree(small_world, tmp_path / "copy")


def test_the_world_is_the_same_on_every_machine():
    rng, digest = np.random.RandomState(0), hashlib.sha256()
    for _ in range(20):
        image, mask, _ = world.draw(rng)
        digest.update(image.tobytes() + mask.tobytes())
    assert digest.hexdigest()[:16] == WORLD_DIGEST


def test_unseen_classes_are_new_pairs_of_known_words_and_one_unknown_colour():
    for seed in range(6):
        unseen = world.unseen(seed)
        things = [c for c in unseen if c in world.THINGS]
        assert len(things) == 8 and len(unseen) == 9 and unseen == [c for c in world.CLASSES if c in unseen]
        seen = [c for c in world.CLASSES if c not in unseen]
        unknown, = {w for c in unseen for w in c.split()} - {w for c in seen for w in c.split()}
        assert unknown in world.COLOURS
        pairs = [c.split() for c in things if unknown not in c]
        assert len(pairs) == 4 and len({c for c, _ in pairs}) == 4 and len({s for _, s in pairs}) == 4
    assert world.unseen(0) != world.unseen(1)


def test_written_masks_are_what_was_drawn(small_world):
    rng = np.random.RandomState(0)
    for i in range(3):
        image, mask, names = world.draw(rng)
        with Image.open(small_world / "masks" / f"train_{i:05d}.png") as file:
            assert file.mode == "P"
            assert np.array_equal(np.asarray(file), mask)
        assert np.array_equal(np.asarray(Image.open(small_world / "images" / f"train_{i:05d}.png")), image)
        assert sorted(names) == sorted(world.CLASSES[k] for k in np.unique(mask))


def test_training_labels_are_indexes_among_the_seen_and_unseen_is_hidden(small_world):
    source = sources.open_folder(small_world, "toy", world.TEMPLATES, sources.TOY)
    assert sorted(source.classes[k] for k in source.unseen) == sorted(world.unseen(0))
    train, val = source.table(training=True), source.table(training=False)
    for k, name in enumerate(world.CLASSES):
        assert val[k] == k
        if name in world.unseen(0):
            assert train[k] == 255
        else:
            assert [c for c in world.CLASSES if c not in world.unseen(0)][train[k]] == name
    assert train[255] == val[255] == 255 and (train[31:255] == sources.INVALID).all()


def test_image_and_labels_are_cut_alike():
    """A picture whose colour is its own label must still be so after any crop, scale and flip."""
    rng = np.random.RandomState(0)
    labels = torch.from_numpy(np.kron(rng.randint(0, 250, (6, 8)), np.ones((20, 20))).astype(np.uint8))
    image = labels.expand(3, -1, -1).clone()
    for crop, scale in ((64, (1.0, 2.0)), (200, (0.5, 0.6))):
        recipe = sources.Recipe(1, crop=crop, scale=scale, jitter=False)
        for seed in range(20):
            torch.manual_seed(seed)
            out, cut = data.augment(image, labels, recipe)
            assert out.shape == (3, crop, crop) and cut.shape == (crop, crop)
            padded = cut == data.PADDING
            assert padded.any() == (crop == 200)
            assert (out[:, padded] == torch.tensor(data.PAD_COLOUR)[:, None]).all()
            flat = ~padded
            for dy in (-2, 0, 2):  # edges blend in the image, so only the inside of a block is compared
                for dx in (-2, 0, 2):
                    flat &= cut.roll((dy, dx), (0, 1)) == cut
            assert (out[0][flat] == cut[flat]).float().mean() > 0.98


def test_labels_lie_where_the_image_lies():
    """On a ramp the image tells where each pixel was read: the labels must be from there, at any scale."""
    across = torch.arange(100, dtype=torch.uint8).expand(100, 100).contiguous()
    for scale, ramp in itertools.product((0.5, 0.75, 1.0, 1.5, 2.0), (across, across.T.contiguous())):
        recipe = sources.Recipe(1, crop=64, scale=(scale * 100 / 64,) * 2, jitter=False)
        torch.manual_seed(0)
        image, labels = data.augment(ramp.expand(3, -1, -1), ramp, recipe)
        inside = (labels > 2) & (labels < 97)
        shift = (labels.float() - image[0].float())[inside].mean() * scale  # in pixels of the crop
        assert shift.abs() < 0.26, (scale, shift)  # the image is rounded to whole pixels of the source


def test_padding_is_told_from_what_is_hidden():
    """A picture of 30 rows and 22 columns in a crop of 40, a grid of 10: position (i, j) is read at pixel 4i + 2."""
    labels = torch.full((1, 40, 40), data.PADDING, dtype=torch.uint8)
    labels[0, :30, :22] = 7
    labels[0, :10] = labels[0, :10].where(labels[0, :10] == data.PADDING, sources.IGNORE)
    told, inside = data.split_padding(labels, (10, 10))
    for i in range(10):
        for j in range(10):
            assert inside[0, 10 * i + j] == (4 * i + 2 < 30 and 4 * j + 2 < 22)
    assert told.unique().tolist() == [7, 255] and (told == 7).sum() == 20 * 22
    assert data.split_padding(torch.full((2, 8, 8), 255), (2, 2))[1].all()  # nothing to learn, but all of it picture


def test_crops_that_show_no_class_are_drawn_again():
    labels = torch.full((100, 400), sources.IGNORE, dtype=torch.uint8)
    labels[:50, 180:200], labels[50:, 180:200] = 0, 1
    recipe = sources.Recipe(1, crop=100, scale=(1.0, 1.0), jitter=False)
    torch.manual_seed(0)
    image = torch.zeros(3, 100, 400, dtype=torch.uint8)
    empty = sum((data.augment(image, labels, recipe)[1] == 255).all().item() for _ in range(200))
    assert empty < 10  # one draw alone would miss in 182 of 301 places: 121 times


def test_crops_with_too_much_of_one_class_are_drawn_again():
    labels = torch.zeros(100, 400, dtype=torch.uint8)
    labels[:, 350:] = 1
    image = torch.zeros(3, 100, 400, dtype=torch.uint8)
    recipe = sources.Recipe(1, crop=100, scale=(1.0, 1.0), jitter=False)
    torch.manual_seed(0)
    mixed = [data.augment(image, labels, recipe)[1].float().mean().item() for _ in range(200)]
    good = [m for m in mixed if 0.25 <= m]
    assert len(good) > 100  # one draw alone would do so in 25 of 301 places: 17 times


def test_a_batch_depends_on_neither_processes_nor_interruption(small_world):
    source = sources.open_folder(small_world, "toy", world.TEMPLATES, sources.TOY)
    whole = list(data.Steps(12, 6, 0, 8, seed=3))
    assert sorted(i for batch in whole[:2] for _, i in batch) == list(range(12))  # an epoch has every image once
    assert list(data.Steps(12, 6, 5, 8, seed=3)) == whole[5:]
    halves = [list(data.Steps(12, 6, 0, 8, seed=3, rank=r, ranks=2)) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    train = data.TrainSet(source, sources.TOY, seed=3)
    first = train[whole[4][2]]
    torch.rand(7)
    before = torch.random.get_rng_state()
    again = train[whole[4][2]]
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    assert torch.equal(before, torch.random.get_rng_state())


def test_val_parts_have_no_repeats(small_world):
    source = sources.open_folder(small_world, "toy", world.TEMPLATES, sources.TOY)
    parts = [[name for *_, name in data.ValSet(source, (r, 3))] for r in range(3)]
    assert sorted(sum(parts, [])) == sorted(name for name, *_ in source.val)


def rgb_mask(root):
    Image.open(root / "masks/train_00003.png").convert("RGB").save(root / "masks/train_00003.png")


def wrong_value(root):
    Image.fromarray(np.full((64, 64), 77, np.uint8)).save(root / "masks/train_00003.png")


def wrong_size(root):
    Image.fromarray(np.zeros((32, 64), np.uint8)).save(root / "masks/train_00003.png")


def truncated(root):
    path = root / "images/train_00003.png"
    path.write_bytes(path.read_bytes()[:2000])


BROKEN = {
    "masks": (rgb_mask, "train_00003.png is RGB"), "value": (wrong_value, "train_00003.png holds the value 77"),
    "size": (wrong_size, r"train_00003.png is \(64, 64\) pixels, its mask .* is \(32, 64\): expected one size"),
    "jpeg": (truncated, "cannot read the image .*train_00003.png"),
    "no mask": (lambda root: (root / "masks/val_00001.png").unlink(), "names 'val_00001', but no mask"),
    "no list": (lambda root: (root / "val.txt").unlink(), "cannot read .*val.txt"),
    "empty list": (lambda root: (root / "train.txt").write_text("\n"), "train.txt is empty"),
    "unseen": (lambda root: (root / "unseen.txt").write_text("red rng\n"), "'red rng', which is not a line"),
    "all unseen": (lambda root: shutil.copy(root / "classes.txt", root / "unseen.txt"), "names every class"),
    "twice": (lambda root: (root / "classes.txt").write_text("a\na\n"), "2 lines, 1 different"),
    "path": (lambda root: (root / "train.txt").write_text("../../etc/passwd\n"), "no image of that name"),
    "not text": (lambda root: (root / "classes.txt").write_bytes(b"\xff\xfe\x00"), "cannot read .*classes.txt"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_folders_say_what_is_wrong(copy, case):
    spoil, message = BROKEN[case]
    spoil(copy)
    with pytest.raises(sources.DataError, match=message) as error:
        source = sources.open_folder(copy, "copy", world.TEMPLATES, sources.TOY)
        train = data.TrainSet(source, sources.TOY)
        for i in range(12):
            train[i, i]
    assert "\n" not in str(error.value)


def test_without_unseen_list_the_set_is_closed(copy):
    (copy / "unseen.txt").unlink()
    assert sources.open_folder(copy, "copy", world.TEMPLATES, sources.TOY).unseen == set()
