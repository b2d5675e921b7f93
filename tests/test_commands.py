"""train.py and evaluate.py as users run them, on a small world: files, figures, resuming, processes, errors."""
import json
import re
import shutil
import time

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import command, finish, run_inside, segmenter, start
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
from clip_head import clip_tokens
from support import archive, processes, windows
from toy import world

CPU = torch.device("cpu")
SHORT = ["--steps", 8, "--batch-size", 6, "--workers", 0, "--device", "cpu", "--precision", "fp32"]


def read(path):
    return json.loads(path.read_text())


def log(out):
    """The log's lines, without the time they took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def state(out):
    return torch.load(out / "last.pt", weights_only=True)


def done(module, *args):
    status, text, words = run_inside(module, *args)
    assert status == 0, text + words
    return text


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


def test_a_run_leaves_its_files_and_says_what_it_does(run):
    out, text = run
    assert {p.name for p in out.iterdir()} == {"last.pt", "log.jsonl", "metrics.json", "config.json", "preview.png",
                                               "data.png", "curves.png", ".lock"}
    lines, result, config, saved = log(out), read(out / "metrics.json"), read(out / "config.json"), state(out)
    assert [line["step"] for line in lines] == [0, 7, 8] and lines[0]["k"] > 200 and lines[1]["k"] < 27
    for line, candidates in zip(lines, (6, 6 + 7 * 6)):
        assert line["loss"] == pytest.approx(line["seg"] + line["sgd"] + 0.3 * line["sam"], abs=1e-5)
        assert line["sgd_chance"] == pytest.approx(np.log(candidates))
        assert 0 <= line["clipped"] <= 1 and line["norm"] > 0
    assert result.keys() == {"gamma_0", "dataset", "images", "checkpoint", "unseen", "short_side", "precision",
                             "departures", "commit", "torch", "torchvision", "device"}
    assert list(result["gamma_0"]["IoU"]) == world.CLASSES and result["images"] == 5
    assert lines[2]["hIoU"] == result["gamma_0"]["hIoU"] and Image.open(out / "preview.png").size[0] == 6 * 128 + 5 * 6
    assert all(re.search(rf"^{name} ( |\*)", text, re.M) for name in world.CLASSES)
    assert re.search("data .*20 training images, 5 test images\nclasses 15 seen, 5 unseen: .*\nmodel .*small body, csh "
                     "head: .* trained, .* frozen.*\nrun .*8 steps of 6 images on 1 × cpu, fp32, 0 loader processes "
                     "each, into .*/run/\n", text)
    assert "has no config: assuming QuickGELU" in text.partition("\ndata  ")[0]  # what clip.load remarks of its file
    assert {key.split(".")[0] for key in saved["model"]} == {"head", "body"} and saved["config"] == config
    assert not any("tail" in key for key in saved["model"]) and len(saved["bank"]) == 48  # nothing of CLIP


def test_the_weights_are_those_of_a_loop_by_hand(run, root, tiny_clip_file):
    """Teacher's view, seen words, k, the weighted sum, gradient's norm, AdamW, learning rate: step by step."""
    source, teacher = sources.open_dataset("toy", root / "toy"), clip.load(tiny_clip_file)
    torch.manual_seed(0)
    model = models.build(teacher, body_weights="default")
    model.set_classes([source.classes[k] for k in source.seen], world.TEMPLATES)
    t, bank, trainset = model.t, torch.empty(0, 128), data.TrainSet(source, source.recipe, 64)
    views = torch.stack([trainset[i, i % 20][2] for i in range(64)]) / 255
    model.head.adapter.start_like(clip_tokens(teacher.visual, views, 1))
    params = [p for p in model.parameters() if p.requires_grad]
    first = [p.detach().clone() for p in params]
    backbone = {id(p) for p in model.body.backbone.parameters()}  # a tenth of the rate
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": 0.01 * (p.ndim >= 2)} for p in params])
    for step in range(8):
        batch = data.Steps(20, 6, 0, 8).batch(step)
        crops, labels, views = (torch.stack(x) for x in zip(*map(trainset.__getitem__, batch)))
        labels, inside = data.split_padding(labels, (16, 16))
        z, c = model(crops / 255), normalize(teacher.encode_image(views / 255), dim=1)
        d = normalize(teacher.visual.cls_and_patches(views / 255)[1], dim=2)
        a = losses.at_positions(losses.teacher_similarity(c, d), inside)
        k = losses.k_at(step, 8, inside, 0.1)
        loss = losses.seg_loss(z, t, labels, model.tau) + losses.sgd_loss(z, c, a, k, inside, bank) + \
            0.3 * losses.sam_loss(z, t, labels)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 8) ** 0.9 * (0.1 if id(group["params"][0]) in backbone else 1)
        optimizer.step()
        bank = torch.cat([c, bank])
    saved = state(run[0])
    assert torch.allclose(saved["bank"], bank, atol=1e-5)
    for (name, tensor), p, before in zip(saved["model"].items(), params, first):
        assert (tensor - p).abs().mean() < 0.01 * (p - before).abs().mean(), name


def test_optimiser_groups_and_learning_rate():
    model = nn.ModuleDict({"body": nn.Module(), "head": nn.Linear(3, 2), "frozen": nn.Linear(3, 3)})
    model.body.backbone = nn.Conv2d(3, 4, 3)
    model.body.backbone.relative_position_bias_table = nn.Parameter(torch.zeros(5, 5))
    model.frozen.requires_grad_(False)
    names = {p: name.removeprefix("body.backbone.") for name, p in model.named_parameters()}
    for pretrained, rate in ((True, 0.1), (False, 1.0)):
        groups = {names[p]: (group["rate"], group["weight_decay"])
                  for group in train.parameter_groups(model, pretrained) for p in group["params"]}
        assert groups == {"weight": (rate, 0.01), "bias": (rate, 0), "relative_position_bias_table": (rate, 0),
                          "head.weight": (1, 0.01), "head.bias": (1, 0)}
    assert [train.warmup_poly(s, 1000, 10) for s in (0, 4, 9, 999)] == pytest.approx(
        [0.1, 0.5 * 0.996**0.9, 0.991**0.9, 0.001**0.9])


@pytest.mark.parametrize("flags", ["--head linear", "--head random --frozen-blocks 2", "--sgd-weight 0 --sam-weight 0",
                                   "--frozen-blocks 0 --k-end 1 --strict", "--select student --head-attention values",
                                   "--precision bf16 --steps 1", "--precision fp16 --steps 1"])
def test_every_switch_trains_and_evaluates(flags, run, root, base, monkeypatch):
    encode, teacher, out = clip.VisionTransformer.cls_and_patches, [], root / flags
    monkeypatch.setattr(clip.VisionTransformer, "cls_and_patches", lambda *args: teacher.append(1) or encode(*args))
    text = done(train, *base, "--steps", 3, *flags.split(), "--out-dir", out)
    line = log(out)[0]
    assert bool(teacher) == bool(line["sgd"]) == bool(line["sam"]) == ("sgd-weight" not in flags)
    assert "hIoU" in text and ("strict: " in text) == ("strict" in flags)
    if "precision" in flags:
        assert line["loss"] != log(run[0])[0]["loss"] == pytest.approx(line["loss"], rel=0.02)
        assert f"{flags.split()[1]}, 0 loader" in text
    assert "hIoU" in done(evaluate, "--checkpoint", out / "last.pt", "--device", "cpu")


@pytest.mark.parametrize("backend", ["eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_losses_are_the_plain_ones(backend, run, base, tmp_path, monkeypatch):
    compiled, compile_ = [], torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(1) or compile_(model, backend=backend))
    done(train, *base, "--compile", "--out-dir", tmp_path)
    plain, fast = ([line["loss"] for line in log(out)[:2]] for out in (run[0], tmp_path))
    assert plain == pytest.approx(fast, rel=0.02) and plain[0] == pytest.approx(fast[0], rel=1e-4) and compiled == [1]
    assert state(run[0])["model"].keys() == state(tmp_path)["model"].keys()


def test_departures_from_a_benchmark_are_said_and_tests_have_the_crops_size(tiny_clip_file, tmp_path, monkeypatch):
    tree, out, seen = draw_tree("voc", tmp_path / "voc", val=1), tmp_path / "out", set()
    label, encode = windows.label, clip.VisionTransformer.cls_and_patches
    monkeypatch.setattr(windows, "label", lambda f, images, *test: seen.add(test[:3]) or label(f, images, *test))
    monkeypatch.setattr(clip.VisionTransformer, "cls_and_patches",
                        lambda self, x: seen.add(x.shape) or encode(self, x))
    flags = ["--dataset", "voc", "--data-root", tree, "--clip", tiny_clip_file, "--body", "small", "--crop", 32, *SHORT,
             "--steps", 2, "--strict", "--out-dir", out]
    text = done(train, *flags, "--lr", 1e-3)
    said = "steps 2 instead of 20000, batch size 6 instead of 16, crop 32 instead of 512, " \
        "lr 0.001 instead of 0.0002, images with unseen classes left out"
    assert text.index(f"\nnot the benchmark's protocol: {said}\n") < text.index("\ndata  ")
    assert "strict: 4 of 12 training images are left out" in text and "voc: 8 training images, 1 test images" in text
    assert read(out / "metrics.json")["departures"] == said
    assert seen == {(6, 3, 64, 64), (32, 32, 27)}  # the teacher's views; of the test: short side, window, stride
    text = done(evaluate, "--run", out, "--short-side", 16, "--unseen-only", "--save-predictions", tmp_path / "maps")
    assert read(out / "metrics.json")["departures"] == said  # the run's own
    result = read(out / "short_side_16/metrics.json")
    assert (16, 32, 27) in seen and result["departures"] == f"{said}, test short side 16" and "unseen_only" in result
    assert "labelled with these only: mIoU" in text and len(list((tmp_path / "maps").iterdir())) == 1
    text = done(train, *flags, "--resume")  # at another rate from here on: what was departed from stays in the record
    assert text.count(f"\nnot the benchmark's protocol: {said}\n") == 2
    assert read(out / "metrics.json")["departures"] == said
    done(evaluate, "--run", out, "--short-side", 32, "--gamma", 1)  # the run's own size: into the run's own file
    assert read(out / "metrics.json")["departures"] == said and "calibrated" in read(out / "metrics.json")
    done(evaluate, "--run", out, "--short-side", 16, "--data-root", tree)
    assert read(out / "voc/short_side_16/metrics.json")["short_side"] == 16


def test_a_bodys_own_rate_comes_after_lr_and_is_no_departure(tmp_path, monkeypatch):
    """SegNeXt's publisher trains crops of 512 pixels at 6e-4; ResNet's gives no rate for AdamW."""
    tree = draw_tree("voc", tmp_path / "voc", val=1)
    for flags, rate, said in (("--body segnext-t", 6e-4, ""), ("--body resnet50", 2e-4, ""),
                              ("--body segnext-t --lr 2e-4", 2e-4, "lr 0.0002 instead of 0.0006")):
        args = train.parse(["--dataset", "voc", "--data-root", str(tree), *flags.split()])
        train.open_data(args, CPU)
        assert (args.lr, args.departures) == (rate, said)


def test_predict_alone_labels_a_scene_of_what_no_mask_showed(run, root, tmp_path):
    text = done(predict, "--run", run[0], "--out-dir", tmp_path, "--device", "cpu")
    found = read(tmp_path / "demo.json")
    assert text.startswith("no image given: using one of toy\n") and found["picture"] == str(root / "toy/demo.png")
    assert list(found["classes"]) == [*world.DEMO, *world.GROUNDS]


def test_two_processes_train_and_test_like_one(run, root, base):
    text = command(root, "train.py", *base, "--out-dir", root / "two", ranks=2).stdout
    assert text.count("\nhIoU") == text.count("\nstep     0") == 1 and "on 2 × cpu" in text
    two, one = ([{key: x for key, x in line.items() if key in ("loss", "seg", "sgd", "sam")} for line in log(out)[:2]]
                for out in (root / "two", run[0]))
    assert two[0] == pytest.approx(one[0], abs=1e-5) and two[1] == pytest.approx(one[1], rel=1e-3)
    two, one = state(root / "two"), state(run[0])
    assert all(torch.allclose(two["model"][key], value, atol=2e-3) for key, value in one["model"].items())
    assert torch.allclose(two["bank"], one["bank"], atol=1e-5)
    for ranks in (1, 2):
        command(root, "evaluate.py", "--checkpoint", run[0] / "last.pt", "--out-dir", root / "tested", "--device",
                "cpu", ranks=ranks)
        assert read(root / "tested/metrics.json") == read(run[0] / "metrics.json")
    text = command(root, "train.py", *base, "--batch-size", 5, "--out-dir", root / "five", ranks=2, ok=False).stderr
    assert "error: --batch-size 5 cannot be divided among 2 processes: use 4" in text


def downloads(folder, tiny):
    """clip.load and build_body in one of two processes, with downloads that note when they begin and end."""
    def fetch(url, path, **_):
        with open(folder / "order", "a", buffering=1) as order:
            order.write(f"{processes.rank()} asks\n")
            time.sleep(0.5)
            shutil.copy(tiny, path) if "tiny" in url else torch.save(mobilenet_v2().state_dict(), path)
            order.write(f"{processes.rank()} has {'CLIP' if 'tiny' in url else 'body'}\n")

    clip.CACHE, loading.MODELS["ViT-B/32"] = folder / "cache", (clip.file_sha256(tiny), "tiny.pt")
    torch.hub.download_url_to_file, torch.hub.get_dir, archive.check_sha256 = fetch, lambda: folder, lambda *_: None
    for _ in range(2):  # predict.py starts at each picture
        processes.start("cpu")
    clip.load("ViT-B/32")
    bodies.build_body("mobilenet-v2")


def test_the_first_process_downloads_and_the_others_find_the_file(tmp_path, tiny_clip_file):
    finish(*start(tmp_path, downloads, tmp_path, tiny_clip_file, ranks=2))
    order = "0 asks, 0 has CLIP, 0 asks, 0 has body"
    assert (tmp_path / "order").read_text().splitlines() == order.split(", ")


@pytest.mark.parametrize("amx, precision", [(True, "bf16"), (False, "fp32")])
def test_bf16_on_a_cpu_is_for_amx_and_a_test_has_its_runs_precision(amx, precision, run, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx, raising=False)
    assert processes.fast_precision(CPU) == precision and processes.fast_precision(torch.device("mps")) == "fp32"
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # an older torch
    assert processes.fast_precision(CPU) == "fp32"
    logits, seen, saved = models.ChimeraSeg.logits, set(), state(run[0])
    monkeypatch.setattr(models.ChimeraSeg, "logits", lambda *args: seen.add(torch.is_autocast_enabled("cpu"))
                        or logits(*args))
    torch.save(saved | {"config": saved["config"] | {"precision": precision}}, tmp_path / "last.pt")
    done(evaluate, "--checkpoint", tmp_path / "last.pt", "--device", "cpu")
    assert read(tmp_path / "metrics.json")["precision"] == precision and seen == {amx}


@pytest.mark.parametrize("module, args, message", [
    (train, ["--dataset", "nowhere", "--data-root", "nowhere"], "nowhere is no data set, and there is no folder"),
    (train, ["--frozen-blocks", 9], "this CLIP has 0 to 4"),
    (train, ["--k-end", 1.5], "--k-end is 1.5: expected 0 to 1"),
    (train, ["--device", "cuda"], "PyTorch finds no GPU"),
    (evaluate, ["--run", "nowhere"], "no checkpoint nowhere: train one"),
    (evaluate, ["--checkpoint", "README.md"], "no checkpoint of train.py: README.md is")])
def test_errors_are_one_line(module, args, message, base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    status, _, words = run_inside(module, *([*base, "--out-dir", tmp_path] if module is train else []), *args)
    assert status == 1 and re.fullmatch(rf"error: [^\n]*{message}[^\n]*", words), words


def test_more_processes_than_gpus_are_told_how_many_there_are(base, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    status, _, words = run_inside(train, *base, "--out-dir", tmp_path, "--device", "cuda")
    assert status == 1 and re.fullmatch("error: process 3 of .* sees 2 .* --nproc-per-node 2, .*", words), words


def test_errors_in_loader_processes_are_one_line_too(root, base, tmp_path, monkeypatch):
    own = shutil.copytree(root / "toy", tmp_path / "own")
    Image.new("L", (64, 64), 99).save(own / "masks/train_00007.png")
    monkeypatch.setattr(train, "check", lambda *_: ([], Image.new("L", (9, 9))))  # which would find it first
    flags = [*base, "--data-root", own, "--workers", 2, "--out-dir", tmp_path / "out"]
    status, _, words = run_inside(train, *flags)
    assert status == 1 and re.fullmatch("error: the mask [^\n]*00007.png holds the value 99[^\n]*", words), words


def test_metrics_are_those_of_sets_of_pixels():
    rng, K = np.random.RandomState(0), 7  # class 5 is nowhere, class 6 only predicted
    truth = torch.from_numpy(rng.choice([0, 1, 2, 3, 4, 255], size=900, p=[0.3, 0.2, 0.2, 0.15, 0.05, 0.1]))
    prediction = torch.from_numpy(np.where(rng.rand(900) < 0.5, truth % 5, rng.choice([0, 1, 2, 3, 4, 6], size=900)))
    known = truth != 255
    matrix = evaluate.confusion(truth, prediction, K)
    assert matrix.tolist() == [[((truth == i) & (prediction == j)).sum() for j in range(K)] for i in range(K)]
    result = evaluate.metrics(matrix, list("0123456"), {1, 4, 6})
    assert result["IoU"].pop("5") is None
    iou = {}
    for k in (0, 1, 2, 3, 4, 6):
        a, b = (truth == k) & known, (prediction == k) & known
        iou[str(k)] = 100 * (a & b).sum().item() / (a | b).sum().item()
    assert result["IoU"] == pytest.approx(iou, abs=1e-4)
    S, U = (iou["0"] + iou["2"] + iou["3"]) / 3, (iou["1"] + iou["4"] + iou["6"]) / 3
    right = 100 * (truth == prediction)[known].double().mean().item()
    assert [result[key] for key in evaluate.FIGURES] == pytest.approx([right, S, U, 2 * S * U / (S + U)], abs=1e-4)
    assert evaluate.metrics(matrix, list("0123456"), set())["hIoU"] is None


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
    assert {key: result[key] for key in plain} == plain and result["calibrated"].pop("gamma") == 4
    off, want = torch.zeros(3, 20), torch.zeros(3, 20, 20, dtype=torch.long)
    off[1, source.seen], off[2, source.seen] = 4.0, 1e9
    for image, truth, name in data.ValSet(source):
        maps, = windows.label(model.logits, [image], 60, 200, 200, off)
        assert np.array_equal(np.asarray(Image.open(tmp_path / "maps" / f"{name}.png")), maps[0].numpy())
        want += torch.stack([evaluate.confusion(truth, labels, 20) for labels in maps])
    joint, lowered = (evaluate.metrics(matrix, source.classes, source.unseen) for matrix in want[:2])
    assert (result["gamma_0"], result["calibrated"]) == (joint, lowered) and joint["IoU"] != lowered["IoU"]
    alone = evaluate.metrics(want[2][unseen][:, unseen], [source.classes[k] for k in unseen], set())
    assert result["unseen_only"] == {"pAcc": alone["pAcc"], "IoU": alone["IoU"],
                                     "mIoU": pytest.approx(alone["mIoU_seen"])} and alone["pAcc"] > joint["pAcc"]
    for module, name, value in ((processes, "world_size", 2), (processes, "rank", 1), (evaluate.dist, "all_reduce", 0)):
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    evaluate.evaluate(model, source, CPU, "fp32", predictions=tmp_path / "half")  # the second of two processes
    assert [path.stem for path in (tmp_path / "half").iterdir()] == [source.val[1][0]]


def test_an_unfinished_run_says_so(run, root, tmp_path):
    torch.save(state(run[0]) | {"step": 3}, tmp_path / "last.pt")
    flags = "--device", "cpu"
    said = "the run is not finished: this is its state at step 3 of 8"
    assert said in done(evaluate, "--checkpoint", tmp_path / "last.pt", *flags)
    assert said in done(predict, root / "toy/images/val_00000.png", "--run", tmp_path, *flags)


def test_on_other_data_what_the_run_had_masks_of_is_seen(run, root, tmp_path):
    """Another world calls other classes unseen, and a list of other names shares some words with the run's."""
    before, flags = (run[0] / "metrics.json").read_text(), ["--run", run[0], "--device", "cpu"]
    other = shutil.copytree(root / "toy", tmp_path / "other")
    (other / "unseen.txt").write_text("dog\n")
    text = done(evaluate, *flags, "--data-root", other)
    assert re.findall(r"^(\w[\w ]*) \*", text, re.M) == world.unseen(0) != ["dog"]
    names = ["plane, aero_plane", "sheep", *(f"other {name}" for name in world.CLASSES[2:])]
    (other / "classes.txt").write_text("\n".join(names) + "\n")
    (other / "unseen.txt").unlink()
    text = done(evaluate, *flags, "--dataset", other, "--gamma", 0.5)
    assert re.search("^plane, aero_plane  ", text, re.M) and text.count(" * ") == 19 and "γ=0.5" in text
    assert "19 of 20 classes are unseen: training named no word of them" in text
    assert (run[0] / "metrics.json").read_text() == before
    assert read(run[0] / "other/metrics.json")["dataset"] == str(other)
    assert "other was not drawn by this version: delete it" in run_inside(evaluate, *flags, "--data-root", other)[2]
    saved = state(run[0])
    saved["config"]["data_root"] = str(tmp_path / "gone")
    torch.save(saved, tmp_path / "last.pt")
    words = run_inside(evaluate, "--checkpoint", tmp_path / "last.pt", "--device", "cpu")[2]
    assert "no longer in" in words and not (tmp_path / "gone").exists()  # a checkpoint does not say where to draw
