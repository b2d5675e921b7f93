"""The toy data set: its tiny CLIP, as committed, its sprites and its world."""
import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import clip
from toy import pretrain, sprites, world

FILE = Path(pretrain.__file__).parent / "clip.pt"


def test_zero_shot_of_the_committed_file():
    images, names = pretrain.Scenes(600, [12345], pretrain.TEST).all()
    assert all(sum(n not in world.STUFF for n in held) == (i % 10 > 0) for i, held in enumerate(names))
    score = pretrain.zero_shot(clip.load(FILE), images, names)
    assert score["nouns"] >= 70 and score["things"] >= 88 and score["grounds"] >= 97, score


def test_files_are_small_and_those_on_record():
    assert FILE.stat().st_size <= 10 * 2**20 and sprites.SHEET.stat().st_size <= 3 * 2**20
    assert json.loads(FILE.with_suffix(".json").read_text())["sha256"] == clip.file_sha256(FILE)
    third_party = (FILE.parent.parent / "THIRD_PARTY.md").read_text()
    assert hashlib.sha256(sprites.SHEET.read_bytes()).hexdigest() in third_party


def test_captions_name_what_is_there_and_nothing_else():
    rng = np.random.RandomState(0)
    for _ in range(200):
        _, _, names = world.draw(rng)
        said = {pretrain.caption(names, about, rng) for about in np.eye(3)}  # things, grounds, both
        words = [word for text in said for word in text.removeprefix("a photo of ").removeprefix("a picture of ")
                 .replace(" on ", " and ").split(" and ")]
        assert set(words) == set(names)


def test_every_noun_has_three_sprites_that_differ():
    sheet = sprites.read_sheet()
    assert len(sheet) == len(set(sheet)) == len(world.THINGS) + len(world.OTHERS) == 288
    assert set(world.THINGS) <= set(sheet) and not set(sheet) & set(world.STUFF)
    cells = {cell.tobytes() for stack in sheet.values() for cell in stack}
    assert len(cells) == 3 * 288 and all((stack[..., 3] > 127).mean() > 0.08 for stack in sheet.values())


def test_the_world_is_the_same_on_every_machine_and_written_as_drawn(tmp_path):
    world.write(tmp_path / "toy", train=20, val=1)
    rng, digest = np.random.RandomState(0), hashlib.sha256()
    for i in range(20):
        image, mask, names = world.draw(rng)
        digest.update(image.tobytes() + mask.tobytes())
        assert {world.CLASSES[k] for k in np.unique(mask) if k != world.VOID} >= set(names) - set(world.OTHERS)
        written = Image.open(tmp_path / f"toy/masks/train_{i:05d}.png")
        assert written.mode == "P" and np.array_equal(np.asarray(written), mask)
        assert np.array_equal(np.asarray(Image.open(tmp_path / f"toy/images/train_{i:05d}.png")), image)
    assert digest.hexdigest()[:16] == "4d779e3e1c60a34f"


def test_a_mask_lies_on_its_emoji():
    """The same scene with and without its emoji differs where the mask says so, and hardly elsewhere."""
    hits = []
    for seed in range(30):
        with_emoji, mask, names = world.draw(np.random.RandomState(seed), others=0, things=(1, 1))
        rng = np.random.RandomState(seed)
        plain, ground, _ = world.draw(rng, others=0, things=(0, 0))
        changed = abs(with_emoji.astype(int) - plain).max(-1) > 40
        thing = mask != ground
        assert set(np.unique(mask[thing])) == {world.THINGS.index(n) for n in names if n in world.THINGS}
        hits.append((changed & thing).sum() / (changed | thing).sum())
    assert np.mean(hits) > 0.75


def test_five_things_and_two_grounds_are_unseen():
    for seed in range(6):
        unseen = world.unseen(seed)
        assert len(unseen) == 7 and unseen == [c for c in world.CLASSES if c in unseen]
        assert [len(names) for names in world.unseen_kinds(seed).values()] == [5, 2]
        assert len(set(unseen) & set(world.THINGS)) == 5
    assert world.unseen(0)[:5] == ["potted plant", "sheep", "sofa", "train", "tv monitor"] != world.unseen(1)[:5]


def test_the_demo_shows_no_class():
    image, names = world.demo()
    assert image.shape == (64, 64, 3) and set(world.DEMO) < set(names) <= {*world.OTHERS, *world.STUFF}


def test_a_world_is_never_written_over(tmp_path):
    (tmp_path / f"toy.partial-{os.getpid()}/images").mkdir(parents=True)  # a process of this number was killed
    world.write(tmp_path / "toy", seed=2, train=2, val=1)
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    assert (tmp_path / "toy/unseen.txt").read_text().splitlines() == world.unseen(2)
    with pytest.raises(FileExistsError, match="exists already"):
        world.write(tmp_path / "toy")
