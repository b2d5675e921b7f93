"""Damaged and hostile files and flags through the real commands: one clear line or a run as usual; no traceback, no
hang, nothing run, nothing written outside the run folder. A case follows from its kind and seed alone."""
import os
import pickle
import random
import shutil
import signal
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import run_inside
from test_support import FLAGS, flags, load, own, stopped  # noqa: F401
from torchvision.models import mobilenet_v2

import clip
import evaluate
import train
from sources import check

pytestmark = pytest.mark.slow
FILES = {"image": "data/images/{}", "mask": "data/masks/{}", "classes": "data/classes.txt", "unseen": "data/unseen.txt",
         "train": "data/train.txt", "val": "data/val.txt", "checkpoint": "out/last.pt", "clip": "clip.pt",
         "log": "out/log.jsonl", "weights": "out/w.pth"}
LISTS = ("classes", "unseen", "train", "val")
SEEDS = int(os.environ.get("FUZZ_SEEDS", 40))  # of each kind
JUNK = [None, True, -1, 0, 10 ** 30, float("nan"), "", "x", "../../x", b"x", [], {}, [1, [2]], {"a": 1},
        torch.zeros(2), torch.zeros(0), torch.eye(2).to_sparse(), torch.full((3,), torch.nan),
        torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(10 ** 13), torch.zeros(3, device="meta")]
WORDS = ["", "nan", "inf", "-inf", "-1", "0", "1", "1e-30", "1e30", "2.5", "x", "../../x", "/", "9" * 30, "\u0663"]
FLAG_NAMES = ["--steps", "--lr", "--crop", "--k-end", "--select", "--sgd-weight", "--sam-weight", "--seed",
              "--workers", "--batch-size", "--save-every", "--frozen-blocks", "--body", "--clip",
              "--dataset", "--data-root", "--body-weights", "--head", "--head-attention", "--device", "--precision"]
WRITES = ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove")
PROGRAMS = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect")
watched = {"inside": None, "seen": []}


def watch(event, args):
    """Python's own audit events: programs started, files written, made or moved outside the case's folder."""
    if event == "subprocess.Popen" and args[0] == "git":  # which asks for the product's commit
        return
    if watched["inside"] and (event in (*WRITES, *PROGRAMS) or event == "open" and set(str(args[1])) & set("wax+")):
        path = os.path.realpath(args[0].decode() if isinstance(args[0], bytes) else str(args[0]))
        if event in PROGRAMS or not path.startswith((watched["inside"], str(clip.CACHE), "/dev/null")):
            watched["seen"].append((event, str(args)[:200]))


def hang(*_):
    raise TimeoutError("it hangs")


sys.addaudithook(watch)
signal.signal(signal.SIGALRM, hang)


class Evil(str):
    """A path, whose file is written where this is unpickled."""

    def __reduce__(self):
        return os.system, (f"touch {str(self)}",)


def damage(rng, path, flag):
    """Any file: cut, flipped, replaced by another kind of thing."""
    good = path.read_bytes()

    def flip():
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 20, 200))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)

    def other():
        at, junk = rng.randrange(len(good)), rng.randbytes(rng.randint(1, 5000))
        path.write_bytes(rng.choice((
            good[:at], good[:-rng.randint(1, 40)], good[len(good) // 2:], good + good, good[:20] + junk, junk, b"",
            bytes(5000), b"%!PS-Adobe-3.0 EPSF-3.0\n(ran) run", b"<svg/>", b"\x7fELF", b"\xff\xfeh\0",
            b"GIF89a" + good[6:], pickle.dumps(Evil(flag)))))

    def archive():
        with zipfile.ZipFile(path, "w", rng.choice((0, 8))) as file:
            for name in rng.sample(("x/data.pkl", "x/constants.pkl", "x/version", "x/byteorder", "../../../ran"), 4):
                file.writestr(name, rng.choice((pickle.dumps(Evil(flag), 2), b"3\n", b"", bytes(10 ** 6))))

    def no_file():
        path.unlink()
        rng.choice((path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(
            rng.choice(("/etc/passwd", path.name, "/dev/zero", "/", "nowhere")))))()

    rng.choice((flip, flip, other, other, other, other, archive, archive, no_file, no_file,
                lambda: torch.save({"a": Evil(flag)}, path)))()


def values(rng, path, flag):
    """A file of weights that loads, with something else in it."""
    saved = load(path)
    for _ in range(rng.randint(1, 2)):
        inner, depth = saved, rng.randint(0, 3)
        while depth and (deeper := [v for v in inner.values() if isinstance(v, dict) and v]):
            inner, depth = rng.choice(deeper), depth - 1
        key = rng.choice((*inner, *inner, *inner, 3, "more"))
        inner[key] = rng.choice(JUNK)
        if rng.random() < 0.2:
            del inner[key]
    torch.save(rng.choice((saved, saved, saved, saved, [saved], {"model": saved}, {**saved, "z": Evil(flag)})), path)


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", [*FILES, "flags"])
def test_fuzz(kind, seed, own, stopped, tiny_clip_file, tmp_path, monkeypatch):  # noqa: F811
    """Damages one thing and runs a command on it."""
    rng, ran = random.Random(f"{kind}{seed}"), tmp_path / "ran"
    torch.manual_seed(seed)
    np.random.seed(seed)
    data, out = shutil.copytree(own, tmp_path / "data"), shutil.copytree(stopped, tmp_path / "out")
    tiny, name = shutil.copy(tiny_clip_file, tmp_path / "clip.pt"), rng.choice(sorted(os.listdir(own / "images")))
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    path = tmp_path / FILES.get(kind, "").format(name if kind == "image" else f"{name[:-4]}.png")
    module, args = train, ["--dataset", data, *FLAGS, "--clip", tiny, "--steps", 1, "--out-dir", out]
    if kind == "weights":  # ImageNet's, of a body
        torch.save(mobilenet_v2().state_dict(), path)
        args += ["--body", "mobilenet-v2", "--body-weights", path]
    if kind == "flags":
        args += [f"{flag}={rng.choice(WORDS)}" for flag in rng.sample(FLAG_NAMES, rng.randint(1, 2))]
    elif kind in ("clip", "weights") and rng.random() < 0.6:
        values(rng, path, ran)
    else:
        damage(rng, path, ran)
    if kind in ("checkpoint", "log") and rng.random() < 0.5:
        args += ["--dataset", own, "--clip", tiny_clip_file, "--steps", 6, "--resume"]
    elif kind == "checkpoint" or kind in ("image", "mask", *LISTS) and rng.random() < 0.3:
        module, args = evaluate, ["--run", out, "--dataset", data, "--device", "cpu"]
    elif kind in ("image", "mask", *LISTS) and rng.random() < 0.5:
        module, args = check, ["--dataset", data, "--picture", out / "check.png"]
    watched.update(inside=str(tmp_path), seen=[])
    signal.alarm(60)
    try:
        status, text, words = run_inside(module, *args)
    finally:
        signal.alarm(0)
        watched["inside"] = None
    assert not watched["seen"], (args, watched["seen"])
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out", "clip.pt", "cwd"}
    assert not list(tmp_path.parent.glob("ran*")) and not (tmp_path / "cwd" / "ran").exists()
    if status and words == "2":  # argparse
        assert ": error: " in text, text
    elif status:
        assert words.startswith("error: ") and "\n" not in words and len(words) < 2000, words
