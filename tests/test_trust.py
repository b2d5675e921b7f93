"""Interrupted, resumed, fed with garbage: nothing is lost, nothing is run, and what is wrong is said in one line."""
import io
import os
import pickle
import re
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import EpsImagePlugin, Image

import archive
import bodies
from support import checkpoint
import clip
import data
import evaluate
from support import command as guard
import losses
import model as models
import sources
import train

ROOT = Path(__file__).parent.parent
FLAGS = ["--body", "small", "--batch-size", "6", "--crop", "32", "--workers", "0", "--device", "cpu",
         "--precision", "fp32"]


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A data folder of eight images for training and two for test, three classes, one of them unseen."""
    root, rng = tmp_path_factory.mktemp("trust") / "own", np.random.RandomState(0)
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


@pytest.fixture
def flags(own, tiny_clip_file):
    return ["--dataset", own, "--clip", tiny_clip_file, *FLAGS]


@pytest.fixture(scope="module")
def run(own, tiny_clip_file, tmp_path_factory):
    """A run of four steps that saved every two."""
    out = tmp_path_factory.mktemp("run") / "out"
    status, text, words = run_inside(train, "--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--steps", 4,
                                  "--save-every", 2, "--out-dir", out)
    assert status == 0, text + words
    return out


def load(path):
    return torch.load(path, weights_only=True)


def same(a, b):
    """Equal to the last bit, whatever is nested in it."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def copy(run, folder):
    folder.mkdir()
    for path in run.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


# ---------------------------------------------------------------- writing


