"""Damaged and hostile files and flags through the real commands: one clear line or a run as usual; no traceback, no
hang, nothing run, nothing written outside the run folder. A case follows from its kind and seed alone."""
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image
from test_trust import FLAGS, ROOT, load, own, run  # noqa: F401

import clip
import evaluate
import train

KINDS = ("image", "mask", "classes", "unseen", "split", "checkpoint", "clip", "log", "flags")
SEEDS = 40  # of each kind
# (kind, seed) that once ended otherwise; whoever changes what a seed makes loses them
REGRESSIONS = [("unseen", 32), ("split", 10), ("checkpoint", 36), ("log", 19), ("flags", 0), ("flags", 3)]
TRICKS = ["../../etc/passwd", "/etc/passwd", "..", ".", "n0/../n1", "n0.png", "~", "$(touch ran)", "n0\0", "a" * 5000,
          "{0.__class__}", "%s%n", "\u202egnp.0n", "\ud7ff\U0001f408", "a,b,,", ",", "\x1b[2J", "n0\tn1", "&lt;", "dog"]
JUNK = [None, True, -1, 0, 10 ** 30, float("nan"), "", "x", "../../x", b"x", [], {}, [1, [2]], {"a": 1},
        torch.zeros(2), torch.zeros(0), torch.eye(2).to_sparse(), torch.full((3,), torch.nan),
        torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(10 ** 13), torch.zeros(3, device="meta")]
WORDS = ["", "nan", "inf", "-inf", "-1", "0", "1", "1e-30", "1e30", "2.5", "x", "../../x", "/", "9" * 30, "\u0663"]
NUMBERS = ["--steps", "--lr", "--crop", "--k-end", "--temperature", "--sgd-weight", "--sam-weight", "--seed",
           "--workers", "--batch-size", "--save-every", "--stride", "--frozen-blocks", "--body", "--clip", "--dataset",
           "--data-root", "--body-weights", "--head", "--device", "--precision", "--k-schedule"]

watched = {"on": False, "inside": "", "seen": []}


def watch(event, args):
    """Python's own audit events: programs started, files opened to be written outside the case's folder."""
    if not watched["on"]:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        watched["seen"].append((event, str(args)[:200]))
    wrote = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if wrote or event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove"):
        path = args[0] if isinstance(args[0], (str, bytes, Path)) else ""
        path = os.path.realpath(os.fsdecode(path)) if path else ""
        if path and not path.startswith((watched["inside"], os.path.realpath(clip.CACHE), "/dev/null")):
            watched["seen"].append((event, path))


sys.addaudithook(watch)


