"""Interrupted, resumed, fed with garbage: nothing is lost, nothing is run, and what is wrong is said in one line."""
import contextlib
import io
import itertools
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from conftest import ROOT, run_inside
from PIL import Image, ImageFont

import bodies
import clip
import losses
import train
from sources import files
from support import UserError, checkpoint, command, pictures
from support.checkpoint import CheckpointError
from toy import world

CPU = torch.device("cpu")
FLAGS = ["--body", "small", "--batch-size", 6, "--crop", 32, "--workers", 0, "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data folder of eight images for training, four of them JPEG, and two for test."""
    root = tmp_path_factory.mktemp("data") / "own"
    world.write(root, train=8, val=2)
    for path in (root / "images").glob("*[02468].png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()
    return root


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit, whatever is nested in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def log(out):
    """The log's lines, without the time they took and the share of steps since the last line that were clipped."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("seconds", "clipped")} for line in lines]


@pytest.fixture(scope="module")
def flags(own, tiny_clip_file):
    return ["--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--precision", "bf16", "--steps", 6, "--save-every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of six steps."""
    out = tmp_path_factory.mktemp("whole")
    assert run_inside(train, *flags, "--out-dir", out)[0] == 0
    return out


def stop_in_step_3(out, *flags):
    """A run with a signal in the middle of step 3 -> exit status, what it printed."""
    seed_step = train.seed_step

    def interrupt(seed, step):
        for _ in range(2 * (step == 3)):  # launchers repeat it
            os.kill(os.getpid(), signal.SIGTERM)
        seed_step(seed, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "seed_step", interrupt)
        return run_inside(train, *flags, "--out-dir", out)[:2]


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The same stopped after step 3: it saved at steps 2 and 4."""
    out, handler = tmp_path_factory.mktemp("stopped"), signal.getsignal(signal.SIGTERM)
    status, text = stop_in_step_3(out, *flags)
    assert status == 0 and "stopped after step 3" in text and "--resume goes on" in text
    assert signal.getsignal(signal.SIGTERM) == handler
    return out


@pytest.fixture
def out(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "out")


@pytest.mark.parametrize("how, words", [("full", "File too large"), ("inf", "not finite")])
def test_a_save_that_fails_leaves_the_last_checkpoint_and_names_the_cause(how, words, out, flags, monkeypatch):
    before, (soft, hard) = (out / "last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full":  # no file may become larger than half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    else:
        monkeypatch.setattr(losses, "push", lambda bank, c: bank + torch.inf)
    found = run_inside(train, *flags, "--out-dir", out, "--resume")[2]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(rf"error: [^\n]*{words}[^\n]*", found) and "--resume" in found, found
    assert (out / "last.pt").read_bytes() == before


def refused(out, words):
    with pytest.raises(CheckpointError, match=f"^[^\n]*{words}[^\n]*$"):
        checkpoint.read_checkpoint(out / "last.pt")


def test_damaged_and_hostile_files_are_named(out):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {out}/ran",)

    def saved(value, **how):
        torch.save(value, file := io.BytesIO(), **how)
        return file.getvalue()

    good, flipped = (out / "last.pt").read_bytes(), bytearray((out / "last.pt").read_bytes())
    flipped[good.index(load(out / "last.pt")["bank"].numpy().tobytes()[:16])] ^= 1  # one bit: only a checksum can tell
    for bad, words in (
            (good[:len(good) // 2], "is truncated"), (flipped, "is damaged .record"), (b"", "it begins with|no format"),
            (b"hello", "no format"), (pickle.dumps(Evil()), "no format"), (saved([1]), "has format None, this code"),
            (saved({"format": 1}), "has format 1, this code reads"),
            (saved({"format": checkpoint.FORMAT, "model": {"a": Evil()}}), "wants the class posix.system"),
            (saved({"model": Evil()}, _use_new_zipfile_serialization=False), "no format")):
        (out / "last.pt").write_bytes(bad)
        refused(out, f"{out}/last.pt .*{words}.*")
    assert not (out / "ran").exists()


def test_the_newest_run(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "RUNS", tmp_path)
    with pytest.raises(CheckpointError, match="no run under"):
        checkpoint.find_checkpoint()
    for i, name in enumerate("bca"):
        checkpoint.atomic(tmp_path / name / "last.pt", lambda path: path.touch())
        os.utime(tmp_path / name / "last.pt", (i, i))
    assert checkpoint.find_checkpoint() == tmp_path / "a/last.pt"


@pytest.mark.parametrize("read", [checkpoint.read_checkpoint, clip.load, files.read_lines, files.read_image,
                                  files.read_values, lambda path: bodies.build_body("mobilenet-v2", path)])
def test_what_is_no_file_of_the_kind_is_named(read, tmp_path):
    """A pipe, for instance, would be waited for, and a device read without end."""
    path = tmp_path / "given.pt"
    for make in (lambda: None, path.mkdir, lambda: os.mkfifo(path), lambda: path.symlink_to(path.name),
                 lambda: path.symlink_to("/dev/zero"), lambda: path.write_bytes(bytes(5000))):
        make()
        with pytest.raises((UserError, OSError), match="given.pt") as error:
            read(path)
        assert "\n" not in str(error.value)
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--steps", "--lr", "--crop", "--k-end", "--select", "--sgd-weight", "--sam-weight",
                                  "--seed", "--workers", "--batch-size", "--save-every", "--frozen-blocks", "--body",
                                  "--clip", "--dataset", "--data-root", "--head", "--device", "--precision"])
def test_any_value_of_a_flag_gives_one_line_or_a_run(flag, flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for word in ("", "nan", "inf", "-inf", "-1", "0", "1e-30", "1e30", "2.5", "x", "../../x", "/", "9" * 30, "\u0663"):
        status, text, words = run_inside(train, *flags, "--steps", 1, f"{flag}={word}")
        assert not status or words.startswith("error: ") and "\n" not in words or ": error: " in text, (word, words)


def test_resume_is_exact_says_what_may_change_and_refuses_the_rest(out, flags, own, whole):
    def resume(*more):
        status, text, words = run_inside(train, *flags, "--out-dir", out, "--resume", *more)
        return text if status == 0 else words

    def files():
        return {path.name: path.read_bytes() for path in out.iterdir() if path.name != "config.json"}

    saved, before = load(out / "last.pt"), files()
    assert "cannot be resumed with other settings: seed was 0, is 1. Use" in resume("--seed", 1)
    assert "other settings: frozen_blocks was 1, is 2. Use" in resume("--frozen-blocks", 2)
    assert files() == before  # a refused run has touched nothing

    other = shutil.copytree(out, out.parent / "other")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # a step that is run again, and one torn by a full disk
    assert f"resume  continues {out} at step 4\n" in resume() and log(out) == log(whole)
    assert "at step 6 (its end: it is tested again)" in resume()
    assert same(load(out / "last.pt"), load(whole / "last.pt"))
    torch.save(saved | {"processes": 3}, other / "last.pt")
    text = resume("--out-dir", other, "--data-root", own, "--precision", "fp32")
    assert re.findall("resume  (.* was .*|.* before.*)", text) == [
        f"data_root was None, is {str(own)[:60]}", "precision was bf16, is fp32",
        "3 processes before, 1 now: the same batches, other rounding"]


def test_each_new_run_has_a_folder_of_its_own(flags, own, tmp_path, monkeypatch):
    """Folders are made, found again by their settings, never written over, and held by one training at a time."""
    def run(*more):
        status, text, words = run_inside(train, *flags, "--steps", 1, *more)
        return re.search("into (.*)/\n", text)[1] if status == 0 else words

    monkeypatch.chdir(tmp_path)
    assert [run(), run("--seed", 1), run()] == ["runs/own", "runs/own-2", "runs/own-3"]
    shutil.copytree("runs/own", "runs/own2")  # of another data set
    (tmp_path / "runs/own2/config.json").touch()
    assert run("--resume", "--seed", 1) == "runs/own-2" and run("--resume") == "runs/own-3"
    assert "none of the 3 runs runs/own… has these settings; the newest differs in seed was 0, is 7" in run(
        "--resume", "--seed", 7)
    assert "runs/own holds a run: --resume continues it" in run("--out-dir", "runs/own")
    shutil.copytree("runs/own", "moved", ignore=lambda *_: ["config.json"])
    assert "moved holds a run: --resume continues it" in run("--out-dir", "moved")
    assert "9 frozen blocks asked for" in run("--head", "linear", "--frozen-blocks", 9, "--out-dir", "none")
    assert not (tmp_path / "none").exists()  # a run that cannot start leaves no folder
    assert run("--out-dir", "x/y", "--resume") == run("--out-dir", "x/y", "--resume") == "x/y"  # the first starts it
    for text in ("{", "[]", "{}"):  # of a run that somebody edited
        (tmp_path / "runs/own-3/config.json").write_text(text)
        assert run("--resume") == "runs/own"
    assert "no run runs/own to resume" in (os.rename("runs", "elsewhere"), run("--resume"))[1]
    checkpoint.LOCKS.clear()  # as when these trainings' processes have ended
    holder = subprocess.Popen([sys.executable, "-c", "from support import checkpoint; from pathlib import Path; "
                               f"checkpoint.lock(Path({str(tmp_path / 'x/y')!r})); print('held', flush=True); input()"],
                              cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    before = (tmp_path / "x/y/last.pt").read_bytes()
    assert "x/y is in use by another training" in run("--out-dir", "x/y", "--resume")
    holder.kill()
    holder.wait()
    assert run("--out-dir", "x/y", "--resume") == "x/y" and before == (tmp_path / "x/y/last.pt").read_bytes()


@pytest.mark.parametrize("at, words", [(0, "Nothing was saved before: --resume starts at step 0"),
                                       (3, "--resume continues from step 2")])
def test_a_step_that_is_not_finite_is_not_saved(at, words, flags, whole, tmp_path, monkeypatch):
    """And what was saved before goes on as if nothing had been."""
    steps, sam_loss = itertools.count(), losses.sam_loss
    monkeypatch.setattr(losses, "sam_loss", lambda *args: sam_loss(*args) * (torch.nan if next(steps) == at else 1))
    status, _, said = run_inside(train, *flags, "--out-dir", tmp_path)
    assert status == 1 and re.fullmatch(rf"error: not finite at step {at}: loss nan, .*sam nan.*{words}.*", said), said
    monkeypatch.undo()
    assert (tmp_path / "last.pt").exists() == bool(at)
    assert run_inside(train, *flags, "--out-dir", tmp_path, "--resume")[0] == 0
    assert same(load(tmp_path / "last.pt"), load(whole / "last.pt")) and log(tmp_path) == log(whole)


def test_fp16_scales_the_loss_skips_steps_that_overflow_and_resumes(flags, tmp_path):
    """On a CPU. The first scale, 2^16, is far too large for gradients in fp16: those steps change nothing and are no
    error. The scale is saved."""
    fp16 = [*flags, "--precision", "fp16"]
    assert run_inside(train, *fp16, "--out-dir", tmp_path / "whole")[0] == 0
    stop_in_step_3(tmp_path / "half", *fp16)
    assert run_inside(train, *fp16, "--out-dir", tmp_path / "half", "--resume")[0] == 0
    saved = load(tmp_path / "whole/last.pt")
    assert same(saved, load(tmp_path / "half/last.pt")) and saved["scaler"]["scale"] < 2**16
    assert saved["bank"].isfinite().all() and all(x.isfinite().all() for x in saved["model"].values())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_ctrl_c_ends_one_process_at_once_but_several_ask_each_other(ranks, monkeypatch):
    before, asked = signal.getsignal(signal.SIGINT), []
    monkeypatch.setattr(command, "world_size", lambda: ranks)
    monkeypatch.setattr(command.dist, "all_reduce", lambda count: asked.append(count.item()))
    signals = command.Signals(CPU)
    try:
        assert not signals.heard(0)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) if ranks == 1 else contextlib.nullcontext():
            os.kill(os.getpid(), signal.SIGINT)  # from a terminal all processes get it, and the launcher repeats it
        heard = [step for step in range(1, 25) if signals.heard(step)]
    finally:
        signals.restore()
    assert (heard, asked) == (([10, 20], [0, 2, 2]) if ranks == 2 else (list(range(1, 25)), []))
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("environment, args, words", [
    ({"PYTHONIOENCODING": "cp1252"}, ["train.py", "--help"], "?_sgd"),  # cp1252 has no λ
    ({"WORLD_SIZE": "4"}, ["train.py"], "error: WORLD_SIZE is set in the environment, RANK is not: start with")])
def test_environments_that_people_have(environment, args, words, tmp_path):
    done = subprocess.run([sys.executable, ROOT / args[0], *args[1:]], env=os.environ | environment, cwd=tmp_path,
                          capture_output=True, text=True, encoding="latin-1")
    assert words in done.stdout + done.stderr and "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "try fewer --workers"),
    (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee …"),
     "out of memory. Tried to allocate 2.00 GiB. Try a smaller --batch-size, --crop or --body; at test, --short-side"),
    (OSError(28, "No space left on device", "runs/x/log.jsonl"), "No space left on device: 'runs/x/log.jsonl'"),
    (RuntimeError("a bug"), None)])
def test_what_users_can_mend_is_one_line(error, words):
    def main(_):
        raise error

    with pytest.raises(SystemExit if words else RuntimeError) as end:  # a bug keeps its traceback
        command.run_command(main, lambda: None)
    assert not words or words in end.value.code and "\n" not in end.value.code


@pytest.mark.parametrize("thin", [False, True])
def test_names_stand_on_their_regions_and_do_not_overlap(thin):
    labels = np.full((200, 300), 255, np.uint8)
    if thin:  # two stripes lower than a name: both in the middle, they would overlap
        labels[86:101], labels[101:116] = 0, 1
    else:
        labels[:, :150], labels[:90, 170:], labels[0, 160] = 0, 1, 2  # class 2 is too small for a name
    (k, x, y), (other, x2, y2) = pictures.places(labels, {0: (60, 20), 1: (80, 20), 2: (60, 20)})
    assert (k, other) == (0, 1) == (labels[round(y), round(x)], labels[round(y2), round(x2)])
    assert 30 <= x <= 270 and 40 <= x2 <= 260 and 10 <= min(y, y2) and max(y, y2) <= 190  # inside the picture
    assert abs(x - x2) >= 70 or abs(y - y2) >= 20
    assert thin or abs(x - 75) < 10 and abs(y - 100) < 10  # in the middle, not at an edge


def test_an_overlay_keeps_the_picture_where_no_class_is():
    image = torch.randint(0, 256, (3, 384, 640), dtype=torch.uint8)
    labels = torch.full((384, 640), 255, dtype=torch.uint8)
    labels[:, 400:] = 3
    drawn = torch.from_numpy(np.array(pictures.overlay(image, labels, ["a", "b", "c", "dog"])))[:384].permute(2, 0, 1)
    assert torch.equal(drawn[:, :, :400], image[:, :, :400])
    corner = image[:, 340:, 600:] * (1 - pictures.PAINT) + pictures.coloured(labels)[:, 340:, 600:] * pictures.PAINT
    assert (drawn[:, 340:, 600:] - corner).abs().max() <= 1.5


@pytest.mark.parametrize("size, old", [((1, 1), False), ((5, 300), True), ((3000, 2), True), ((2400, 1200), False)])
def test_pictures_of_any_size_with_names_in_any_script(size, old, monkeypatch):
    if old:  # Pillow before 10.1
        monkeypatch.setattr(ImageFont, "load_default", lambda: ImageFont.load_default_imagefont())
    names = ["café", "猫", "", "x" * 200, *(f"thing {i}" for i in range(100))]
    labels, image = torch.randint(0, 120, size, dtype=torch.uint8), torch.zeros(3, *size, dtype=torch.uint8)
    drawn = pictures.overlay(image, labels, names)
    assert 14 <= drawn.width <= 4000 and drawn.height >= 20
    assert pictures.sheet([[image, pictures.coloured(labels)]] * 2, ("a", "b"), dict(enumerate(names))).height < 3000
    assert pictures.texts(dict(enumerate(names[:3]))) == {0: "cafe", 1: "class 1", 2: "class 2"}


@pytest.mark.parametrize("lines", [
    [], [{"step": 0, "loss": 1.0, "lr": 0.1}, {"step": 20, "loss": float("nan"), "lr": float("inf")}],
    [{"step": 0, "loss": 90.0, "lr": 0.1, "k": 4}, {"step": 80000, "loss": 1e-4, "lr": 0.0, "k": 4},
     {"step": 80000, "mIoU_seen": 50.0, "mIoU_unseen": None, "hIoU": None, "seconds": 4}]])
def test_curves_of_any_log(lines, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pictures.curves(tmp_path / "log.jsonl").width == 1120


def test_a_curve_goes_where_the_values_are(tmp_path):
    """k falls from 256 to 26 in a straight line: its red line, read back from the pixels."""
    lines = [json.dumps({"step": step, "k": 256 - 230 * step / 100}) + "\n" for step in range(101)]
    (tmp_path / "log.jsonl").write_text("".join(lines))
    drawn = np.asarray(pictures.curves(tmp_path / "log.jsonl")).astype(int)[44:262, :530]
    rows, columns = np.nonzero(abs(drawn - np.array(pictures.LINES[0])).sum(-1) < 30)
    slope, start = np.polyfit(columns, rows, 1)
    assert slope == pytest.approx(224 * 230 / 300 / 476, rel=0.02)  # axis from 0 to 300 over 224 × 476 pixels
    assert abs(rows - (slope * columns + start)).max() < 3
