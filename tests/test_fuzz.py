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
from test_support import FLAGS, ROOT, load, own  # noqa: F401

import clip
import evaluate
import train

pytestmark = pytest.mark.slow
KINDS = ("image", "mask", "classes", "unseen", "split", "checkpoint", "clip", "log", "flags")
SEEDS = int(os.environ.get("FUZZ_SEEDS", 40))  # of each kind
TRICKS = ["../../etc/passwd", "/etc/passwd", "..", ".", "n0/../n1", "n0.png", "~", "$(touch ran)", "n0\0", "a" * 5000,
          "{0.__class__}", "%s%n", "\u202egnp.0n", "\ud7ff\U0001f408", "a,b,,", ",", "\x1b[2J", "n0\tn1", "&lt;", "dog"]
JUNK = [None, True, -1, 0, 10 ** 30, float("nan"), "", "x", "../../x", b"x", [], {}, [1, [2]], {"a": 1},
        torch.zeros(2), torch.zeros(0), torch.eye(2).to_sparse(), torch.full((3,), torch.nan),
        torch.zeros(2, dtype=torch.complex64), torch.zeros(1).expand(10 ** 13), torch.zeros(3, device="meta")]
WORDS = ["", "nan", "inf", "-inf", "-1", "0", "1", "1e-30", "1e30", "2.5", "x", "../../x", "/", "9" * 30, "\u0663"]
FLAG_NAMES = ["--steps", "--lr", "--crop", "--k-end", "--temperature", "--sgd-weight", "--sam-weight", "--seed",
              "--workers", "--batch-size", "--save-every", "--frozen-blocks", "--body", "--clip",
              "--dataset", "--data-root", "--body-weights", "--head", "--device", "--precision"]

watched = {"on": False, "inside": "", "seen": []}


def watch(event, args):
    """Python's own audit events: programs started, files opened to be written outside the case's folder."""
    if not watched["on"]:
        return
    if event in ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "socket.connect"):
        watched["seen"].append((event, str(args)[:200]))
    wrote = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
    if wrote or event in ("os.mkdir", "os.rename", "os.link", "os.symlink", "os.remove"):
        path = os.path.realpath(os.fsdecode(args[0])) if isinstance(args[0], (str, bytes, Path)) and args[0] else ""
        if path and not path.startswith((watched["inside"], str(getattr(clip, "CACHE", "/dev/null")), "/dev/null")):
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
    good, put = path.read_bytes(), path.write_bytes

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
        form = rng.choice(("PNG", "JPEG", "TIFF", "GIF", "BMP", "EPS", "PDF", "ICO", "WEBP"))
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


@pytest.fixture(scope="module")
def run(own, tiny_clip_file, tmp_path_factory):  # noqa: F811
    """A run of four steps that saved every two."""
    out = tmp_path_factory.mktemp("run") / "out"
    status, text, words = run_inside(train, "--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--steps", 4,
                                     "--save-every", 2, "--out-dir", out)
    assert status == 0, text + words
    return out


@pytest.mark.parametrize("seed", range(SEEDS))
@pytest.mark.parametrize("kind", KINDS)
def test_fuzz(kind, seed, own, run, tiny_clip_file, tmp_path, monkeypatch):  # noqa: F811
    """Damages one thing and runs a command on it."""
    rng, ran = random.Random(f"{kind}{seed}"), tmp_path / "ran"
    torch.manual_seed(seed)
    np.random.seed(seed)
    data, out = shutil.copytree(own, tmp_path / "data"), shutil.copytree(run, tmp_path / "out")
    tiny = shutil.copy(tiny_clip_file, tmp_path / "clip.pt")
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    name, lists = f"n{rng.randrange(10)}", ("classes", "unseen", "split")
    path = {"image": next((data / "images").glob(name + ".*")), "mask": data / "masks" / f"{name}.png",
            "classes": data / "classes.txt", "unseen": data / "unseen.txt",
            "split": data / rng.choice(("train.txt", "val.txt")), "checkpoint": out / "last.pt", "clip": tiny,
            "log": out / "log.jsonl", "flags": None}[kind]
    module, flags = train, ["--dataset", data, *FLAGS, "--clip", tiny, "--steps", 1, "--out-dir", out]
    if kind == "flags":
        flags += [f"{flag}={rng.choice(WORDS)}" for flag in rng.sample(FLAG_NAMES, rng.randint(1, 2))]
    elif kind in (*lists, "checkpoint", "clip") and rng.random() < 0.6:
        (lines if kind in lists else values)(rng, path, ran)
    else:
        damage(rng, path, ran)
    if kind in ("checkpoint", "log") and rng.random() < 0.5:
        flags += ["--steps", 4, "--resume", *(["--data-root", data] if rng.random() < 0.5 else [])]
    elif kind == "checkpoint" or kind in ("image", "mask", *lists) and rng.random() < 0.3:
        module, flags = evaluate, ["--run", out, "--dataset", data, "--device", "cpu"]

    def hang(*_):
        raise TimeoutError(f"{kind} {seed} hangs")

    watched.update(on=True, inside=str(tmp_path), seen=[])
    former = signal.signal(signal.SIGALRM, hang)
    signal.alarm(60)
    try:
        status, text, words = run_inside(module, *flags)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)
        watched["on"] = False
    assert not watched["seen"], (flags, watched["seen"])
    assert {p.name for p in tmp_path.iterdir()} == {"data", "out", "clip.pt", "cwd"}
    assert not list(tmp_path.parent.glob("ran*")) and not (tmp_path / "cwd" / "ran").exists()
    if status and words == "2":  # argparse
        assert ": error: " in text, text
    elif status:
        assert words.startswith("error: ") and "\n" not in words and len(words) < 2000, words


@pytest.mark.parametrize("seed", range(6))
def test_fuzz_by_subprocess(seed, own, run, tiny_clip_file, tmp_path):  # noqa: F811
    rng = random.Random(seed)
    data, out = shutil.copytree(own, tmp_path / "data"), shutil.copytree(run, tmp_path / "out")
    damage(rng, rng.choice((out / "last.pt", data / "masks/n8.png", data / "images/n8.jpg")), tmp_path / "ran")
    done = subprocess.run([sys.executable, ROOT / "evaluate.py", "--run", out, "--dataset", data, "--device", "cpu"],
                          capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert not (tmp_path / "ran").exists() and "Traceback" not in done.stderr
    assert done.returncode == 0 or (done.stderr.startswith("error: ") and done.stderr.count("\n") == 1), done.stderr
