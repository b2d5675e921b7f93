"""The embedded default: its tiny CLIP, as committed, and its world."""
import json
from pathlib import Path

import numpy as np
import pytest

import clip
from toy import pretrain, world

FILE = Path(pretrain.__file__).parent / "clip.pt"


def test_zero_shot_of_the_committed_file():
    images, names = pretrain.Scenes(1000, seed=12345).all(workers=0)
    alone = images[::2], names[::2]  # even scenes hold one thing
    assert all(sum(n in world.THINGS for n in held) == 1 for held in alone[1])
    score = pretrain.zero_shot(clip.load(FILE), *alone)
    assert score["all"] >= 95 and score["unseen"] >= 90, score


def test_file_is_small_and_the_one_on_record():
    assert FILE.stat().st_size <= 12 * 2 ** 20
    assert json.loads(FILE.with_suffix(".json").read_text())["sha256"] == clip.file_sha256(FILE)


def test_captions_never_need_a_mask_and_name_what_is_there():
    rng = np.random.RandomState(0)
    for _ in range(200):
        _, _, names = world.draw(rng)
        words = pretrain.caption(names, rng)
        assert any(name in words for name in names)
        assert not any(other in words for other in world.CLASSES if other not in names)


def test_a_world_is_never_written_over(tmp_path):
    world.write(tmp_path / "toy", seed=2, train=2, val=1)
    assert (tmp_path / "toy/unseen.txt").read_text().splitlines() == world.unseen(2)
    with pytest.raises(FileExistsError, match="is there already"):
        world.write(tmp_path / "toy")
