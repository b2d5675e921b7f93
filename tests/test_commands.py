"""The real command lines, as a user runs them, on a small world."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import run_inside
from PIL import Image

import evaluate
import inference
import train
from support.checkpoint import newest_run
from toy import world

ROOT = Path(__file__).parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SHORT = ["--steps", "8", "--batch-size", "6", "--workers", "0", "--device", "cpu", "--precision", "fp32"]


@pytest.fixture(scope="module")
def root(tmp_path_factory, tiny_clip_file):
    folder = tmp_path_factory.mktemp("commands")
    world.write(folder / "toy", train=20, val=5)
    return folder


def command(script, *args, ranks=0, ok=True):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    done = subprocess.run([sys.executable, *launcher, str(ROOT / script), *map(str, args)], cwd=ROOT, env=ENV,
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def run(root, tiny_clip_file):
    """One short run on the toy layout; the other tests look at what it left."""
    done = command("train.py", "--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT, "--out-dir", root / "run")
    return root / "run", done.stdout


def test_train_leaves_what_the_readme_says(run):
    out, text = run
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert {"step", "loss", "loss_seg", "loss_sgd", "loss_sam", "k", "lr", "seconds"} <= set(log[0])
    assert log[0]["k"] == 256 and log[-2]["k"] == 26 and log[-2]["step"] == 7
    weights = json.loads((out / "config.json").read_text()) | {"seg_weight": 1}
    parts = [weights[f"{part}_weight"] * log[0][f"loss_{part}"] for part in ("seg", "sgd", "sam")]
    assert log[0]["loss"] == pytest.approx(sum(parts), abs=1e-5)
    result = json.loads((out / "metrics.json").read_text())
    assert set(result) == {"gamma_0", "calibrated", "dataset", "images", "checkpoint", "unseen"}
    assert log[-1]["step"] == 8 and log[-1]["hIoU"] == result["gamma_0"]["hIoU"]
    assert set(result["gamma_0"]) == {"pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "IoU"}
    assert set(result["calibrated"]) == {"pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "IoU", "gamma"}
    assert list(result["gamma_0"]["IoU"]) == world.CLASSES and result["images"] == 5
    assert json.loads((out / "config.json").read_text())["frozen_blocks"] == 1
    assert Image.open(out / "preview.png").size[0] == 3 * 192
    assert {p.name for p in out.iterdir()} == {"last.pt", "former.pt", "log.jsonl", "metrics.json", "config.json",
                                             "preview.png", "data.png", "curves.png"}
    for name in world.CLASSES:
        assert re.search(rf"^{name} ( |\*)", text, re.M)
    assert "hIoU" in text and "eta" in text
    assert re.match("data .*20 training images, 5 test images\nsplit .*17 seen classes, 9 unseen: .*\nmode .*inductive"
                    ".*\nmodel .*small body, csh head: .* trained, .* frozen.*\nrun .*8 steps of 6 images on 1 × cpu, "
                    "fp32", text[text.index("data "):])


def test_checkpoint_is_small_plain_and_without_clip(run):
    saved = torch.load(run[0] / "last.pt", weights_only=True)
    assert not any("head.clip" in key or "visual" in key for key in saved["model"])
    assert any(key.startswith("head.adapter") for key in saved["model"])
    assert any(key.startswith("body") for key in saved["model"])


def test_evaluate_gives_the_same_figures_alone_and_on_two_processes(run, root):
    trained = json.loads((run[0] / "metrics.json").read_text())
    for ranks in (0, 2):
        out = root / f"evaluated{ranks}"
        args = ["--checkpoint", run[0] / "last.pt", "--out-dir", out, "--device", "cpu"]
        done = command("evaluate.py", *args, ranks=ranks)
        assert json.loads((out / "metrics.json").read_text()) == trained
        assert done.stdout.count("mIoU unseen") == 1


def test_on_other_data_what_the_run_had_masks_of_is_seen(run, root, tmp_path):
    """Another world calls other classes unseen, and a list of other names shares some words with the run's."""
    before = (run[0] / "metrics.json").read_text()
    shutil.copytree(root / "toy", tmp_path / "other")
    (tmp_path / "other/unseen.txt").write_text("red circle\n")
    text = run_inside(evaluate, "--run", run[0], "--data-root", tmp_path / "other", "--device", "cpu")[1]
    marked = re.findall(r"^(\w+ \w+) \*", text, re.M)
    assert marked == world.unseen(0) != ["red circle"]
    names = ["disk, red circle", "purple ring", *(f"other {name}" for name in world.CLASSES[2:])]
    (tmp_path / "other/classes.txt").write_text("\n".join(names) + "\n")
    (tmp_path / "other/unseen.txt").unlink()
    text = run_inside(evaluate, "--run", run[0], "--dataset", tmp_path / "other", "--device", "cpu")[1]
    assert re.search("^disk, red circle  ", text, re.M) and text.count(" * ") == 25
    assert "25 of 26 classes are unseen: no word of them was trained on by name: purple ring, other red cross" in text
    assert (run[0] / "metrics.json").read_text() == before
    assert json.loads((run[0] / "other/metrics.json").read_text())["dataset"] == str(tmp_path / "other")