class Evil:
    """Writes a file where it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def damage(rng, path, flag):
    """Any file: cut, flipped, replaced by another kind of thing."""
    good = path.read_bytes()

    def put(content):
        path.write_bytes(content)

    def become(make):
        path.unlink()
        make()

    def flip():
        content = bytearray(good)
        for _ in range(rng.choice((1, 1, 3, 20, 200))):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        put(bytes(content))

    def picture():
        size = rng.choice(((1, 1), (1, 3000), (3000, 1), (64, 63), (64, 64), (7, 5)))
        mode = rng.choice(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK", "F"))
        form = rng.choice([f for f in ("PNG", "JPEG", "TIFF", "GIF", "BMP", "EPS", "PDF", "ICO", "WEBP")])
        try:
            Image.new(mode, size, rng.choice((0, 1, 2, 77, 254, 255)) if len(mode) == 1 else 0).save(path, form)
        except (OSError, ValueError, KeyError):  # that format has no such mode
            put(b"GIF89a" + good[6:])

    def archive():
        with zipfile.ZipFile(path, "w", rng.choice((0, 8))) as file:
            for name in rng.sample(("x/data.pkl", "x/constants.pkl", "x/version", "x/byteorder", "../../../ran"), 4):
                file.writestr(name, rng.choice((pickle.dumps(Evil(flag), 2), b"3\n", b"", bytes(10 ** 6))))

    rng.choice((
        lambda: put(good[:rng.randrange(len(good))]), lambda: put(good[:-rng.randint(1, 40)]), flip, flip, flip,
        lambda: put(rng.randbytes(rng.randint(1, 5000))), lambda: put(b""), lambda: put(bytes(5000)),
        lambda: put(good[:20] + rng.randbytes(300)), lambda: put(good + good), lambda: put(good[len(good) // 2:]),
        lambda: put(rng.choice((b"%!PS-Adobe-3.0 EPSF-3.0\n(ran) run", b"<svg/>", b"\x7fELF", b"\xff\xfeh\0"))),
        lambda: put(pickle.dumps(Evil(flag))), lambda: torch.save({"a": Evil(flag)}, path), archive, picture, picture,
        lambda: become(path.mkdir), lambda: become(lambda: os.mkfifo(path)),
        lambda: become(lambda: path.symlink_to(rng.choice(("/etc/passwd", path.name, "/dev/zero", "/", "nowhere")))),
    ))()


def lines(rng, path, _):
    """Lists of names: path tricks, foreign and repeated lines, too many, none."""
    content = path.read_text().splitlines()
    for _ in range(rng.randint(1, 4)):
        content.insert(rng.randrange(len(content) + 1), rng.choice(TRICKS))
    rng.choice((lambda: content.extend(content), lambda: content.extend(map(str, range(300))), content.sort,
                content.clear, lambda: content.pop(0), lambda: None, lambda: None, lambda: None))()
    path.write_bytes(rng.choice((b"", b"", b"", b"\xef\xbb\xbf")) + "\n".join(content).encode("utf-8", "surrogatepass"))


def values(rng, path, flag):
    """A checkpoint or a CLIP file that loads, with something else in it."""
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


def try_case(kind, seed, own, run, tiny, folder, monkeypatch):  # noqa: F811
    """Damages one thing, runs a command on it -> its last words, '' where it ended as usual."""
    rng, flag = random.Random(f"{kind}{seed}"), folder / "ran"
    torch.manual_seed(seed)
    np.random.seed(seed)
    data = shutil.copytree(own, folder / "data")
    out = shutil.copytree(run, folder / "out")
    tiny = shutil.copy(tiny, folder / "clip.pt")
    (folder / "cwd").mkdir()
    monkeypatch.chdir(folder / "cwd")
    name = f"n{rng.randrange(10)}"
    path = {"image": next((data / "images").glob(name + ".*")), "mask": data / "masks" / f"{name}.png",
            "classes": data / "classes.txt", "unseen": data / "unseen.txt",
            "split": data / rng.choice(("train.txt", "val.txt")), "checkpoint": out / "last.pt", "clip": tiny,
            "log": out / "log.jsonl", "flags": None}[kind]
    flags = ["--dataset", data, *FLAGS, "--clip", tiny, "--steps", 1, "--out-dir", out]
    if kind == "flags":
        for flag_name in rng.sample(NUMBERS, rng.randint(1, 2)):
            flags += [f"{flag_name}={rng.choice(WORDS)}"]
    elif kind in ("classes", "unseen", "split") and rng.random() < 0.6:
        lines(rng, path, flag)
    elif kind in ("checkpoint", "clip") and rng.random() < 0.6:
        values(rng, path, flag)
    else:
        damage(rng, path, flag)
    module, arguments = train, flags
    if kind in ("checkpoint", "log") and rng.random() < 0.5:
        arguments = [*flags, "--steps", 4, "--resume"]
    elif kind == "checkpoint" or kind in ("image", "mask", "classes", "unseen", "split") and rng.random() < 0.3:
        module, arguments = evaluate, ["--run", out, "--dataset", data, "--device", "cpu"]
    if kind in ("checkpoint", "log", "clip"):  # the run's own paths
        arguments = ["--clip", tiny, *arguments] if module is train else arguments
    watched.update(on=True, inside=str(folder), seen=[])

    def hang(*_):
        raise TimeoutError(f"{kind} {seed} hangs")

    former = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        status, text, words = run_inside(module, *arguments)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        watched["on"] = False
    assert not watched["seen"], (arguments, watched["seen"])
    assert not flag.exists() and not list(folder.parent.glob("ran*")) and not (folder / "cwd" / "ran").exists()
    assert {p.name for p in folder.iterdir()} == {"data", "out", "clip.pt", "cwd"}, list(folder.iterdir())
    if status and words == "2":  # argparse
        assert ": error: " in text, text
        return text
    if status:
        assert words.startswith("error: ") and "\n" not in words and len(words) < 2000, words
    return words


@pytest.mark.parametrize("kind, seed", REGRESSIONS)
def test_once_failed(kind, seed, own, run, tiny_clip_file, tmp_path, monkeypatch):  # noqa: F811
    try_case(kind, seed, own, run, tiny_clip_file, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, seed, own, run, tiny_clip_file, tmp_path, monkeypatch):  # noqa: F811
    try_case(kind, seed, own, run, tiny_clip_file, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_fuzz_by_subprocess(seed, own, run, tiny_clip_file, tmp_path):  # noqa: F811
    rng = random.Random(seed)
    data, out = shutil.copytree(own, tmp_path / "data"), shutil.copytree(run, tmp_path / "out")
    damage(rng, rng.choice((out / "last.pt", data / "masks/n8.png", data / "images/n8.jpg")), tmp_path / "ran")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--run", out, "--dataset", data, "--device", "cpu"],
                          capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert not (tmp_path / "ran").exists() and "Traceback" not in done.stderr
    assert done.returncode == 0 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1), done.stderr
