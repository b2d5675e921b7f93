"""Interrupted, resumed, fed with garbage: nothing is lost, nothing is run, and what is wrong is said in one line."""
import contextlib
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image

import data
import train
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
    """The log's lines, without the time they took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


@pytest.fixture(scope="module")
def flags(own, tiny_clip_file):
    return ["--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--precision", "bf16", "--steps", 6, "--save-every", 2]


@pytest.fixture(scope="module")
def whole(flags, tmp_path_factory):
    """A run of six steps."""
    out = tmp_path_factory.mktemp("whole")
    assert run_inside(train, *flags, "--out-dir", out)[0] == 0
    return out


@pytest.fixture(scope="module")
def stopped(flags, tmp_path_factory):
    """The same with a signal in the middle of step 3: it saved at steps 2 and 4."""
    out, admit, handler = tmp_path_factory.mktemp("stopped"), command.Watch.admit, signal.getsignal(signal.SIGTERM)

    def interrupt(self, step, *more):
        for _ in range(2 * (step == 3)):  # launchers repeat it
            os.kill(os.getpid(), signal.SIGTERM)
        admit(self, step, *more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command.Watch, "admit", interrupt)
        status, text, _ = run_inside(train, *flags, "--out-dir", out)
    assert status == 0 and "stopped after step 3" in text and "--resume goes on" in text
    assert signal.getsignal(signal.SIGTERM) == handler
    return out


@pytest.fixture
def out(stopped, tmp_path):
    return shutil.copytree(stopped, tmp_path / "out")


# ---------------------------------------------------------------- writing


@pytest.mark.parametrize("how", ["full disk", "no links"])
def test_a_save_that_fails_leaves_the_last_and_the_former_checkpoint(how, out, flags, monkeypatch):
    def none(*_):
        raise OSError("Operation not permitted")

    before, (soft, hard) = {p.name: p.read_bytes() for p in out.glob("*.pt")}, resource.getrlimit(resource.RLIMIT_FSIZE)
    assert load(out / "last.pt")["step"] == 4 and load(out / "former.pt")["step"] == 2
    broken = SimpleNamespace(trained_state=lambda: {"weight": torch.tensor(torch.inf)})
    with pytest.raises(CheckpointError, match="weight is not finite before step 5: not saved"):
        checkpoint.save(out, broken, None, 5, torch.empty(0, 3), {})
    if how == "full disk":  # no file may become larger than half a checkpoint
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pt"]) // 2, hard))
    else:  # neither hard links nor room for a copy
        monkeypatch.setattr(os, "link", none)
        monkeypatch.setattr(shutil, "copyfile", none)
    words = run_inside(train, *flags, "--out-dir", out, "--resume")[2]
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert re.fullmatch(r"error: step 6 could not be saved[^\n]*is the disk full\?[^\n]*", words), words
    assert {p.name: p.read_bytes() for p in out.glob("*.pt")} == before and not list(out.glob(".*"))


# ---------------------------------------------------------------- reading


def refused(out, words):
    with pytest.raises(CheckpointError, match=f"^[^\n]*{words}[^\n]*$"):
        checkpoint.read_checkpoint(out / "last.pt")


def test_damaged_and_hostile_files_are_named_and_the_former_offered(out):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {out}/ran",)

    def saved(value, **how):
        torch.save(value, file := io.BytesIO(), **how)
        return file.getvalue()

    good, bomb = (out / "last.pt").read_bytes(), io.BytesIO()
    flipped = bytearray(good)
    flipped[good.index(load(out / "last.pt")["bank"].numpy().tobytes()[:16])] ^= 1  # one bit: only a checksum can tell
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data/0", bytes(10 ** 7))
    for bad, words in (
            (good[:len(good) // 2], "is truncated"), (flipped, "is truncated or damaged.*record"), (b"", "is no"),
            (bomb.getvalue(), "unpacks to ten times"), (b"hello", "is no checkpoint"), (pickle.dumps(Evil()), "is no"),
            (saved({"format": checkpoint.FORMAT, "model": {"a": Evil()}, "config": {}}), "is truncated"),
            (saved({"model": Evil()}, _use_new_zipfile_serialization=False), "is no checkpoint")):
        (out / "last.pt").write_bytes(bad)
        refused(out, f"{out}/last.pt .*{words}.*{out}/former.pt of step 2, is whole: rename it to last.pt.*")
    (out / "former.pt").unlink()
    refused(out, r"last.pt is no checkpoint of train.py \([^;]*\)")
    assert not (out / "ran").exists()


@pytest.mark.parametrize("key, value", [
    ("clip", 3), ("body", ["small"]), ("frozen_blocks", "1"), ("temperature", "1"), ("head", None), ("templates", [3]),
    ("templates", []), ("classes", [1, 2]), ("unseen", [28]), ("unseen", ["cat"]), ("crop", torch.zeros(2)),
    ("test", {}), ("test", {"short_side": 64, "window": 0, "stride": 4}), ("extra", {1, 2}), ("step", -1),
    ("step", "4"), ("bank", torch.full((2, 3), torch.nan)), ("model", {"weight": torch.zeros(1).expand(10 ** 12)}),
    ("model", {3: torch.zeros(2)}), ("format", 1)])
def test_a_checkpoint_with_foreign_values_is_refused(key, value, stopped, tmp_path):
    saved = load(stopped / "last.pt")
    (saved if key in saved else saved["config"])[key] = value
    torch.save(saved, tmp_path / "last.pt")
    words = {"format": "was written by an older version of this code", "model": "is .*ArchiveError"}
    refused(tmp_path, "last.pt " + words.get(key, "is (truncated or damaged, or )?no checkpoint"))


def test_the_newest_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run under"):
        checkpoint.newest_run(tmp_path)
    for i, name in enumerate("bca"):
        checkpoint.atomic(tmp_path / name / "last.pt", lambda path: path.touch())
        os.utime(tmp_path / name / "last.pt", (i, i))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a/last.pt"


# ---------------------------------------------------------------- beginning and resuming


def test_resume_is_exact_says_what_may_change_and_refuses_the_rest(out, flags, own, whole):
    def resume(*more):
        status, text, words = run_inside(train, *flags, "--out-dir", out, "--resume", *more)
        return text if status == 0 else words

    saved, before = load(out / "last.pt"), {path.name: path.read_bytes() for path in out.iterdir()}
    assert "last.pt cannot be resumed with other settings: seed was 0, is 1. Use" in resume("--seed", 1)
    moments = saved["optimizer"]["state"]
    for wrong in ({"bank": torch.zeros(2, 4)}, {"optimizer": {"state": moments, "param_groups": []}},
                  {"optimizer": saved["optimizer"] | {"state": {0: moments[0] | {"exp_avg": torch.zeros(3)}}}}):
        torch.save(saved | wrong, out / "last.pt")
        assert "its optimiser or bank is not of this model" in resume()
    (out / "last.pt").write_bytes(before["last.pt"])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before  # a refused run has touched nothing

    other = shutil.copytree(out, out.parent / "other")
    with open(out / "log.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # a step that is run again, and one torn by a full disk
    assert "resume  continues at step 4\ndata " in resume() and log(out) == log(whole)
    assert same(load(out / "last.pt"), load(whole / "last.pt"))
    torch.save(saved | {"processes": 3}, other / "last.pt")
    text = resume("--out-dir", other, "--data-root", own, "--precision", "fp32")
    assert re.findall("resume  allowed: (.*)", text) == [
        f"data_root was None, is {str(own)[:60]}", "precision was bf16, is fp32",
        "3 processes before, 1 now: the same batches, other rounding"]


def test_a_new_run_puts_the_run_before_aside_and_says_so(out, flags, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    good = (out / "last.pt").read_bytes()
    for name in ("metrics.json", ".partial.1.last.pt"):
        (out / name).write_text("of the run before")
    monkeypatch.setattr(checkpoint, "save", killed)
    _, text, words = run_inside(train, *flags, "--seed", 1, "--out-dir", out)
    assert words == "error: interrupted"
    assert f"{out}/last.pt of the previous run is now former.pt, until this run's second save\n" in text
    assert {p.name for p in out.iterdir()} == {"former.pt", "config.json", "log.jsonl", "data.png"}
    assert json.loads((out / "config.json").read_text())["seed"] == 1 and len(log(out)) == 1
    refused(out, f"no {out}/last.pt: .* before its first save. {out}/former.pt of step 4 is of the previous run: "
                 "rename it to last.pt")
    assert (out / "former.pt").read_bytes() == good


# ---------------------------------------------------------------- steps that are not finite, signals, errors


@pytest.mark.parametrize("at, late, what", [(0, False, "loss_sam"), (2, True, "gradient")])
def test_a_step_that_is_not_finite_leaves_nothing(at, late, what, flags, whole, tmp_path, monkeypatch):
    """late: as on a GPU, where nobody looks at each step; fused AdamW passes over the bad one and all after it."""
    admit = command.Watch.admit

    def poison(self, step, parts, norm):
        self.at_once = not late
        parts = parts | {"gradient": norm}
        parts[what] = parts[what] * (torch.nan if step == at else 1)
        admit(self, step, parts, parts.pop("gradient"))

    monkeypatch.setattr(command.Watch, "admit", poison)
    status, _, words = run_inside(train, *flags, "--out-dir", tmp_path)
    assert status == 1 and re.fullmatch(rf"error: step {at} is not finite: loss [\d.]+, [^\n]*{what} nan[^\n]*", words)
    assert re.findall(r"(\d)(?=\.jpg|\.png)", words) == [f"{i}" for _, i in data.Steps(8, 6, 0, 6).batch(at)]
    monkeypatch.undo()
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == at and len(saved["bank"]) == 6 * at
    assert run_inside(train, *flags, "--out-dir", tmp_path, "--resume")[0] == 0
    assert same(load(tmp_path / "last.pt"), load(whole / "last.pt"))


def test_the_rescue_itself_may_fail():
    def rescue(*_):
        raise UserError("the disk is full")

    watch = command.Watch(None, CPU, rescue)
    with pytest.raises(UserError, match="step 3 is not finite: loss nan, gradient 1; the disk is full; go on with"):
        watch.admit(3, {"loss": torch.tensor(torch.nan)}, torch.tensor(1.0))


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


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "try fewer --workers"),
    (OSError(28, "No space left on device", "runs/x/log.jsonl"), "No space left on device: 'runs/x/log.jsonl'"),
    (RuntimeError("a bug"), None)])
def test_what_users_can_mend_is_one_line(error, words):
    def main(_):
        raise error

    with pytest.raises(SystemExit if words else RuntimeError) as end:  # a bug keeps its traceback
        command.run_command(main, lambda: None)
    assert not words or words in end.value.code and "\n" not in end.value.code


# ---------------------------------------------------------------- pictures


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


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (3000, 2), (2400, 1200)])
def test_pictures_of_any_size_with_names_in_any_script(size):
    names = ["café", "猫", "", "x" * 200, *(f"thing {i}" for i in range(100))]
    labels, image = torch.randint(0, 120, size, dtype=torch.uint8), torch.zeros(3, *size, dtype=torch.uint8)
    drawn = pictures.overlay(image, labels, names)
    assert 14 <= drawn.width <= 4000 and drawn.height >= 20
    assert pictures.sheet([[image, pictures.coloured(labels)]] * 2, ("a", "b"), dict(enumerate(names))).height < 3000
    assert pictures.texts(dict(enumerate(names[:3]))) == {0: "cafe", 1: "class 1", 2: "class 2"}


def test_colours_differ():
    gaps = np.linalg.norm(pictures.COLOURS[:20, None] - pictures.COLOURS[:20].astype(float), axis=-1)
    assert (gaps + 999 * np.eye(20)).min() > 64 and len(np.unique(pictures.COLOURS, axis=0)) == 256


@pytest.mark.parametrize("panels, lines", [
    (0, []), (3, [{"step": 0, "loss": 2.0, "loss_seg": 2.0, "loss_sgd": 0.0, "lr": 1e-4, "k": 9.5}]),
    (3, [{"step": step, "loss": 1.0, "loss_seg": 1.0, "lr": 1e-3, "k": 1} for step in (0, 20)]),
    (2, [{"step": 0, "loss": 1.0, "lr": 0.1}, {"step": 20, "loss": float("nan"), "lr": float("inf")}]),
    (4, [{"step": 0, "loss": 90.0, "lr": 0.1, "k": 4}, {"step": 80000, "loss": 1e-4, "lr": 0.0, "k": 4},
         {"step": 80000, "mIoU_seen": 50.0, "mIoU_unseen": None, "hIoU": None, "seconds": 4}]),
    (1, [{"step": step, "k": 256 - 230 * step / 100} for step in range(101)])])
def test_curves_of_any_log_go_where_the_values_are(panels, lines, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.curves(tmp_path / "log.jsonl")
    assert drawn.size == (1120, max(300 * -(-panels // 2), 1))
    if panels == 1:  # k falls from 256 to 26 in a straight line: its red line, read back from the pixels
        red = abs(np.asarray(drawn).astype(int)[44:262, :530] - np.array(pictures.LINES[0])).sum(-1) < 30
        rows, columns = np.nonzero(red)
        slope, start = np.polyfit(columns, rows, 1)
        assert slope == pytest.approx(224 * 230 / 300 / 476, rel=0.02)  # axis from 0 to 300 over 224 × 476 pixels
        assert abs(rows - (slope * columns + start)).max() < 3