def test_a_world_that_is_not_there_is_not_drawn(tmp_path):
    words = run_inside(train, "--data-root", tmp_path / "toy-1", "--out-dir", tmp_path / "run", "--device", "cpu")[2]
    assert "no folder" in words and "toy.world --root" in words and not list(tmp_path.iterdir())


def test_interrupted_and_resumed_equals_uninterrupted(run, root, tiny_clip_file):
    """SIGTERM in the middle, then --resume: the last log line and every tensor are the same."""
    args = ["--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT, "--out-dir", root / "resumed"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *map(str, args)], cwd=ROOT, env=ENV, text=True,
                               stdout=subprocess.PIPE)
    for line in process.stdout:
        if line.startswith("step"):
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 0 and "--resume goes on" in rest
    stopped = torch.load(root / "resumed/last.pt", weights_only=True)["step"]
    assert 0 < stopped < 8
    refused = command("train.py", *args, "--resume", "--seed", "5", ok=False)
    assert "seed was 0, is 5" in refused.stderr and "Traceback" not in refused.stderr
    command("train.py", *args, "--resume")
    ours, whole = (torch.load(folder / "last.pt", weights_only=True) for folder in (root / "resumed", run[0]))
    assert all(torch.equal(ours["model"][key], value) for key, value in whole["model"].items())
    assert torch.equal(ours["bank"], whole["bank"])
    lines = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
             for folder in (root / "resumed", run[0])]
    for entry in lines[0] + lines[1]:
        entry.pop("seconds")
    assert lines[0] == lines[1]


