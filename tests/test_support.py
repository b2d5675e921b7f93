"""Interrupted, resumed, fed with garbage: nothing is lost, nothing is run, and what is wrong is said in one line."""
import copy
import json
import os
import pickle
import re
import signal
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import run_inside
from PIL import EpsImagePlugin, Image

import data
import train
from sources import files
from support import UserError, archive, checkpoint, command, pictures
from support.checkpoint import CheckpointError

ROOT = Path(__file__).parent.parent
FLAGS = ["--body", "small", "--batch-size", "6", "--crop", "32", "--workers", "0", "--device", "cpu",
         "--precision", "fp32"]
CONFIG = {"clip": "a.pt", "clip_hash": "0", "dataset": "toy", "data_root": None, "body": "small", "head": "csh",
          "frozen_blocks": 1, "crop": 64, "temperature": None, "classes": ["dog", "cat"], "unseen": [1],
          "templates": ["a {}"], "test": {"short_side": 64, "window": 64, "stride": 48}, "lr": 0.1, "seed": 0}


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data folder of eight images for training and two for test, three classes, one of them unseen."""
    root, rng = tmp_path_factory.mktemp("support") / "own", np.random.RandomState(0)
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    for i in range(10):
        mask = rng.randint(0, 3, (4, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        image = np.stack([mask * 80] * 3, 2) + rng.randint(0, 60, (64, 64, 3)).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / f"n{i}.{'png' if i % 2 else 'jpg'}")
        Image.fromarray(mask).save(root / "masks" / f"n{i}.png")
    (root / "train.txt").write_text("".join(f"n{i}\n" for i in range(8)))
    (root / "val.txt").write_text("n8\nn9\n")
    (root / "classes.txt").write_text("dog\ncat\ngrass, lawn\n")
    (root / "unseen.txt").write_text("cat\n")
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


class Model(nn.Linear):
    trained_state, load_trained_state = nn.Linear.state_dict, nn.Linear.load_state_dict


class Run:
    """A run of a small model, as train.py goes about it."""

    def __init__(self, out, again=False, **config):
        torch.manual_seed(0)
        self.model, self.out, self.config = Model(3, 2), out, CONFIG | config
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1, fused=True)
        self.step, self.bank, self.remarks = checkpoint.begin(out, self.model, self.optimizer, torch.empty(0, 3),
                                                              self.config, again)

    def train(self, steps):
        for _ in range(steps):
            x = torch.randn(4, 3, generator=torch.Generator().manual_seed(self.step))
            self.optimizer.zero_grad()
            self.model(x).square().sum().backward()
            self.optimizer.step()
            self.bank = torch.cat([x, self.bank])[:6]
            with open(self.out / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": self.step}) + "\n")
            self.step += 1
        return self

    def save(self):
        checkpoint.save(self.out, self.model, self.optimizer, self.step, self.bank, self.config)
        return self


@pytest.fixture
def out(tmp_path):
    """The folder of a run that saved at steps 2 and 4."""
    Run(tmp_path / "out").train(2).save().train(2).save()
    return tmp_path / "out"


# ---------------------------------------------------------------- writing


def test_atomic_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "new folder" / "a.txt"

    def fail(partial):
        partial.write_text("half")
        assert not path.exists() or path.read_text() == "old"
        raise OSError("disk full")

    for content in (None, "old"):
        if content:
            checkpoint.atomic(path, lambda partial: partial.write_text("old"))
        with pytest.raises(OSError):
            checkpoint.atomic(path, fail)
        assert [p.read_text() for p in path.parent.iterdir()] == [content] * bool(content)  # and nothing beside it


def test_former_is_the_save_before_last(out):
    assert load(out / "last.pt")["step"] == 4 and load(out / "former.pt")["step"] == 2
    assert (out / "former.pt").read_bytes() != (out / "last.pt").read_bytes()


@pytest.mark.parametrize("links", [True, False])
def test_a_disk_that_fills_leaves_the_former_checkpoint(links, out, monkeypatch):
    write, good = torch.save, (out / "last.pt").read_bytes()

    def full(value, path):
        write(value, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534\nmore")

    def none(*_):
        raise OSError("Operation not permitted")

    if links:
        monkeypatch.setattr(torch, "save", full)
    else:  # neither hard links nor room for a copy
        monkeypatch.setattr(os, "link", none)
        monkeypatch.setattr(checkpoint.shutil, "copyfile", none)
    with pytest.raises(CheckpointError, match=r"^step 5 could not be saved[^\n]*is the disk full\?[^\n]*$"):
        Run(out, again=True).train(1).save()
    assert (out / "last.pt").read_bytes() == good and not list(out.glob(".*"))


def test_no_checkpoint_of_values_that_are_not_finite(out):
    good, run = (out / "last.pt").read_bytes(), Run(out, again=True)
    run.model.weight.data[0, 0] = torch.inf
    with pytest.raises(CheckpointError, match="weight is not finite before step 4: not saved"):
        run.save()
    assert (out / "last.pt").read_bytes() == good


# ---------------------------------------------------------------- reading


def test_damage_is_named_and_the_former_offered(out):
    good = (out / "last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[good.index(load(out / "last.pt")["bank"].numpy().tobytes()[:16])] ^= 1  # one bit: only a checksum can tell
    for bad in (good[:len(good) // 2], bytes(flipped), b"", b"hello"):
        (out / "last.pt").write_bytes(bad)
        what = "is truncated or damaged" if bad[:2] == b"PK" else "is no checkpoint"
        with pytest.raises(CheckpointError) as error:
            checkpoint.read_checkpoint(out / "last.pt")
        words = str(error.value)
        assert words.startswith(f"{out}/last.pt {what}") and "\n" not in words
        assert words.endswith(f"{out}/former.pt of step 2, is whole: rename it to last.pt to go on from there")
        with pytest.raises(CheckpointError, match="last.pt is"):  # resuming says the same
            Run(out, again=True)
    (out / "former.pt").unlink()
    with pytest.raises(CheckpointError) as error:
        checkpoint.read_checkpoint(out / "last.pt")
    assert "rename" not in str(error.value)


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    path, ran = tmp_path / "last.pt", tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {ran}",)

    for make in (lambda: path.write_bytes(pickle.dumps(Evil())),
                 lambda: torch.save({"format": checkpoint.FORMAT, "model": {"a": Evil()}, "config": {}}, path),
                 lambda: torch.save({"model": Evil()}, path, _use_new_zipfile_serialization=False)):
        make()
        with pytest.raises(CheckpointError, match=r"^[^\n]*of train.py[^\n]*$"):
            checkpoint.read_checkpoint(path)
    assert not ran.exists()


@pytest.mark.parametrize("key, value", [
    ("clip", 3), ("body", ["small"]), ("frozen_blocks", "1"), ("temperature", "1"), ("head", None), ("templates", [3]),
    ("templates", []), ("classes", [1, 2]), ("unseen", [2]), ("unseen", ["cat"]), ("crop", torch.zeros(2)),
    ("test", {}), ("test", {"short_side": 64, "window": 0, "stride": 4}), ("extra", {1, 2}), ("step", -1),
    ("step", "4"), ("bank", torch.full((2, 3), torch.nan)), ("model", {"weight": torch.zeros(1).expand(10 ** 12)})])
def test_a_checkpoint_with_foreign_values_is_refused(key, value, out):
    saved = load(out / "last.pt")
    (saved if key in saved else saved["config"])[key] = value
    torch.save(saved, out / "last.pt")
    with pytest.raises(CheckpointError, match=r"^[^\n]*last.pt is (truncated or damaged, or )?no checkpoint[^\n]*$"):
        checkpoint.read_checkpoint(out / "last.pt")


def test_a_checkpoint_of_older_code_is_called_that(out):
    saved = load(out / "last.pt")
    del saved["format"]
    torch.save(saved | {"gamma": 0.5}, out / "other.pt")
    with pytest.raises(CheckpointError, match=r"^[^\n]*other.pt was written by an older version of this code[^\n]*$"):
        checkpoint.read_checkpoint(out / "other.pt")


def test_archives_that_claim_more_than_they_hold(tmp_path):
    path = tmp_path / "x.pt"
    state = {"a": torch.zeros(1).expand(10 ** 12)}  # 4 TB in four bytes
    torch.save(state, path)
    with pytest.raises(archive.ArchiveError, match="larger tensors than it holds"):
        archive.check_tensors(archive.read_archive(path), path)
    for bad in ({"a": torch.eye(2).to_sparse()}, {"a": 1}, {3: torch.zeros(2)}, {"a": torch.zeros(2, device="meta")}):
        with pytest.raises(archive.ArchiveError, match="no state dict"):
            archive.check_tensors(bad, path)
    with pytest.raises(archive.ArchiveError, match="a holds values that are not finite"):
        archive.check_tensors({"a": torch.tensor([torch.nan])}, path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as made:
        made.writestr("x/data/0", bytes(10 ** 7))
    with pytest.raises(archive.ArchiveError, match="unpacks to ten times"):
        archive.read_archive(path)


def test_the_newest_run(tmp_path):
    with pytest.raises(CheckpointError, match="no run under"):
        checkpoint.newest_run(tmp_path)
    for i, name in enumerate("bca"):
        Run(tmp_path / name).save()
        os.utime(tmp_path / name / "last.pt", (i, i))
    assert checkpoint.newest_run(tmp_path) == tmp_path / "a/last.pt"


def test_pillow_starts_no_program(tmp_path, monkeypatch):
    """PostScript under the name of a picture: Pillow would give it to Ghostscript, which can run programs."""
    path, started = tmp_path / "a.png", []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    for read in (files.read_image, files.read_values):
        with pytest.raises(UserError, match="a.png"):
            read(path)
    assert Image.open(path).format == "EPS" and not started


def test_pipes_and_folders_among_the_data_do_not_hang(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    (tmp_path / "c.png").touch()
    assert list(files.list_files(tmp_path, (".png",))) == ["c"]


# ---------------------------------------------------------------- beginning and resuming


def test_stopped_and_resumed_equals_uninterrupted(out, tmp_path):
    Run(tmp_path / "whole").train(6).save()
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # a step that is run again, and one torn by a full disk
    run = Run(out, again=True).train(2).save()
    assert run.remarks == ["resume  continues at step 4"]
    assert same(load(out / "last.pt"), load(tmp_path / "whole/last.pt"))
    assert (out / "log.jsonl").read_text() == (tmp_path / "whole/log.jsonl").read_text()


def test_resume_says_what_may_change_and_refuses_the_rest(out, monkeypatch):
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for changed, words in (({"seed": 1}, "seed was 0, is 1"), ({"steps": 9}, "steps was None, is 9"),
                           ({"test": {}}, "test was {'short_side': 64")):
        with pytest.raises(CheckpointError, match=f"cannot be resumed with other settings: {re.escape(words)}"):
            Run(out, again=True, **changed)
    saved = load(out / "last.pt")
    for wrong in ({"optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}},
                  {"bank": torch.zeros(2, 4)}):
        torch.save(saved | wrong, out / "last.pt")
        with pytest.raises(CheckpointError, match="its optimiser or bank is not of this model"):
            Run(out, again=True)
        torch.save(saved, out / "last.pt")
    assert {path.name for path in out.iterdir()} == before.keys()
    assert (out / "config.json").read_bytes() == before["config.json"]  # a refused run has touched nothing
    torch.save(saved | {"processes": 3}, out / "last.pt")
    assert Run(out, again=True, lr=0.2, data_root="there").remarks[1:] == [
        f"resume  allowed: {change}" for change in ("data_root was None, is there", "lr was 0.1, is 0.2",
                                                    "3 processes before, 1 now: the same batches, other rounding")]


def test_a_new_run_puts_the_run_before_aside_and_says_so(out):
    good = (out / "last.pt").read_bytes()
    for name in ("metrics.json", "curves.png", "data.png", ".partial.1.last.pt"):
        (out / name).write_text("of the run before")
    run = Run(out, seed=1)
    assert run.remarks == [f"{out}/last.pt of the previous run is now former.pt, until this run's second save"]
    assert {p.name for p in out.iterdir()} == {"former.pt", "config.json", "log.jsonl", "data.png"}
    assert json.loads((out / "config.json").read_text())["seed"] == 1 and not (out / "log.jsonl").read_text()

    for read in (lambda: checkpoint.read_checkpoint(out / "last.pt"), lambda: Run(out, again=True)):  # killed here
        with pytest.raises(CheckpointError, match=f"no {out}/last.pt: .* before its first save. {out}/former.pt of "
                                                  "step 4 is of the previous run: rename it to last.pt"):
            read()
    assert (out / "former.pt").read_bytes() == good
    os.rename(out / "former.pt", out / "last.pt")  # as it says
    assert Run(out, again=True).step == 4


# ---------------------------------------------------------------- a step that is not finite


def poisoned(tmp_path, late, at=2, look_at=4):
    """Steps 0 to 4, of which `at` has a part that is not finite -> the run, its error, and how it went before `at`."""
    run, kept = Run(tmp_path / "out"), None
    seen = []

    def rescue(bad, now):
        seen.append((bad, now))
        checkpoint.save(run.out, run.model, run.optimizer, bad, run.bank, run.config)
        return ["n1.png", "n2.png"]

    watch = command.Watch(run.optimizer, torch.device("cpu"), rescue)
    watch.at_once = not late
    with pytest.raises(UserError) as error:
        for step in range(look_at + 1):
            kept = copy.deepcopy((run.model.state_dict(), run.optimizer.state_dict())) if step == at else kept
            run.model(torch.randn(4, 3)).square().sum().backward()
            if step == at:
                run.model.weight.grad[0, 0] = torch.nan
            seg = torch.tensor(torch.inf if step == at else 1.0)
            watch.admit(step, {"loss": seg * 2, "seg": seg}, torch.tensor(3.0))
            run.optimizer.step()
            if step == look_at or step == 1:
                assert watch.look() == {"loss": 2, "seg": 1, "gradient": 3}
    assert seen == [(at, look_at if late else at)]
    return run, str(error.value), kept


@pytest.mark.parametrize("late", [False, True])
def test_a_step_that_is_not_finite_leaves_nothing(late, tmp_path):
    """late: as on a GPU, where nobody looks at each step; fused AdamW passes over the bad one and all after it."""
    run, words, kept = poisoned(tmp_path, late)
    assert words == ("step 2 is not finite: loss inf, seg inf, gradient 3; the state before it is saved: go on with "
                     "--resume and a lower --lr, or look at its images: n1.png, n2.png")
    saved = load(run.out / "last.pt")
    assert saved["step"] == 2 and same([saved["model"], saved["optimizer"]], list(kept))


def test_the_rescue_itself_may_fail(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("No space left on device")))
    _, words, _ = poisoned(tmp_path, late=False)
    assert re.fullmatch("step 2 is not finite: .*; step 2 could not be saved .*No space left.*", words)


@pytest.mark.parametrize("at", [0, 2])
def test_train_names_the_files_of_a_bad_step(at, own, tiny_clip_file, tmp_path, monkeypatch):
    flags = ["--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--steps", 4]
    admit = command.Watch.admit

    def poison(self, step, parts, norm):
        admit(self, step, parts | {"loss_sam": parts["loss_sam"] * (torch.nan if step == at else 1)}, norm)

    monkeypatch.setattr(command.Watch, "admit", poison)
    status, _, words = run_inside(train, *flags, "--out-dir", tmp_path / "out")
    assert status == 1 and "\n" not in words
    assert re.match(rf"error: step {at} is not finite: loss [\d.]+, loss_seg [\d.]+, .* loss_sam nan, gradient", words)
    assert re.findall(r"n\d(?=\.jpg|\.png)", words) == [f"n{i}" for _, i in data.Steps(8, 6, 0, 4).batch(at)]
    monkeypatch.undo()
    saved = load(tmp_path / "out/last.pt")
    assert saved["step"] == at and len(saved["bank"]) == 6 * at
    assert run_inside(train, *flags, "--out-dir", tmp_path / "out", "--resume")[0] == 0
    assert run_inside(train, *flags, "--out-dir", tmp_path / "whole")[0] == 0
    assert same(load(tmp_path / "out/last.pt"), load(tmp_path / "whole/last.pt"))


# ---------------------------------------------------------------- signals and errors


@pytest.mark.parametrize("before, after", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32")])
def test_a_signal_stops_train_and_resume_goes_on_exactly(before, after, own, tiny_clip_file, tmp_path, monkeypatch):
    """A signal in the middle of step 1; in another precision it goes on too, and says so."""
    first, second = [["--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--precision", precision, "--steps", 4]
                     for precision in (before, after)]
    assert run_inside(train, *first, "--out-dir", tmp_path / "whole")[0] == 0
    admit = command.Watch.admit

    def interrupt(self, step, *more):
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        admit(self, step, *more)

    monkeypatch.setattr(command.Watch, "admit", interrupt)
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    status, text, _ = run_inside(train, *first, "--out-dir", out)
    assert status == 0 and "stopped after step 1" in text and "--resume goes on" in text
    assert load(out / "last.pt")["step"] == 2 and signal.getsignal(signal.SIGTERM) == handler
    status, text, words = run_inside(train, *second, "--out-dir", out, "--resume")
    assert status == 0, words
    ours, whole = load(out / "last.pt"), load(tmp_path / "whole/last.pt")
    assert ours["step"] == 4 and same(ours, whole) == (before == after)
    assert ("resume  allowed: precision was" in text) == (before != after)


def test_processes_ask_each_other_every_ten_steps_and_at_the_same_ones(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "world_size", lambda: 2)
    monkeypatch.setattr(command.dist, "all_reduce", lambda count: asked.append(count.add_(1)))  # another one's signal
    signals = command.Signals(torch.device("cpu"))
    try:
        assert [step for step in range(25) if signals.heard(step)] == [0, 10, 20] and len(asked) == 3
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # from a terminal all processes get it, and the launcher repeats it
    finally:
        signals.restore()


def test_a_second_ctrl_c_ends_at_once():
    before, signals = signal.getsignal(signal.SIGINT), command.Signals(torch.device("cpu"))
    try:
        assert not signals.heard(1)
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.heard(1)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signals.restore()
    assert signal.getsignal(signal.SIGINT) == before


@pytest.mark.parametrize("error, words", [
    (UserError("no such thing"), "error: no such thing"),
    (UserError("Traceback (most recent call last):\n  File x\nsources.DataError: a.png is bad"), "error: a.png is bad"),
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "try fewer --workers"),
    (OSError(28, "No space left on device", "runs/x/log.jsonl"), "No space left on device: 'runs/x/log.jsonl'"),
    (KeyboardInterrupt(), "interrupted")])
def test_what_users_can_mend_is_one_line(error, words):
    def main(_):
        raise error
    with pytest.raises(SystemExit) as end:
        command.run_command(main, lambda: None)
    assert words in end.value.code and "\n" not in end.value.code
    with pytest.raises(RuntimeError, match="a bug"):  # but a bug keeps its traceback
        command.run_command(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), lambda: None)


# ---------------------------------------------------------------- pictures


@pytest.mark.parametrize("thin", [False, True])
def test_names_stand_on_their_regions_and_do_not_overlap(thin):
    labels = np.full((200, 300), 255, np.uint8)
    if thin:  # two stripes lower than a name: both in the middle, they would overlap
        labels[86:101], labels[101:116] = 0, 1
    else:
        labels[:, :150], labels[:90, 170:], labels[0, 160] = 0, 1, 2  # class 2 is too small for a name
    found = pictures.places(labels, {0: (60, 20), 1: (80, 20), 2: (60, 20)})
    assert [k for k, _, _ in found] == [0, 1]
    boxes = [(x - (60, 80)[k] / 2, x + (60, 80)[k] / 2, y - 10, y + 10) for k, x, y in found]
    assert all(labels[round(y), round(x)] == k for k, x, y in found)
    assert all(0 <= a and b <= 300 and 0 <= c and d <= 200 for a, b, c, d in boxes)
    (a, b, c, d), (e, f, g, h) = boxes
    assert b <= e or f <= a or d <= g or h <= c
    if not thin:
        assert abs(found[0][1] - 75) < 10 and abs(found[0][2] - 100) < 10  # in the middle, not at an edge


def test_an_overlay_keeps_the_picture_where_no_class_is():
    image = torch.randint(0, 256, (3, 384, 640), dtype=torch.uint8)
    labels = torch.full((384, 640), 255, dtype=torch.uint8)
    labels[:, 400:] = 3
    drawn = torch.from_numpy(np.array(pictures.overlay(image, labels, ["a", "b", "c", "dog"])))[:384].permute(2, 0, 1)
    assert torch.equal(drawn[:, :, :400], image[:, :, :400])
    corner = image[:, 340:, 600:] * (1 - pictures.PAINT) + pictures.coloured(labels)[:, 340:, 600:] * pictures.PAINT
    assert (drawn[:, 340:, 600:] - corner).abs().max() <= 1.5


@pytest.mark.parametrize("size", [(1, 1), (16, 16), (5, 300), (3000, 2), (2400, 1200)])
def test_pictures_of_any_size_with_names_in_any_script(size):
    names = ["café", "猫", "", "x" * 200, *(f"thing {i}" for i in range(100))]
    labels = torch.randint(0, 120, size, dtype=torch.uint8)
    image = torch.zeros(3, *size, dtype=torch.uint8)
    drawn = pictures.overlay(image, labels, names)
    assert 14 <= drawn.width <= 4000 and drawn.height >= 20
    assert pictures.sheet([[image, pictures.coloured(labels)]] * 2, ("a", "b"), dict(enumerate(names))).height < 3000
    assert pictures.texts(dict(enumerate(names[:3]))) == {0: "cafe", 1: "class 1", 2: "class 2"}


def test_a_mask_file_holds_the_indexes_and_shows_the_colours(tmp_path):
    labels = torch.arange(256, dtype=torch.uint8).reshape(16, 16)
    pictures.save_mask(labels, tmp_path / "a.png")
    image = Image.open(tmp_path / "a.png")
    assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
    assert np.array_equal(np.asarray(image.convert("RGB")), pictures.coloured(labels).permute(1, 2, 0))


def test_colours_differ():
    colours = pictures.COLOURS[:20].astype(float)
    gaps = np.linalg.norm(colours[:, None] - colours[None], axis=-1) + 999 * np.eye(20)
    assert gaps.min() > 64 and len({tuple(colour) for colour in pictures.COLOURS.tolist()}) == 256


LOGS = {"nothing": [], "one step": [{"step": 0, "loss": 2.0, "loss_seg": 2.0, "loss_sgd": 0.0, "lr": 1e-4, "k": 9.5}],
        "constant": [{"step": s, "loss": 1.0, "loss_seg": 1.0, "lr": 1e-3, "k": 1} for s in (0, 20)],
        "not finite": [{"step": 0, "loss": 1.0, "lr": 0.1}, {"step": 20, "loss": float("nan"), "lr": float("inf")}],
        "scored": [{"step": 0, "loss": 90.0, "lr": 0.1, "k": 4}, {"step": 80000, "loss": 1e-4, "lr": 0.0, "k": 4},
                   {"step": 80000, "mIoU_seen": 50.0, "mIoU_unseen": None, "hIoU": None, "seconds": 4}]}


@pytest.mark.parametrize("case", LOGS)
def test_curves_of_any_log(case, tmp_path):
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LOGS[case]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = pictures.curves(tmp_path / "log.jsonl")
    panels = {"nothing": 0, "one step": 3, "constant": 3, "not finite": 2, "scored": 4}[case]
    assert drawn.size == (1120, max(300 * -(-panels // 2), 1))


def test_a_curve_goes_where_its_values_are(tmp_path):
    """k falls from 256 to 26 in a straight line: the red line of its panel, read back from the pixels."""
    log = [{"step": s, "k": 256 - 230 * s / 100} for s in range(101)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    drawn = np.asarray(pictures.curves(tmp_path / "log.jsonl")).astype(int)[44:262, :530]
    rows, columns = np.nonzero(abs(drawn - np.array(pictures.LINES[0])).sum(-1) < 30)
    slope, start = np.polyfit(columns, rows, 1)
    assert slope == pytest.approx(224 * 230 / 300 / 476, rel=0.02)  # axis from 0 to 300 over 224 × 476 pixels
    assert abs(rows - (slope * columns + start)).max() < 3