def test_atomic_leaves_the_old_file_or_the_new_one(tmp_path):
    path = tmp_path / "a.txt"

    def fail(partial):
        partial.write_text("half")
        assert not path.exists() or path.read_text() == "old"
        raise OSError("disk full")

    for content in (None, "old"):
        if content:
            checkpoint.atomic(path, lambda partial: partial.write_text("old"))
        with pytest.raises(OSError):
            checkpoint.atomic(path, fail)
        assert [p.read_text() for p in tmp_path.iterdir()] == [content] * bool(content)  # and nothing beside it
    (tmp_path / ".partial.1.a.txt").write_text("of a process that was killed")
    checkpoint.clear(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    checkpoint.atomic(path, lambda partial: os.link(path, partial))
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"] and path.read_text() == "old"


def test_former_is_the_save_before_last(run, flags, tmp_path, monkeypatch):
    saved, write = [], torch.save
    monkeypatch.setattr(torch, "save", lambda value, path: (
        isinstance(value, dict) and saved.append(value["step"]), write(value, path)))  # text embeddings are no dict
    copy(run, tmp_path / "again")
    before = load(run / "last.pt")
    assert before["step"] == 4 and before["gamma"] is not None
    status, text, _ = run_inside(train, *flags, "--steps", 4, "--save-every", 3, "--out-dir", tmp_path / "again")
    assert status == 0 and "of the run before is now former.pt" in text
    assert saved == [3, 4, 4] and load(tmp_path / "again/former.pt")["gamma"] is None
    assert same(load(tmp_path / "again/last.pt")["model"], before["model"])  # however often one saves
    assert {p.name for p in (tmp_path / "again").iterdir()} == {
        "last.pt", "former.pt", "log.jsonl", "config.json", "metrics.json", "preview.png", "data.png", "curves.png"}


def test_a_disk_that_fills_leaves_the_former_checkpoint(run, flags, tmp_path, monkeypatch):
    out = copy(run, tmp_path / "out")
    write, good = torch.save, (out / "last.pt").read_bytes()

    def full(value, path):
        write(value, path)
        Path(path).write_bytes(Path(path).read_bytes()[:1000])
        raise RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534\nmore")

    monkeypatch.setattr(torch, "save", full)
    status, _, words = run_inside(train, *flags, "--steps", 4, "--resume", "--out-dir", out)
    assert status == 1 and re.fullmatch(r"error: step 4 could not be saved[^\n]*is the disk full\?[^\n]*", words)
    assert (out / "last.pt").read_bytes() == good and not list(out.glob(".*"))


# ---------------------------------------------------------------- reading


def test_damage_is_named_and_the_former_offered(run, flags, tmp_path):
    good = (run / "last.pt").read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1  # one bit of one weight: only the archive's checksum can tell
    for i, bad in enumerate((good[:len(good) // 2], bytes(flipped), b"", b"hello")):
        out = copy(run, tmp_path / str(i))
        (out / "last.pt").write_bytes(bad)
        what = "is truncated or damaged" if bad[:2] == b"PK" else "is no checkpoint"
        for words in (run_inside(train, *flags, "--steps", 4, "--resume", "--out-dir", out)[2],
                      run_inside(evaluate, "--run", out)[2]):
            assert words.startswith(f"error: {out}/last.pt {what}") and "\n" not in words
            assert words.endswith(f"{out}/former.pt of step 4, is whole: rename it to last.pt to go on from there")
            (out / "last.pt").rename(out / "away.pt")  # killed before its first save: former.pt is another run's
            assert "former.pt" not in run_inside(evaluate, "--run", out)[2]
            (out / "away.pt").rename(out / "last.pt")
        (out / "former.pt").write_bytes(bad)
        assert "former.pt" in run_inside(evaluate, "--run", out)[2]
        (out / "former.pt").unlink()
        assert "rename" not in run_inside(evaluate, "--run", out)[2]


def hostile(path, flag):
    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {flag}",)

    return {"plain": lambda: path.write_bytes(pickle.dumps(Evil())),
            "nested": lambda: torch.save({"model": {"a": Evil()}, "config": {}}, path),
            "legacy": lambda: torch.save({"model": Evil()}, path, _use_new_zipfile_serialization=False)}


def test_a_hostile_checkpoint_runs_nothing(tmp_path):
    for make in hostile(tmp_path / "last.pt", tmp_path / "ran").values():
        make()
        status, _, words = run_inside(evaluate, "--run", tmp_path)
        assert status == 1 and re.fullmatch(r"error: [^\n]*of train.py[^\n]*", words)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("key, value", [
    ("clip", 3), ("body", ["small"]), ("body", "../x"), ("frozen_blocks", "1"), ("attention", "x"),
    ("temperature", "1"), ("head", None), ("data_root", "../elsewhere"), ("clip_model", "x"), ("attention", 1),
    ("templates", [3]), ("templates", []), ("classes", [1, 2]), ("test", {}),
    ("test", {"sides": [32, 64], "window": 0, "stride": 4}), ("dataset", "../nowhere")])
def test_a_checkpoint_with_foreign_settings_writes_nothing(run, tmp_path, monkeypatch, key, value):
    saved = load(run / "last.pt")
    saved["config"][key] = value
    if key == "data_root":
        saved["config"]["dataset"] = "toy"
    (tmp_path / "run").mkdir()
    torch.save(saved, tmp_path / "run/last.pt")
    monkeypatch.chdir(tmp_path / "run")
    status, _, words = run_inside(evaluate, "--checkpoint", tmp_path / "run/last.pt")
    if key == "clip_model":
        assert status == 0
    else:
        assert status == 1 and re.fullmatch(r"error: [^\n]+", words), words
        assert not (tmp_path / "elsewhere").exists() and [p.name for p in Path().iterdir()] == ["last.pt"]


def test_archives_that_claim_more_than_they_hold(tmp_path, tiny_clip_file):
    state = load(tiny_clip_file)
    state["token_embedding.weight"] = torch.zeros(1, dtype=torch.half).expand(10 ** 12, 64)  # 128 TB in two bytes
    torch.save(state, tmp_path / "huge.pt")
    with pytest.raises(clip.CLIPError, match="larger tensors than it holds"):
        clip.load(tmp_path / "huge.pt")
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data/0", bytes(10 ** 7))
    with pytest.raises(clip.CLIPError, match="unpacks to ten times"):
        clip.load(tmp_path / "bomb.pt")


def test_a_storage_named_often_is_read_once(tmp_path):
    class Names(pickle.Pickler):
        def persistent_id(self, thing):
            return ("storage", torch.FloatStorage, "0", "cpu", 4) if thing == "the storage" else None

    with zipfile.ZipFile(tmp_path / "x.pt", "w") as made:
        text = io.BytesIO()
        Names(text).dump(["the storage"] * 1000)
        made.writestr("x/data.pkl", text.getvalue())
        made.writestr("x/data/0", torch.arange(4.).numpy().tobytes())
    with zipfile.ZipFile(tmp_path / "x.pt") as made:
        storages = archive.TorchScript(made, "x").load()
    assert len({storage.data_ptr() for storage in storages}) == 1 and storages[0].tolist() == [0, 1, 2, 3]


def test_pillow_starts_no_program(tmp_path, monkeypatch):
    """PostScript under the name of a picture: Pillow would give it to Ghostscript, which can run programs."""
    path, started = tmp_path / "a.png", []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    assert Image.open(path).format == "EPS"
    for read in (data.read_image, data.read_values):
        with pytest.raises(sources.DataError, match="a.png"):
            read(path)
    assert not started


def test_pipes_and_folders_among_the_data_do_not_hang(own, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert sources.open_dataset(str(own)) and not sources.list_files(tmp_path, (".png",))


# ---------------------------------------------------------------- resuming


def test_resume_says_which_settings_may_change(run, flags, own, tmp_path):
    out = copy(run, tmp_path / "out")
    base = [*flags, "--steps", 4, "--out-dir", out, "--resume"]
    for change, words in ((["--batch-size", 4], "batch_size was 6, is 4"), (["--steps", 9], "steps was 4, is 9"),
                          (["--seed", 1], "seed was 0, is 1"), (["--k-end", 0.3], "k_end was 0.1, is 0.3")):
        status, _, said = run_inside(train, *base, *change)
        assert status == 1 and words in said and "\n" not in said
    saved = load(out / "last.pt")
    torch.save({**saved, "processes": 3}, out / "last.pt")
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 4, "loss": 1}\n{"step": 5, "lo')  # later lines, and one torn by a full disk
    logged = (out / "log.jsonl").read_text().splitlines()[:-3]  # the scores are written again
    status, text, said = run_inside(train, *base, "--lr", 1e-5, "--data-root", own, "--save-every", 1)
    assert status == 0, said
    for words in ("lr was 0.0002, is 1e-05", f"data_root was None, is {own}", "3 processes before, 1 now"):
        assert f"resume  allowed: {words}" in text
    assert (out / "log.jsonl").read_text().splitlines()[:-1] == logged  # no step was left to do
    torch.save({**saved, "optimizer": {"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": []}}, out / "last.pt")
    assert "its optimiser, step or bank" in run_inside(train, *base)[2]


@pytest.mark.parametrize("before, after", [("fp32", "fp32"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "bf16")])
def test_stopped_and_resumed_equals_uninterrupted(before, after, flags, tmp_path, monkeypatch):
    """A signal in the middle of the second step; then --resume: the same tensors, optimiser and bank.

    In another precision it goes on too, and says so."""
    first, second = [[*flags, "--precision", precision, "--steps", 4] for precision in (before, after)]
    assert run_inside(train, *first, "--out-dir", tmp_path / "whole")[0] == 0
    sgd_loss, calls = losses.sgd_loss, []

    def interrupt(*args, **more):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)  # launchers repeat it
        return sgd_loss(*args, **more)

    monkeypatch.setattr(losses, "sgd_loss", interrupt)
    out, handler = tmp_path / "out", signal.getsignal(signal.SIGTERM)
    status, text, _ = run_inside(train, *first, "--out-dir", out)
    assert status == 0 and "stopped after step 1" in text and "--resume goes on" in text
    assert load(out / "last.pt")["step"] == 2 and signal.getsignal(signal.SIGTERM) == handler
    status, text, words = run_inside(train, *second, "--out-dir", out, "--resume")
    assert status == 0, words
    ours, whole = load(out / "last.pt"), load(tmp_path / "whole/last.pt")
    assert ours["step"] == 4 and same(ours, whole) == (before == after)
    assert ("resume  allowed: precision was" in text) == (before != after)


# ---------------------------------------------------------------- numbers


def test_a_loss_that_is_not_finite_stops_with_its_step_and_files(run, flags, tmp_path, monkeypatch):
    sam_loss, calls = losses.sam_loss, []

    def poison(*args):
        calls.append(1)
        return sam_loss(*args) * (torch.nan if len(calls) == 3 else 1)

    monkeypatch.setattr(losses, "sam_loss", poison)
    status, _, words = run_inside(train, *flags, "--steps", 4, "--out-dir", tmp_path)
    assert status == 1 and "\n" not in words
    assert re.match(r"error: step 2 is not finite: loss nan, seg [\d.]+, sgd [\d.]+, sam nan", words)
    names = [f"n{order[1]}." for order in list(data.Steps(8, 6, 0, 4))[2]]
    assert all(name in words for name in names) and len(re.findall(r"n\d\.(jpg|png)", words)) == 6
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 2 and same(saved["optimizer"]["state"][0]["step"], torch.tensor(2.0))
    monkeypatch.setattr(losses, "sam_loss", sam_loss)  # the state before the step is good: from it the run goes on
    assert run_inside(train, *flags, "--steps", 4, "--out-dir", tmp_path, "--resume")[0] == 0
    assert same(load(tmp_path / "last.pt")["model"], load(run / "last.pt")["model"])


def test_what_is_seen_late_leaves_nothing_of_the_bad_steps(run, flags, tmp_path, monkeypatch):
    """As on a GPU, where nobody looks at each step: bad from step 1 on, seen at step 3, saved as of step 1."""
    sam_loss, look, calls, looks = losses.sam_loss, guard.Finite.look, [], []

    def poison(*args):
        calls.append(1)
        return sam_loss(*args) * (torch.nan if len(calls) == 2 else 1)

    def late(self):
        looks.append(1)
        return look(self) if len(looks) == 4 else [0.0] * 4

    monkeypatch.setattr(losses, "sam_loss", poison)
    monkeypatch.setattr(guard.Finite, "look", late)
    status, _, words = run_inside(train, *flags, "--steps", 4, "--out-dir", tmp_path)
    assert status == 1 and words.startswith("error: step 1 is not finite")
    saved = load(tmp_path / "last.pt")
    assert saved["step"] == 1 and len(saved["bank"]) == 6
    monkeypatch.undo()
    assert run_inside(train, *flags, "--steps", 4, "--out-dir", tmp_path, "--resume")[0] == 0
    assert same(load(tmp_path / "last.pt")["model"], load(run / "last.pt")["model"])


def test_later_steps_change_nothing_until_somebody_looks():
    """What the loop relies on where it does not look at each step: AdamW(fused) with found_inf 1 is no step at all."""
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([p], fused=True)
    optimizer.found_inf = torch.zeros(())
    p.grad = torch.ones(3)
    optimizer.step()
    before = pickle.loads(pickle.dumps((p.data, optimizer.state_dict()["state"])))
    optimizer.found_inf, p.grad = torch.ones(()), torch.full((3,), torch.nan)
    optimizer.step()
    assert same([p.data, optimizer.state_dict()["state"]], list(before))


def test_no_checkpoint_of_values_that_are_not_finite(run, tiny_clip, tmp_path):
    out = copy(run, tmp_path / "out")
    net, good = models.build(tiny_clip), (out / "last.pt").read_bytes()
    net.body.fuse[0].weight.data[0, 0] = torch.inf
    with pytest.raises(bodies.ModelError, match="body.fuse.0.weight is no longer finite before step 7: not saved"):
        checkpoint.save(out, net, torch.optim.AdamW(net.parameters()), 7, torch.zeros(0, 128), None, {})
    assert (out / "last.pt").read_bytes() == good


@pytest.mark.parametrize("error, words", [
    (RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed."), "try fewer --workers"),
    (OSError(28, "No space left on device", "runs/x/log.jsonl"), "No space left on device: 'runs/x/log.jsonl'"),
    (KeyboardInterrupt(), "interrupted")])
def test_what_users_can_mend_is_one_line(error, words):
    def main(_):
        raise error
    with pytest.raises(SystemExit) as end:
        guard.run_command(main, lambda: None)
    assert words in end.value.code and "\n" not in end.value.code
    with pytest.raises(RuntimeError, match="a bug"):  # but a bug keeps its traceback
        guard.run_command(lambda _: (_ for _ in ()).throw(RuntimeError("a bug")), lambda: None)