def test_two_processes_train_like_one(run, root, tiny_clip_file):
    args = ["--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT]
    command("train.py", *args, "--out-dir", root / "two", ranks=2)
    two, one = (torch.load(folder / "last.pt", weights_only=True)["model"] for folder in (root / "two", run[0]))
    start = json.loads((root / "two/log.jsonl").read_text().splitlines()[0])
    alone = json.loads((run[0] / "log.jsonl").read_text().splitlines()[0])
    assert start["loss"] == pytest.approx(alone["loss"], abs=1e-5)
    assert all(torch.allclose(two[key], value, atol=2e-3) for key, value in one.items())


def test_bf16_is_near_fp32(run, root, tiny_clip_file):
    args = ["--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT, "--precision", "bf16"]
    done = command("train.py", *args, "--out-dir", root / "bf16")
    assert "bf16, into" in done.stdout and "fp32, into" in run[1]
    half, full = (json.loads((out / "log.jsonl").read_text().splitlines()[0]) for out in (root / "bf16", run[0]))
    assert half["loss"] == pytest.approx(full["loss"], rel=0.02) and half["loss"] != full["loss"]
    state = torch.load(root / "bf16/last.pt", weights_only=True)
    assert all(value.dtype == torch.float32 for value in state["model"].values())


@pytest.mark.parametrize("args", [["--head", "linear"], ["--head", "random", "--frozen-blocks", "2"],
                                  ["--sgd-weight", "0", "--sam-weight", "0"], ["--frozen-blocks", "0"],
                                  ["--seg-loss", "nel", "--attention", "vv", "--k-schedule", "cosine"],
                                  ["--body", "mobilenet-v2", "--body-weights", "none", "--steps", "2"]])
def test_every_switch_trains_and_evaluates(args, root, tiny_clip_file):
    out = root / "-".join(args).replace("/", "")
    base = ["--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT, "--steps", "3", "--out-dir", out]
    for module, flags in ((train, [*base, *args]), (evaluate, ["--run", out, "--device", "cpu"])):
        status, text, words = run_inside(module, *flags)
        assert status == 0 and "hIoU" in text, words


def test_own_data_with_jpegs_of_different_sizes(root, tiny_clip_file, tmp_path):
    own = shutil.copytree(root / "toy", tmp_path / "own")
    for i, path in enumerate(sorted((own / "images").iterdir())):
        size = (90 + 10 * (i % 3), 70)
        Image.open(path).resize(size).save(path.with_suffix(".jpg"))
        path.unlink()
        mask = own / "masks" / path.name
        Image.open(mask).resize(size, Image.NEAREST).save(mask)
    out = tmp_path / "run"
    flags = ["--dataset", own, "--clip", tiny_clip_file, "--body", "small", "--crop", "64", *SHORT, "--out-dir", out]
    for module, args in ((train, flags), (evaluate, ["--checkpoint", out / "last.pt", "--device", "cpu"])):
        status, text, words = run_inside(module, *args)
        assert status == 0 and "hIoU" in text, words


@pytest.mark.parametrize("module, args, message", [
    (train, ["--dataset", "nowhere"], "no folder nowhere"),
    (train, ["--clip", "ViT-B/17"], "ViT-B/32"),
    (train, ["--frozen-blocks", "9"], "this CLIP has 0 to 4"),
    (train, ["--resume"], "no checkpoint"),
    (evaluate, ["--run", "nowhere"], "no checkpoint nowhere/last.pt"),
    (evaluate, ["--checkpoint", "README.md"], "README.md is no checkpoint"),
    (evaluate, ["--device", "gpu"], "--device gpu: expected cpu or cuda"),
])
def test_errors_are_one_line(module, args, message, root, tiny_clip_file, tmp_path):
    if module is train:
        args = ["--data-root", root / "toy", "--clip", tiny_clip_file, "--out-dir", tmp_path, *args]
        if "--dataset" in args:
            args = args[2:]
    status, _, words = run_inside(module, *args)
    assert status == 1 and re.fullmatch(rf"error: [^\n]*{message}[^\n]*", words), words


def test_errors_in_loader_processes_are_one_line_too(root, tiny_clip_file, tmp_path):
    own = shutil.copytree(root / "toy", tmp_path / "own")
    for path in (own / "masks").glob("train*"):
        Image.new("L", (64, 64), 99).save(path)
    done = command("train.py", "--data-root", own, "--clip", tiny_clip_file, "--steps", "3", "--workers", "2",
                   "--out-dir", tmp_path / "run", ok=False)
    assert re.fullmatch(r"error: the mask [^\n]*holds the value 99[^\n]*\n", done.stderr), done.stderr


# ---------------------------------------------------------------- evaluation


def test_metrics_by_hand():
    """3 classes, class 2 unseen; truth 0 0 0 1 2 2, prediction 0 0 1 1 2 0, and a void pixel."""
    truth, prediction = torch.tensor([0, 0, 0, 1, 2, 2, 255]), torch.tensor([0, 0, 1, 1, 2, 0, 1])
    matrix = evaluate.confusion(truth, prediction, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    result = evaluate.metrics(matrix, ["a", "b", "c", "absent"], {2})
    assert result["IoU"] == {"a": 50, "b": 50, "c": 50, "absent": None}
    assert result["pAcc"] == pytest.approx(100 * 4 / 6)
    assert (result["mIoU_seen"], result["mIoU_unseen"], result["hIoU"]) == (50, 50, 50)
    assert evaluate.metrics(matrix, list("abcd"), set())["hIoU"] is None


class Lookup(torch.nn.Module):
    """Stands for a segmenter: the logits are fixed random functions of colour at stride 4."""

    def __init__(self, K=20):
        super().__init__()
        self.weight = torch.randn(K, 3, generator=torch.Generator().manual_seed(0))

    def logits(self, images):
        small = torch.nn.functional.avg_pool2d(images, 4, ceil_mode=True)
        return torch.einsum("kc,bchw->bkhw", self.weight, small - 0.5)  # every class wins somewhere


@pytest.mark.parametrize("size", [(40, 40), (64, 64), (30, 90), (101, 77)])
def test_sliding_windows_against_a_loop(size):
    torch.manual_seed(0)
    model, image = Lookup(), torch.randint(256, (3, *size), dtype=torch.uint8)
    seen = torch.arange(20) < 15
    got = inference.predict(model, image, seen, (0.0, 0.3), None, window=64, stride=40)
    total, count = torch.zeros(20, *size), torch.zeros(size)
    tops = lambda n: [0] if n <= 64 else [t for t in range(0, n, 40) if t + 64 < n] + [n - 64]  # noqa: E731
    for top in tops(size[0]):
        for left in tops(size[1]):
            part = image[None, :, top:top + 64, left:left + 64].float() / 255
            up = torch.nn.functional.interpolate(model.logits(part), part.shape[2:], mode="bilinear")[0]
            total[:, top:top + 64, left:left + 64] += up
            count[top:top + 64, left:left + 64] += 1
    for gamma in (0.0, 0.3):
        want = (total / count - gamma * seen[:, None, None]).argmax(0)
        assert (got[gamma] == want).float().mean() > 0.999  # ties in rounding aside
    assert (got[0.0] != got[0.3]).any()


@pytest.mark.parametrize("block", [7, 64])
def test_no_class_that_wins_is_left_out(block, monkeypatch):
    """Many classes, few near each place; windows, another output size, and a γ that silences the seen classes."""
    monkeypatch.setitem(inference.BLOCK, "cpu", block)
    torch.manual_seed(0)
    field = torch.nn.functional.interpolate(torch.randn(1, 60, 4, 5), (20, 25), mode="bicubic")

    class Field(torch.nn.Module):
        def logits(self, images):  # the place stands in the picture: rows in red, columns in green
            y, x = ((images[:, c, ::4, ::4] * 255).round() for c in (0, 1))
            return torch.stack([field[0][:, (i / 4).long(), (j / 4).long()] for i, j in zip(y, x)])

    image = torch.zeros(3, 80, 100, dtype=torch.uint8)
    image[0], image[1] = torch.arange(80)[:, None], torch.arange(100)
    seen, gammas, total = torch.arange(60) % 3 > 0, (0.0, 0.5, evaluate.UNSEEN_ALONE), torch.zeros(60, 80, 100)
    count = torch.zeros(80, 100)
    for top in (0, 30, 32):
        for left in (0, 30, 52):
            part = image[None, :, top:top + 48, left:left + 48].float() / 255
            up = torch.nn.functional.interpolate(Field().logits(part), (48, 48), mode="bilinear")[0]
            total[:, top:top + 48, left:left + 48] += up
            count[top:top + 48, left:left + 48] += 1
    scores = torch.nn.functional.interpolate((total / count)[None], (53, 131), mode="bilinear")[0]
    got = inference.predict(Field(), image, seen, gammas, None, 48, 30, out_size=(53, 131))
    for gamma in gammas:
        want = (scores - gamma * seen[:, None, None]).argmax(0)
        assert (got[gamma] == want).float().mean() > 0.999
        assert len(want.unique()) > 10


MEMORY = """
import resource, torch, inference
class Noise:  # the worst case: any class may win anywhere
    def __init__(self, K): self.K = K
    def logits(self, images): return torch.randn(len(images), self.K, images.shape[2] // 16, images.shape[3] // 16)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # MiB
image = torch.randint(0, 256, (3, 1500, 2000), dtype=torch.uint8)
for K in (20, 171):
    inference.predict(Noise(K), image, torch.zeros(K, dtype=torch.bool))
    print(peak())
"""


def test_memory_hardly_grows_with_the_number_of_classes():
    """171 score maps of 1500×2000 pixels would be 1957 MiB."""
    done = subprocess.run([sys.executable, "-c", MEMORY], cwd=ROOT, env=ENV, capture_output=True, text=True, check=True)
    few, many = map(float, done.stdout.split())
    assert many - few < 100, (few, many)


def test_newest_run_and_none(tmp_path):
    from model import ModelError
    with pytest.raises(ModelError, match="train one with python train.py"):
        newest_run(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "last.pt").touch()
        time.sleep(0.02)
    os.utime(tmp_path / "a/last.pt")
    assert newest_run(tmp_path).parent.name == "a"
