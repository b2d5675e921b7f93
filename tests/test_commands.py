"""train.py and evaluate.py as users run them, on a small world: files, figures, resuming, processes, errors."""
import json
import re
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, command, finish, run_inside, script, segmenter, start
from PIL import Image
from torch.nn.functional import normalize
from torchvision.models import mobilenet_v2
from trees import VOC_COLOURS, draw_tree

import bodies
import clip
import data
import evaluate
import losses
import model as models
import predict
import sources
import train
from clip import loading
from support import processes
from toy import world

CPU = torch.device("cpu")
SHORT = ["--steps", 8, "--batch-size", 6, "--workers", 0, "--device", "cpu", "--precision", "fp32"]
RESULT = {"gamma_0", "dataset", "images", "checkpoint", "unseen", "precision", "departures"}
FIGURES = {"pAcc", "mIoU_seen", "mIoU_unseen", "hIoU", "IoU"}


def read(path):
    return json.loads(path.read_text())


def log(out):
    """The log's lines, without the time they took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def state(out):
    return torch.load(out / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    world.write(folder / "toy", train=20, val=5)
    return folder


@pytest.fixture(scope="module")
def base(root, tiny_clip_file):
    return ["--data-root", root / "toy", "--clip", tiny_clip_file, *SHORT]


@pytest.fixture(scope="module")
def run(root, base):
    """One short run on the toy layout -> folder, what it printed; the other tests look at what it left."""
    return root / "run", command(root, "train.py", *base, "--out-dir", root / "run").stdout


# ---------------------------------------------------------------- what a run does and leaves


def test_a_run_leaves_its_files_and_says_what_it_does(run):
    out, text = run
    assert {p.name for p in out.iterdir()} == {"last.pt", "log.jsonl", "metrics.json", "config.json", "preview.png",
                                               "data.png", "curves.png"}
    lines, result, config = log(out), read(out / "metrics.json"), read(out / "config.json")
    assert [line["step"] for line in lines] == [0, 7, 8] and {"k", "lr", "loss"} <= set(lines[0])
    for line in lines[:2]:
        assert line["loss"] == pytest.approx(line["loss_seg"] + 0.2 * line["loss_sgd"] + line["loss_sam"], abs=1e-5)
    assert lines[0]["k"] > 200 and 10 * (lines[1]["k"] - 1) < 256 and lines[2]["hIoU"] == result["gamma_0"]["hIoU"]
    assert set(result) == RESULT and set(result["gamma_0"]) == FIGURES and result["departures"] == ""
    assert list(result["gamma_0"]["IoU"]) == world.CLASSES and result["images"] == 5
    assert config["test"] == {"short_side": 64, "window": 64, "stride": 48} and config["frozen_blocks"] == 1
    assert Image.open(out / "preview.png").size[0] == 6 * 128 + 5 * 6
    for name in world.CLASSES:
        assert re.search(rf"^{name} ( |\*)", text, re.M)
    assert re.search("data .*20 training images, 5 test images\nclasses 21 seen, 7 unseen: .*\nmodel .*small body, csh "
                     "head: .* trained, .* frozen.*\nrun .*8 steps of 6 images on 1 × cpu, fp32", text)
    saved = state(out)  # small, plain, without CLIP
    assert {key.split(".")[0] for key in saved["model"]} == {"head", "body"} and saved["step"] == 8
    assert not any("tail" in key for key in saved["model"]) and saved["config"] == config and len(saved["bank"]) == 48


def test_the_weights_are_those_of_a_loop_by_hand(run, root, tiny_clip_file):
    """Teacher's view, seen words, k, the weighted sum, gradient's norm, AdamW, learning rate: step by step."""
    source, teacher = sources.open_dataset("toy", root / "toy"), clip.load(tiny_clip_file)
    torch.manual_seed(0)
    model, t = models.build(teacher), [source.classes[k] for k in source.seen]
    model.set_classes(t, world.TEMPLATES)
    t, bank, trainset = model.t, torch.empty(0, 128), data.TrainSet(source, source.recipe, 64)
    params = [p for p in model.parameters() if p.requires_grad]
    first, mean, square = ([f(p) for p in params] for f in (torch.clone, torch.zeros_like, torch.zeros_like))
    for step in range(8):
        crops, labels, views = (torch.stack(x) for x in zip(*map(trainset.__getitem__, data.Steps(
            20, 6, 0, 8).batch(step))))
        labels, inside = data.split_padding(labels, (16, 16))
        z, c = model(crops / 255), normalize(teacher.encode_image(views / 255), dim=1)
        k = losses.k_at(step, 8, inside, 0.1)
        loss = losses.cross_entropy_loss(z, t, labels, model.tau) + losses.sam_loss(z, t, labels, model.tau) + \
            0.2 * losses.sgd_loss(z, c, k, inside, bank)
        grads, bank = torch.autograd.grad(loss, params), torch.cat([c, bank])
        shrink = min(1 / sum(g.square().sum() for g in grads).sqrt().item(), 1)
        lr = 3e-3 * (1 - step / 8) ** 0.9
        with torch.no_grad():
            for p, g, m, v in zip(params, grads, mean, square):
                m.lerp_(g * shrink, 0.1)
                v.lerp_((g * shrink).square(), 0.001)
                p -= lr * 0.01 * p * (p.ndim >= 2)
                p -= lr * m / (1 - 0.9 ** (step + 1)) / ((v / (1 - 0.999 ** (step + 1))).sqrt() + 1e-8)
    saved = state(run[0])
    assert torch.allclose(saved["bank"], bank, atol=1e-5)
    for (name, tensor), p, start_ in zip(saved["model"].items(), params, first):
        assert (tensor - p).abs().mean() < 0.01 * (p - start_).abs().mean(), name


def test_optimiser_groups_and_learning_rate():
    model = nn.ModuleDict({"body": nn.Module(), "head": nn.Linear(3, 2), "frozen": nn.Linear(3, 3)})
    model.body.backbone = nn.ModuleDict({"conv": nn.Conv2d(3, 4, 3)})
    model.body.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(5, 5))
    model.frozen.requires_grad_(False)
    for pretrained, rate in ((True, 0.1), (False, 1.0)):
        groups = {name: (group["rate"], group["weight_decay"]) for group in train.parameter_groups(model, pretrained)
                  for p in group["params"] for name, q in model.named_parameters() if p is q}
        assert groups == {"body.backbone.relative_position_bias_table": (rate, 0), "head.weight": (1, 0.01),
                          "body.backbone.conv.weight": (rate, 0.01), "body.backbone.conv.bias": (rate, 0),
                          "head.bias": (1, 0)}
    assert [train.warmup_poly(s, 1000, 10) for s in (0, 4, 9, 999)] == pytest.approx(
        [0.1, 0.5 * 0.996**0.9, 0.991**0.9, 0.001**0.9])


@pytest.mark.parametrize("flags", ["--head linear", "--head random --frozen-blocks 2", "--sgd-weight 0 --sam-weight 0",
                                   "--frozen-blocks 0 --temperature 0.1 --k-end 1 --strict",
                                   "--body mobilenet-v2 --body-weights none", "--precision bf16"])
def test_every_switch_trains_and_evaluates(flags, run, root, base, monkeypatch):
    encode, teacher = clip.CLIP.encode_image, []
    monkeypatch.setattr(clip.CLIP, "encode_image", lambda *args: teacher.append(1) or encode(*args))
    out = root / flags.replace("/", "")
    status, text, words = run_inside(train, *base, "--steps", 3, *flags.split(), "--out-dir", out)
    assert status == 0 and "hIoU" in text, words
    line = log(out)[0]
    assert bool(teacher) == bool(line["loss_sgd"]) == bool(line["loss_sam"]) == ("sgd-weight" not in flags)
    assert ("strict: " in text) == ("strict" in flags)
    if "bf16" in flags:
        assert line["loss"] != log(run[0])[0]["loss"] == pytest.approx(line["loss"], rel=0.02) and "bf16, into" in text
    status, text, words = run_inside(evaluate, "--checkpoint", out / "last.pt", "--device", "cpu")
    assert status == 0 and "hIoU" in text, words


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_losses_are_the_plain_ones(backend, base, tmp_path, monkeypatch):
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(model) or compile_(model, backend=backend))
    monkeypatch.setattr(train, "LOG_EVERY", 1)
    for more in ([], ["--compile"]):
        status, _, words = run_inside(train, *base, "--steps", 20, "--batch-size", 2, "--crop", 32, *more, "--out-dir",
                                      tmp_path / f"out{len(more)}")
        assert status == 0, words
    assert len(compiled) == 1
    plain, fast = ([line["loss"] for line in log(tmp_path / name)[:20]] for name in ("out0", "out1"))
    assert plain == pytest.approx(fast, rel=0.02) and plain[0] == pytest.approx(fast[0], rel=1e-4)
    assert state(tmp_path / "out0")["model"].keys() == state(tmp_path / "out1")["model"].keys()


def test_own_data_of_any_sizes_is_tested_at_one(root, tiny_clip_file, tmp_path, monkeypatch):
    own, sizes = shutil.copytree(root / "toy", tmp_path / "own"), []
    for i, path in enumerate(sorted((own / "images").iterdir())):
        size = (90 + 10 * (i % 3), 70)
        Image.open(path).resize(size).save(path.with_suffix(".jpg"))
        path.unlink()
        Image.open(own / "masks" / path.name).resize(size, Image.NEAREST).save(own / "masks" / path.name)
    encode, label = clip.CLIP.encode_image, models.ChimeraSeg.label
    monkeypatch.setattr(clip.CLIP, "encode_image", lambda self, x: sizes.append(x.shape) or encode(self, x))
    monkeypatch.setattr(models.ChimeraSeg, "label", lambda self, image, *test, **more: sizes.append(test[:3]) or
                        label(self, image, *test, **more))
    flags = ["--dataset", own, "--clip", tiny_clip_file, "--body", "small", "--crop", 32, *SHORT, "--steps", 2]
    for module, args in ((train, flags + ["--out-dir", tmp_path / "out"]), (evaluate, ["--run", tmp_path / "out"])):
        status, text, words = run_inside(module, *args)
        assert status == 0 and "hIoU" in text and "protocol" not in text, words
    assert set(sizes) == {(6, 3, 64, 64), (32, 32, 27)}  # the teacher's views; tests, as VOC's at a crop of 32


def test_departures_from_a_benchmark_are_said(tiny_clip_file, tmp_path, monkeypatch):
    tree, out = draw_tree("voc", tmp_path / "voc", val=1, sides=(64, 65)), tmp_path / "out"
    flags = ["--dataset", "voc", "--data-root", tree, "--clip", tiny_clip_file, "--body", "small", "--crop", 64, *SHORT]
    status, text, words = run_inside(train, *flags, "--steps", 2, "--strict", "--out-dir", out)
    assert status == 0, words
    said = "steps 2 instead of 20000, batch size 6 instead of 16, crop 64 instead of 512, " \
        "images with unseen classes left out"
    assert text.index(f"\nnot the benchmark's protocol: {said}\n") < text.index("\ndata  ")
    assert "strict: 4 of 12 training images are left out" in text and "voc: 8 training images, 1 test images" in text
    assert read(out / "metrics.json")["departures"] == said
    label, sides = models.ChimeraSeg.label, set()
    monkeypatch.setattr(models.ChimeraSeg, "label", lambda self, image, *test, **more: sides.add(test[0]) or
                        label(self, image, *test, **more))
    status, text, words = run_inside(evaluate, "--run", out, "--short-side", 32, "--unseen-only", "--save-predictions",
                                     tmp_path / "maps")
    result = read(out / "metrics.json")
    assert status == 0 and sides == {32} and result["departures"] == f"{said}, test short side 32", words
    assert set(result) == RESULT | {"unseen_only"}
    assert "labelled with these only: mIoU" in text and len(list((tmp_path / "maps").iterdir())) == 1


def test_predict_alone_labels_a_scene_of_what_no_mask_showed(run, root, tmp_path):
    text = run_inside(predict, "--run", run[0], "--out-dir", tmp_path, "--device", "cpu")[1]
    found = read(tmp_path / "demo.json")
    assert text.startswith("no image given: using one of toy\n") and found["picture"] == str(root / "toy/demo.png")
    assert list(found["classes"]) == [*world.DEMO, *world.STUFF] and sum(found["classes"].values()) == pytest.approx(1)
    run_inside(predict, "--run", run[0], "--out-dir", tmp_path, "--device", "cpu", "--classes", "cat, dog")
    assert list(read(tmp_path / "demo.json")["classes"]) == ["cat", "dog"]


def test_a_world_of_another_version_is_not_trained_on(root, tmp_path):
    old = shutil.copytree(root / "toy", tmp_path / "old")
    (old / "classes.txt").write_text("\n".join(f"red {name}" for name in world.CLASSES))
    (old / "unseen.txt").unlink()
    with pytest.raises(sources.DataError, match="old was not drawn by this version: delete it"):
        sources.open_dataset("toy", old)


# ---------------------------------------------------------------- interrupted, resumed, many processes


def test_interrupted_and_resumed_equals_uninterrupted(run, root, base):
    """SIGTERM in the middle, then --resume: log and every tensor are the same."""
    out = root / "resumed"
    (process,), files = start(root, script, ROOT / "train.py", *base, "--out-dir", out)
    while process.is_alive() and not (files[0].exists() and "\nstep " in files[0].read_text()):
        time.sleep(0.01)
    process.terminate()
    assert "--resume goes on" in finish([process], files).stdout and 0 < state(out)["step"] < 8
    words = run_inside(train, *base, "--out-dir", out, "--resume", "--seed", 5)[2]
    assert "seed was 0, is 5" in words
    status, _, words = run_inside(train, *base, "--out-dir", out, "--resume")
    assert status == 0, words
    ours, whole = state(out), state(run[0])
    assert all(torch.equal(ours["model"][key], value) for key, value in whole["model"].items())
    assert torch.equal(ours["bank"], whole["bank"]) and log(out) == log(run[0])


def test_two_processes_train_and_test_like_one(run, root, base):
    text = command(root, "train.py", *base, "--out-dir", root / "two", ranks=2).stdout
    assert text.count("\nhIoU") == text.count("\nstep     0") == 1 and "on 2 × cpu" in text
    two, one = ([{key: x for key, x in line.items() if key[:4] == "loss"} for line in log(out)[:2]]
                for out in (root / "two", run[0]))
    assert two[0] == pytest.approx(one[0], abs=1e-5) and two[1] == pytest.approx(one[1], rel=1e-3)
    two, one = state(root / "two"), state(run[0])
    assert all(torch.allclose(two["model"][key], value, atol=2e-3) for key, value in one["model"].items())
    assert torch.allclose(two["bank"], one["bank"], atol=1e-5)
    for ranks in (1, 2):
        out = root / f"tested{ranks}"
        command(root, "evaluate.py", "--checkpoint", run[0] / "last.pt", "--out-dir", out, "--device", "cpu",
                ranks=ranks)
        assert read(out / "metrics.json") == read(run[0] / "metrics.json")


def downloads(folder, tiny):
    """clip.load and build_body in one of two processes, with downloads that note when they begin and end."""
    def fetch(url, path=None, **_):
        with open(folder / "order", "a", buffering=1) as order:
            order.write(f"{processes.rank()} asks\n")
            if path:
                time.sleep(0.5)
                shutil.copy(tiny, path)
            order.write(f"{processes.rank()} has {'CLIP' if path else 'body'}\n")
        return mobilenet_v2().state_dict()

    clip.CACHE, loading.MODELS["ViT-B/32"] = folder / "cache", (clip.file_sha256(tiny), "tiny.pt")
    torch.hub.download_url_to_file = torch.hub.load_state_dict_from_url = fetch
    processes.start("cpu")
    clip.load("ViT-B/32")
    norm = next(part for part in bodies.build_body("mobilenet-v2").modules() if isinstance(part, nn.BatchNorm2d))
    norm.running_mean.fill_(processes.rank())
    train.share_statistics(norm)
    assert norm.running_mean.eq(0).all()  # the first process's: all test with them


def test_the_first_process_downloads_and_the_others_find_the_file(tmp_path, tiny_clip_file):
    finish(*start(tmp_path, downloads, tmp_path, tiny_clip_file, ranks=2))
    assert (tmp_path / "order").read_text().splitlines() == ["0 asks", "0 has CLIP", "0 asks", "0 has body", "1 asks",
                                                             "1 has body"]


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "fp32")])
def test_bf16_on_a_cpu_is_for_amx_and_a_test_has_its_runs_precision(amx, precision, run, root, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    args = train.parse(["--data-root", str(root / "toy")])
    train.open_source(args, CPU)
    assert args.precision == precision and processes.fast_precision(torch.device("mps")) == "fp32"
    logits, seen, saved = models.ChimeraSeg.logits, set(), state(run[0])
    monkeypatch.setattr(models.ChimeraSeg, "logits", lambda *args: seen.add(torch.is_autocast_enabled("cpu"))
                        or logits(*args))
    saved["config"]["precision"] = precision
    torch.save(saved, tmp_path / "last.pt")
    assert run_inside(evaluate, "--checkpoint", tmp_path / "last.pt", "--device", "cpu")[0] == 0
    assert read(tmp_path / "metrics.json")["precision"] == precision and seen == {amx}
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # an older torch
    assert processes.fast_precision(CPU) == "fp32"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize("module, args, message", [
    (train, ["--dataset", "nowhere", "--data-root", "nowhere"], "nowhere is no data set, and there is no folder"),
    (train, ["--clip", "ViT-B/17"], "ViT-B/32"),
    (train, ["--frozen-blocks", 9], "this CLIP has 0 to 4"),
    (train, ["--k-end", 1.5], "--k-end is 1.5: expected 0 to 1"),
    (train, ["--resume"], "no checkpoint"),
    (evaluate, ["--run", "nowhere"], "no checkpoint nowhere/last.pt"),
    (evaluate, ["--checkpoint", "README.md"], "README.md is no checkpoint"),
    (train, ["--device", "cuda"], "PyTorch finds no GPU"),
])
def test_errors_are_one_line(module, args, message, base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    first = [*base, "--out-dir", tmp_path] if module is train else []
    status, _, words = run_inside(module, *first, *args)
    assert status == 1 and re.fullmatch(rf"error: [^\n]*{message}[^\n]*", words), words


def test_errors_in_loader_processes_are_one_line_too(root, base, tmp_path):
    own = shutil.copytree(root / "toy", tmp_path / "own")
    Image.new("L", (64, 64), 99).save(own / "masks/train_00007.png")
    flags = [*base, "--data-root", own, "--workers", 2, "--out-dir", tmp_path / "out"]
    unchecked = "import train; from support import command; train.check = lambda *_: []; " \
        "command.run_command(train.main, train.parse)"  # the data check would find it first
    done = subprocess.run([sys.executable, "-c", unchecked, *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
                          timeout=200)  # and the command ends
    assert done.returncode == 1 and re.fullmatch(r"error: the mask [^\n]*00007.png holds the value 99[^\n]*\n",
                                                 done.stderr), done.stderr


# ---------------------------------------------------------------- scores


def test_metrics_by_hand_and_by_torchmetrics():
    """3 classes, class 2 unseen; truth 0 0 0 1 2 2, prediction 0 0 1 1 2 0, and a void pixel."""
    truth, prediction = torch.tensor([0, 0, 0, 1, 2, 2, 255]), torch.tensor([0, 0, 1, 1, 2, 0, 1])
    matrix = evaluate.confusion(truth, prediction, 4)
    assert matrix.tolist() == [[2, 1, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    result = evaluate.metrics(matrix, ["a", "b", "c", "absent"], {2})
    assert result["IoU"] == {"a": 50, "b": 50, "c": 50, "absent": None}
    assert result["pAcc"] == pytest.approx(100 * 4 / 6)
    assert (result["mIoU_seen"], result["mIoU_unseen"], result["hIoU"]) == (50, 50, 50)
    assert evaluate.metrics(matrix, list("abcd"), set())["hIoU"] is None

    classification = pytest.importorskip("torchmetrics.classification")
    rng, K = np.random.RandomState(0), 7  # class 5 is nowhere, class 6 only predicted
    truth = torch.from_numpy(rng.choice([0, 1, 2, 3, 4, 255], size=900, p=[0.3, 0.2, 0.2, 0.15, 0.05, 0.1]))
    prediction = torch.from_numpy(np.where(rng.rand(900) < 0.5, truth % 5, rng.choice([0, 1, 2, 3, 4, 6], size=900)))
    result = evaluate.metrics(evaluate.confusion(truth, prediction, K), list("0123456"), {1, 4, 6})
    peer = classification.MulticlassJaccardIndex(K, average=None, ignore_index=255)
    theirs = [100 * iou for iou in peer(prediction, truth).tolist()]
    assert [v for v in result["IoU"].values() if v is not None] == pytest.approx(theirs[:5] + theirs[6:], abs=1e-4)
    S, U = (sum(theirs[k] for k in group) / 3 for group in ((0, 2, 3), (1, 4, 6)))
    assert result["IoU"]["5"] is None and result["hIoU"] == pytest.approx(2 * S * U / (S + U), abs=1e-4)
    assert (result["mIoU_seen"], result["mIoU_unseen"]) == pytest.approx((S, U), abs=1e-4)


def by_colour(images):
    """Class k's logit is minus ten times the distance to VOC's colour of value k + 1; class 0 swallows others."""
    colours = torch.tensor(VOC_COLOURS[1:21])[None, :, :, None, None] / 255
    logits = -10 * (images[:, None] - colours).norm(dim=2)
    logits[:, 0] += 12
    return logits


def test_calibration_and_unseen_only_stand_beside_the_joint_figure(tmp_path, monkeypatch):
    source = sources.open_dataset("voc", draw_tree("voc", tmp_path / "voc", train=2))
    source.recipe = sources.Recipe(1, short_side=60, window=200, stride=200)
    model, unseen = segmenter(by_colour, 20), sorted(source.unseen)
    plain = evaluate.evaluate(model, source, CPU, "fp32")
    result = evaluate.evaluate(model, source, CPU, "fp32", 4.0, True, tmp_path / "maps")
    assert {key: result[key] for key in plain} == plain and result.keys() - plain == {"calibrated", "unseen_only"}
    assert result["calibrated"].pop("gamma") == 4 and not model.training
    want = {name: torch.zeros(20, 20, dtype=torch.long) for name in ("gamma_0", "calibrated", "alone")}
    for image, truth, name in data.ValSet(source):
        off = torch.zeros(3, 20)
        off[1, source.seen], off[2, source.seen] = 4.0, 1e9
        joint, lowered, alone = model.label(image, 60, 200, 200, off)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "maps" / f"{name}.png")), joint.numpy())
        for key, labels in zip(want, (joint, lowered, alone)):
            want[key] += evaluate.confusion(truth, labels, 20)
    assert all(result[key] == evaluate.metrics(want[key], source.classes, source.unseen)
               for key in ("gamma_0", "calibrated"))
    alone = want["alone"][unseen][:, unseen].double()  # pixels of unseen classes among these alone
    iou = 100 * alone.diag() / (alone.sum(0) + alone.sum(1) - alone.diag())
    ours = result["unseen_only"]
    assert ours["pAcc"] == pytest.approx((100 * alone.diag().sum() / alone.sum()).item())
    assert [ours["IoU"][source.classes[k]] for k in unseen] == [
        pytest.approx(value) if value == value else None for value in iou.tolist()]
    assert ours["mIoU"] == pytest.approx(iou.nanmean().item()) and ours["pAcc"] > 90 > result["gamma_0"]["pAcc"]
    assert result["calibrated"]["mIoU_unseen"] != result["gamma_0"]["mIoU_unseen"]
    for module, name, value in ((processes, "world_size", 2), (processes, "rank", 1), (evaluate.dist, "all_reduce", 0)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    evaluate.evaluate(model, source, CPU, "fp32", predictions=tmp_path / "half")  # the second of two processes
    assert [path.stem for path in (tmp_path / "half").iterdir()] == [source.val[1][0]]


def test_on_other_data_what_the_run_had_masks_of_is_seen(run, root, tmp_path):
    """Another world calls other classes unseen, and a list of other names shares some words with the run's."""
    before = (run[0] / "metrics.json").read_text()
    other = shutil.copytree(root / "toy", tmp_path / "other")
    (other / "unseen.txt").write_text("dog\n")
    flags = ["--run", run[0], "--device", "cpu"]
    text = run_inside(evaluate, *flags, "--data-root", other)[1]
    assert re.findall(r"^(\w[\w ]*) \*", text, re.M) == world.unseen(0) != ["dog"]
    names = ["plane, aero_plane", "sheep", *(f"other {name}" for name in world.CLASSES[2:])]
    (other / "classes.txt").write_text("\n".join(names) + "\n")
    (other / "unseen.txt").unlink()
    text = run_inside(evaluate, *flags, "--dataset", other, "--gamma", 0.5)[1]
    assert re.search("^plane, aero_plane  ", text, re.M) and text.count(" * ") == 27 and "γ=0.5" in text
    assert "27 of 28 classes are unseen: training named no word of them" in text
    assert (run[0] / "metrics.json").read_text() == before
    assert read(run[0] / "other/metrics.json")["dataset"] == str(other)
    saved = state(run[0])
    saved["config"]["data_root"] = str(tmp_path / "gone")
    torch.save(saved, tmp_path / "last.pt")
    words = run_inside(evaluate, "--checkpoint", tmp_path / "last.pt", "--device", "cpu")[2]
    assert "no longer in" in words and not (tmp_path / "gone").exists()  # a checkpoint does not say where to draw
