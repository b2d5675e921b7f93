"""Damaged and hostile files and flags through the real commands: one clear line or a run as usual; no traceback, no
hang, nothing run, nothing written outside the run folder. A case follows from its kind and seed alone."""
import os
import pickle
import random
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import run_inside
from test_support import FLAGS, flags, load, own, stopped  # noqa: F401
from torchvision.models import mobilenet_v2

import evaluate
import train
from sources import check

pytestmark = pytest.mark.slow
DATA = ("image", "mask", "classes", "unseen", "train", "val")
WEIGHTS = {"checkpoint": "out/last.pt", "clip": "clip.pt", "weights": "out/w.pth"}
SEEDS = int(os.environ.get("FUZZ_SEEDS", 40))  # of each kind
JUNK = [None, True, -1, 0, 10 ** 30, float("nan"), "", "x", "../../x", b"x", [], {}, [1, [2]], {"a": 1},
        torch.zeros(2), torch.zeros(0), torch.eye(2).to_sparse(), torch.full((3,), torch.nan),
        torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(10 ** 13), torch.zeros(3, device="meta")]
WORDS = ["", "nan", "inf", "-inf", "-1", "0", "1", "1e-30", "1e30", "2.5", "x", "../../x", "/", "9" * 30, "\u0663"]
FLAG_NAMES = ["--steps", "--lr", "--crop", "--k-end", "--select", "--sgd-weight", "--sam-weight", "--seed",
              "--workers", "--batch-size", "--save-every", "--frozen-blocks", "--body", "--clip",
              "--dataset", "--data-root", "--body-weights", "--head", "--head-attention", "--device", "--precision"]


def hang(*_):
    raise TimeoutError("it hangs")


signal.signal(signal.SIGALRM, hang)


class Evil(str):
    """A path, whose file is written where this is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {str(self)}",)


def damage(rng, path, flag):
    """Any file: flipped bits, cut, replaced by other content or by what is no file."""
    good, junk = path.read_bytes(), rng.randbytes(rng.randint(1, 5000))
    how = rng.choice(("flip", "cut", "other", "no file"))
    path.unlink()
    if how == "flip":
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 20, 200))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif how == "cut":
        at = rng.randrange(len(good))
        path.write_bytes(rng.choice((good[:at], good[at:])))
    elif how == "other":
        path.write_bytes(rng.choice((good + good, good[:20] + junk, junk, b"", bytes(5000), b"<svg/>", b"\xff\xfeh\0",
                                     b"%!PS-Adobe-3.0 EPSF-3.0\n(ran) run", pickle.dumps(Evil(flag)))))
    else:
        target = rng.choice(("/etc/passwd", path.name, "/dev/zero", "/", "nowhere"))
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(target)))()


def values(rng, path, flag):
    """A checkpoint or a CLIP file that loads, with something else in it."""
    saved = load(path)
    inner = saved
    for _ in range(rng.randint(0, 3)):
        inner = rng.choice([inner, *(value for value in inner.values() if isinstance(value, dict) and value)])
    key = rng.choice((*inner, 3, "more"))
    inner[key] = rng.choice(JUNK)
    if rng.random() < 0.2:
        del inner[key]
    torch.save(rng.choice((saved, saved, saved, saved, [saved], {"model": saved}, {**saved, "z": Evil(flag)})), path)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", [*DATA, *WEIGHTS, "log", "flags"])
def test_fuzz(kind, seed, own, stopped, tiny_clip_file, tmp_path, monkeypatch):  # noqa: F811
    """Damages one thing and runs a command on it."""
    rng, ran = random.Random(f"{kind}{seed}"), tmp_path / "ran"
    torch.manual_seed(seed)
    np.random.seed(seed)
    data, out = shutil.copytree(own, tmp_path / "data"), shutil.copytree(stopped, tmp_path / "out")
    tiny = shutil.copy(tiny_clip_file, tmp_path / "clip.pt")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    module, args = train, ["--dataset", data, *FLAGS, "--clip", tiny, "--steps", 1, "--out-dir", out]
    if kind == "flags":
        args += [f"{flag}={rng.choice(WORDS)}" for flag in rng.sample(FLAG_NAMES, rng.randint(1, 2))]
    else:
        image = rng.choice(sorted((data / "images").iterdir()))
        where = WEIGHTS | {"log": "out/log.jsonl", "image": f"data/images/{image.name}",
                           "mask": f"data/masks/{image.stem}.png"}
        path = tmp_path / where.get(kind, f"data/{kind}.txt")
        if kind == "weights":  # ImageNet's, of a body
            torch.save(mobilenet_v2().state_dict(), path)
            args += ["--body", "mobilenet-v2", "--body-weights", path]
        spoil = values if kind in WEIGHTS and rng.random() < 0.6 else damage
        spoil(rng, path, ran)
    if kind in ("checkpoint", "log") and rng.random() < 0.5:
        args += ["--steps", 6, "--resume"]
    elif kind == "checkpoint" or kind in DATA and rng.random() < 0.3:
        module, args = evaluate, ["--run", out, "--dataset", data, "--device", "cpu"]
    elif kind in DATA and rng.random() < 0.5:
        module, args = check, ["--dataset", data, "--picture", out / "check.png"]
    signal.alarm(60)
    try:
        status, text, words = run_inside(module, *args)
    finally:
        signal.alarm(0)
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out", "clip.pt", "cwd"}
    assert {p.name for p in (tmp_path / "cwd").iterdir()} <= {"runs", "data"}, args
    if status and words == "2":  # argparse
        assert ": error: " in text, text
    elif status:
        assert words.startswith("error: ") and "\n" not in words and len(words) < 2000, words
