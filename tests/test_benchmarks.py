"""The benchmarks' official trees, drawn small: reading, strict mode, the data check, broken trees, the commands."""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image

import data
from sources import check as datacheck
import evaluate
from support import command as guard
from support import pictures
import sources
import train
from losses import cross_entropy_loss

ROOT = Path(__file__).parent.parent
PROTOCOL = json.loads((ROOT / "protocol.json").read_text())
VOID_IN = {"voc": (0, 255), "context": (0, 255), "coco-stuff": (255,)}
ABSENT = sorted(set(range(182)) - set(PROTOCOL["coco-stuff"]["raw_ids"]))


def raw_value(name, k):
    """What class k is in the official files, worked out apart from data.py."""
    return PROTOCOL["coco-stuff"]["raw_ids"][k] if name == "coco-stuff" else k + 1


def voc_colour(i):
    """VOC's colour map: the bits of i spread over the high bits of red, green and blue."""
    return [sum((i >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]


VOC_COLOURS = np.array([voc_colour(i) for i in range(256)], np.uint8)


def write(image, mask, values, size, palette=True):
    """A JPEG in the colours of its mask: blocks of up to four raw values, each with a void border, on values[0]."""
    H, W = size
    labels = np.full((H, W), values[0], np.uint8)
    for i, value in enumerate(values[1:5]):
        top, left = 4 + i // 2 * 28, 4 + i % 2 * 28
        labels[top:top + 24, left:left + 24] = 255
        labels[top + 1:top + 23, left + 1:left + 23] = value
    Image.fromarray(VOC_COLOURS[labels]).save(image, quality=95)
    labels = Image.fromarray(labels)
    if palette:  # as VOC has them; the others are plain grey
        labels.putpalette(VOC_COLOURS.flatten().tolist())
    labels.save(mask)


def draw_tree(name, root, train=12, val=3, sides=(60, 90)):
    """The tree as its archives unpack; training image i holds an unseen class where i % 3 == 0, test images always."""
    rng, K = np.random.RandomState(0), len(PROTOCOL[name]["classes"])
    unseen = PROTOCOL[name].get("unseen") or PROTOCOL[name]["unseen_zs3_lineage"]
    seen = [k for k in range(K) if k not in unseen]
    ground = raw_value(name, seen[-1]) if name == "coco-stuff" else 0

    def values(i, hidden):
        ks = [seen[(3 * i + j) % len(seen)] for j in range(3)] + [unseen[i % len(unseen)]] * hidden
        return [ground] + [raw_value(name, k) for k in ks]

    folders = {"voc": ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"),
               "context": ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"),
               "coco-stuff": ("train2017", "val2017", "stuffthingmaps/train2017", "stuffthingmaps/val2017")}
    for folder in folders[name]:
        (root / folder).mkdir(parents=True)
    for i in range(train + val):
        part, stem = ("train", f"2007_{i:06d}") if i < train else ("val", f"2008_{i:06d}")
        image = root / "JPEGImages" / f"{stem}.jpg"
        mask = root / ("SegmentationClassContext" if name == "context" else
                       "SegmentationClassAug" if part == "train" else "SegmentationClass") / f"{stem}.png"
        if name == "coco-stuff":
            image = root / f"{part}2017" / f"{i:012d}.jpg"
            mask = root / f"stuffthingmaps/{part}2017" / f"{i:012d}.png"
        write(image, mask, values(i, i % 3 == 0 or part == "val"), rng.randint(*sides, 2), palette=name == "voc")
        if name == "voc" and part == "val":  # the augmented folder holds them too; they must not be trained on
            shutil.copy(mask, root / "SegmentationClassAug")
        if name != "coco-stuff":
            lists = root / ("ImageSets/Segmentation" if name == "voc" else "ImageSets/SegmentationContext")
            with open(lists / f"{part}.txt", "a") as file:
                file.write(stem + "\n")
    return root


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return {name: draw_tree(name, folder / name) for name in ("voc", "coco-stuff", "context")}


@pytest.fixture
def copy(trees, tmp_path):
    return lambda name: shutil.copytree(trees[name], tmp_path / name)


# ---------------------------------------------------------------- reading


def test_the_protocols_are_the_fields():
    sizes = {name: (len(set(p["classes"])), len(p.get("unseen", p.get("unseen_zs3_lineage")))) for name, p in
             PROTOCOL.items()}
    assert sizes == {"voc": (20, 5), "coco-stuff": (171, 15), "context": (59, 10)}
    assert ABSENT == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # COCO's ids without pictures, minus one
    assert [PROTOCOL["voc"]["classes"][k] for k in PROTOCOL["voc"]["unseen"]] == [
        "pottedplant", "sheep", "sofa", "train", "tvmonitor"]


@pytest.mark.parametrize("name", ["voc", "coco-stuff", "context"])
def test_official_trees(name, trees, tmp_path):
    source = sources.open_dataset(name, trees[name])
    p = PROTOCOL[name]
    unseen = set(p.get("unseen", p.get("unseen_zs3_lineage")))
    assert (len(source.train), len(source.val)) == (12, 3)
    assert source.classes == p["classes"] and source.unseen == unseen and list(source.templates) == p["templates"]
    recipe = source.recipe
    assert (recipe.steps, recipe.batch_size, recipe.crop, recipe.lr, recipe.warmup) == (p["iterations"], 16, 512, 2e-4,
                                                                                      1500)
    assert (recipe.short_side, recipe.window, recipe.stride, recipe.body, recipe.clip) == (512, 512, 426, "resnet50",
                                                                                           "ViT-B/16")
    half = recipe.at_crop(256)  # tested at the sizes that it trains at
    assert (half.crop, half.short_side, half.window, half.stride) == (256, 256, 256, 213) and half.steps == recipe.steps
    assert sources.FOLDER.at_crop(256).sides == [128, 512] and sources.TOY.at_crop(64) == sources.TOY
    truth = data.ValSet(source)
    for i, (_, _, mask) in enumerate(source.val):
        image, labels, _ = truth[i]
        raw = np.asarray(Image.open(mask))
        assert image.shape[1:] == labels.shape == raw.shape
        assert set(np.unique(raw)) > {255} and (name == "coco-stuff" or 0 in raw)
        assert set(labels.unique().tolist()) & unseen
        for value in np.unique(raw):
            want = sources.IGNORE if value in VOID_IN[name] else \
                next(k for k in range(len(source.classes)) if raw_value(name, k) == value)
            assert (labels.numpy()[raw == value] == want).all()
    seen = [k for k in range(len(source.classes)) if k not in unseen]
    view = data.TrainSet(source, sources.Recipe(1, crop=64))
    for i, (_, _, mask) in enumerate(source.train):
        there = {k for k in seen if raw_value(name, k) in np.asarray(Image.open(mask))}
        assert {seen[k] for k in view[i, i][1].unique().tolist() if k not in (data.PADDING, 255)} <= there

    remarks = datacheck.check(source, tmp_path / "check.png")
    train, val = sources.COUNTS[name]
    assert remarks[:2] == [f"warning: 12 training images, the benchmark has {train}: figures do not compare",
                           f"warning: 3 test images, the benchmark has {val}: figures do not compare"]
    assert all(remark.startswith("warning: ") and "classes are in none" in remark for remark in remarks[2:])
    sheet = Image.open(tmp_path / "check.png")
    assert sheet.size[0] == 2 * 192 and len(sheet.getcolors(1 << 20)) > 5


def test_roots_may_hold_what_the_archives_make(trees, tmp_path):
    for name, inside in (("voc", "VOCdevkit/VOC2012"), ("context", "VOCdevkit/VOC2010")):
        (tmp_path / name / inside).parent.mkdir(parents=True)
        (tmp_path / name / inside).symlink_to(trees[name])
        assert len(sources.open_dataset(name, tmp_path / name).train) == 12
    (tmp_path / "coco/images").mkdir(parents=True)
    for part in ("train2017", "val2017"):
        (tmp_path / "coco/images" / part).symlink_to(trees["coco-stuff"] / part)
    (tmp_path / "coco/stuffthingmaps").symlink_to(trees["coco-stuff"] / "stuffthingmaps")
    assert len(sources.open_dataset("coco-stuff", tmp_path / "coco").train) == 12


def test_contexts_two_splits(trees):
    first, second = (sources.open_dataset(name, trees["context"]) for name in ("context", "context-cascade-clip"))
    assert first.unseen == set(PROTOCOL["context"]["unseen_zs3_lineage"]) != second.unseen
    assert second.unseen == set(PROTOCOL["context"]["unseen_cascade_clip"])
    assert (first.name, second.name) == ("context", "context-cascade-clip")
    assert first.classes == second.classes and first.train == second.train


@pytest.mark.parametrize("name", ["voc", "coco-stuff", "context"])
def test_strict_drops_every_image_with_an_unseen_pixel(name, trees):
    source = sources.open_dataset(name, trees[name])
    kept = data.without_unseen(source)
    assert kept == data.without_unseen(source, workers=2)
    assert kept == [file for i, file in enumerate(source.train) if i % 3]  # as drawn


def test_strict_that_leaves_nothing_says_so(trees):
    source = sources.open_dataset("voc", trees["voc"])
    source.train = source.train[::3]
    with pytest.raises(sources.DataError, match="all 4 training images of voc hold an unseen class"):
        data.without_unseen(source)


# ---------------------------------------------------------------- broken trees


def change(folder, function, *more):
    for path in sorted(folder.iterdir())[:None if not more else more[0]]:
        Image.fromarray(function(np.array(Image.open(path))).astype(np.uint8)).save(path)


def lowered(raw):  # what "reduce zero label" leaves on the disk
    return raw - np.uint8(1)


def raised(raw):
    return np.where(raw == 255, raw, raw + 1)


def one(folder, i=5):
    return sorted(folder.iterdir())[i]


def cut_jpeg(root):
    path = one(root / "JPEGImages")
    path.write_bytes(path.read_bytes()[:400])


def reordered(root):
    names = PROTOCOL["voc"]["classes"]
    (root / "classes.txt").write_text("\n".join([*names[:2], *reversed(names[2:])]))


def empty(folder):
    for path in folder.iterdir():
        path.unlink()


AUG, MAPS = "SegmentationClassAug", "stuffthingmaps/train2017"
BROKEN = {
    "lowered by one": ("voc", lambda r: change(r / AUG, lowered), "the training masks of voc hold more 255.*lowered"),
    "raised by one": ("voc", lambda r: change(r / AUG, raised), r"never hold 0, they look raised by one.*1 aeroplane"),
    "val lowered": ("voc", lambda r: change(r / "SegmentationClass", lowered), "the test masks of voc .*lowered by"),
    "context lowered": ("context", lambda r: change(r / "SegmentationClassContext", lowered), "context .*lowered by"),
    "background a class": ("voc", lambda r: change(r / AUG, lambda m: np.where(m == 0, 21, m), 2),
                           "000000.png holds the value 21, which none of the 20 classes has: expected 0 to 20, 255"),
    "RGB mask": ("voc", lambda r: Image.open(one(r / AUG)).convert("RGB").save(one(r / AUG)),
                 r"2007_000005.png is RGB: expected one channel"),
    "no mask": ("coco-stuff", lambda r: one(r / MAPS).unlink(), r"'000000000005', but no mask of that name exists$"),
    "no masks": ("coco-stuff", lambda r: empty(r / MAPS), r"'000000000000', but no mask .*\(and for 11 more\)"),
    "no image": ("voc", lambda r: one(r / "JPEGImages").unlink(), "'2007_000005', but no image"),
    "sizes": ("voc", lambda r: Image.new("P", (40, 30)).save(one(r / AUG)),
              r"2007_000005.jpg .* its mask .* is \(30, 40\): expected one size"),
    "JPEG": ("voc", cut_jpeg, r"cannot read the image .*2007_000005.jpg .*take it off the list"),
    "not a mask": ("voc", lambda r: one(r / AUG).write_bytes(b"no png"), "cannot read the mask .*2007_000005.png"),
    "absent id": ("coco-stuff", lambda r: change(r / MAPS, lambda m: np.where(m == 0, 11, m)),
                  "hold 11, an id that stuffthingmaps never use.*trainval2017.zip"),
    "one-based maps": ("coco-stuff", lambda r: change(r / "stuffthingmaps/val2017", raised), "hold 182, an id"),
    "id outside": ("context", lambda r: change(r / "SegmentationClassContext", lambda m: np.where(m == 1, 61, m), 1),
                   r"2007_000000.png holds the value 61, which none of the 59"),
    "empty list": ("voc", lambda r: (r / "ImageSets/Segmentation/val.txt").write_text(""), "val.txt is empty"),
    "empty folder": ("coco-stuff", lambda r: empty(r / "val2017"), "val2017 is empty: expected at least one image"),
    "another order": ("voc", reordered, "line 3 of .*classes.txt is 'tvmonitor', class 3 of voc is 'bird': take the"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_trees_give_one_line(case, copy):
    name, spoil, message = BROKEN[case]
    root = copy(name)
    spoil(root)
    with pytest.raises(sources.DataError, match=message) as error:
        datacheck.check(sources.open_dataset(name, root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, part", [(name, part) for name, (_, tree) in sources.TREES.items() for part in tree])
def test_a_missing_part_shows_the_tree(name, part, copy):
    root = copy(name)
    shutil.rmtree(root / part) if (root / part).is_dir() else (root / part).unlink()
    with pytest.raises(sources.DataError) as error:
        sources.open_dataset(name, root)
    lines = str(error.value).split("\n")
    assert lines[0].startswith(f"no {part} in {root}: expected this tree")
    assert [line.split()[0] for line in lines[1:]] == list(sources.TREES[name][1])


def test_the_official_class_list_beside_the_data_is_no_error(copy):
    root = copy("voc")
    (root / "classes.txt").write_text("\n".join(PROTOCOL["voc"]["classes"]).replace("diningtable", "Dining table"))
    assert sources.open_dataset("voc", root).classes == PROTOCOL["voc"]["classes"]


def own_data(root, values, classes):
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        write(root / f"images/{name}.jpg", root / f"masks/{name}.png", values, (70, 80))
    (root / "train.txt").write_text("a\nb\n")
    (root / "val.txt").write_text("c\n")
    (root / "classes.txt").write_text("\n".join(classes))
    return sources.open_dataset(root)


def test_own_masks_that_count_from_one_or_keep_background(tmp_path):
    with pytest.raises(sources.DataError, match="hold 3, but the 3 lines of classes.txt are 0 sky … 2 cat: lower all"):
        datacheck.check(own_data(tmp_path / "one", [1, 2, 3], ["sky", "dog", "cat"]))
    with pytest.raises(sources.DataError, match="hold 3, .*if 0 is background, make it 255 and lower the others"):
        datacheck.check(own_data(tmp_path / "background", [0, 1, 2, 3], ["sky", "dog", "cat"]))
    remarks = datacheck.check(own_data(tmp_path / "named", [0, 1], ["background", "dog", "cat"]))
    assert "'background' is a class, but no thing" in remarks[0]
    assert "1 of 3 seen classes are in none of the 2 training masks looked at (of 2): cat" in remarks[1]


def test_a_leak_into_the_training_view_stops_the_run(trees, monkeypatch):
    source, honest = sources.open_dataset("voc", trees["voc"]), sources.DataSource.table
    seen = source.seen

    def leaking(self, training):
        table = honest(self, training)
        if training:
            table[16] = seen.index(8)  # potted plants trained as chairs
        return table

    monkeypatch.setattr(sources.DataSource, "table", leaking)
    with pytest.raises(sources.DataError, match="000000.png: the training view shows 'chair', which is unseen"):
        datacheck.check(source)


def test_hidden_pixels_give_no_gradient(trees):
    """From the file to the loss: pixels of unseen classes, background and void pull at nothing."""
    source = sources.open_dataset("voc", trees["voc"])
    source.train = source.train[:1]
    _, labels = data.TrainSet(source, sources.Recipe(1, crop=96, scale=(0.6, 0.6), jitter=False))[0, 0]
    labels = data.split_padding(labels[None], (1, 1))[0][0]
    z = torch.nn.functional.normalize(torch.randn(1, 8, 96, 96), dim=1).requires_grad_()
    cross_entropy_loss(z, torch.nn.functional.normalize(torch.randn(15, 8), dim=1), labels[None], 0.07).backward()
    pulled = z.grad.abs().sum(1)[0] > 0
    assert torch.equal(pulled, labels != 255) and 0 < pulled.float().mean() < 0.5


def test_download_fetches_voc_and_says_what_is_left(tmp_path, monkeypatch, capsys, trees):
    asked = []

    def fetch(root, year, part, download):
        asked.append((root, year, download))
        tree = root / "VOCdevkit/VOC2012"
        if not tree.exists():
            shutil.copytree(trees["voc"], tree)
            shutil.rmtree(tree / AUG)

    monkeypatch.setattr(sources.torchvision.datasets, "VOCSegmentation", fetch)
    args = datacheck.parse(["--dataset", "voc", "--data-root", str(tmp_path), "--download", "--picture",
                       str(tmp_path / "check.png")])
    with pytest.raises(sources.DataError, match="SegmentationClassAug.zip .*VOCdevkit/VOC2012/SegmentationClassAug$"):
        datacheck.main(args)
    assert asked == [(tmp_path, "2012", True)]
    shutil.copytree(trees["voc"] / AUG, tmp_path / "VOCdevkit/VOC2012" / AUG)
    datacheck.main(args)
    assert "voc: 12 training images, 3 test images, 15 seen classes, 5 unseen" in capsys.readouterr().out

    def fail(*args, **kwargs):
        raise OSError("no route to host")

    monkeypatch.setattr(sources.torchvision.datasets, "VOCSegmentation", fail)
    with pytest.raises(sources.DataError, match=r"did not arrive \(no route to host\): try again"):
        datacheck.main(args)


# ---------------------------------------------------------------- the transform's colours


def test_distortion_keeps_grey_grey_and_red_red():
    grey = torch.arange(0, 256, 5, dtype=torch.uint8).expand(3, 4, -1).contiguous()
    colours = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200]], dtype=torch.uint8)[:, :, None]
    changed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        out = data.distort(grey).int()
        assert (out - out[:1]).abs().max() <= 1 and (out[0].diff() >= 0).all()
        torch.manual_seed(seed)
        out = data.distort(colours)
        assert out.dtype == torch.uint8 and out[:, :, 0].argmax(0).tolist() == [0, 1, 2]
        changed += not torch.equal(out, colours)
    assert 50 <= changed < 60  # each of the four comes in half of the cases: 1 in 16 stays as it is


def test_distortion_against_a_way_through_each_step(monkeypatch):
    image = torch.randint(60, 180, (3, 8, 9), dtype=torch.uint8)
    draws = iter([0.0, 20.0, 0.0, 0.8, 0.0, 1.3, 0.0, 30.0])  # of a coin and a value, four times
    monkeypatch.setattr(torch, "rand", lambda *_: torch.tensor(next(draws)))
    monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, *_: self.fill_(next(draws)))
    got = data.distort(image)
    x = (image.double() + 20) * 0.8
    mean = x.mean(0)
    x = mean + 1.3 * (x - mean)
    axis = torch.full((3,), 3 ** -0.5, dtype=torch.float64)
    angle = np.deg2rad(30)
    flat = x.permute(1, 2, 0)
    turned = flat * np.cos(angle) + torch.linalg.cross(axis.expand_as(flat), flat) * np.sin(angle) + \
        axis * (flat @ axis)[..., None] * (1 - np.cos(angle))  # Rodrigues
    assert (got.double() - turned.permute(2, 0, 1).clamp(0, 255)).abs().max() <= 0.501


# ---------------------------------------------------------------- metrics


def label_maps(seed, K=7):
    """Images with void, one without any label, one empty; class 5 is nowhere, class 6 only predicted."""
    rng = np.random.RandomState(seed)
    for shape in ((31, 17), (8, 8), (1, 1), (0, 5), (40, 3)):
        truth = rng.choice([0, 1, 2, 3, 4, 255], size=shape, p=[0.3, 0.2, 0.2, 0.15, 0.05, 0.1])
        prediction = np.where(rng.rand(*shape) < 0.5, truth % 5, rng.choice([0, 1, 2, 3, 4, 6], size=shape))
        yield torch.from_numpy(truth if shape != (8, 8) else np.full(shape, 255)), torch.from_numpy(prediction)


@pytest.mark.parametrize("seed", range(5))
def test_metrics_equal_torchmetrics(seed):
    classification = pytest.importorskip("torchmetrics.classification")
    K, unseen = 7, {1, 4, 6}
    peer = classification.MulticlassConfusionMatrix(K, ignore_index=255)
    matrix = torch.zeros(K, K, dtype=torch.long)
    truths, predictions = [], []
    for truth, prediction in label_maps(seed):
        matrix += evaluate.confusion(truth, prediction, K)
        if truth.numel():  # torchmetrics refuses empty images
            peer.update(prediction, truth)
        truths.append(truth.flatten())
        predictions.append(prediction.flatten())
    assert torch.equal(matrix, peer.compute())
    result = evaluate.metrics(matrix, [str(k) for k in range(K)], unseen)
    truth, prediction = torch.cat(truths), torch.cat(predictions)

    jaccard = classification.MulticlassJaccardIndex(K, average=None, ignore_index=255).set_dtype(torch.float64)
    jaccard.update(prediction, truth)
    theirs = jaccard.compute()
    valid, iou = truth != 255, {}
    for k in range(K):  # the definition, on sets of pixels
        both = ((truth == k) & (prediction == k) & valid).sum().item()
        either = (((truth == k) | (prediction == k)) & valid).sum().item()
        iou[k] = 100 * both / either if either else None
        if either:
            assert result["IoU"][str(k)] == pytest.approx(100 * theirs[k].item(), abs=1e-4)  # theirs is float32
            assert result["IoU"][str(k)] == pytest.approx(iou[k], abs=1e-9)
        else:
            assert result["IoU"][str(k)] is None and k == 5
    S, U = (np.mean([iou[k] for k in group if iou[k] is not None]) for group in ((0, 2, 3, 5), (1, 4, 6)))
    assert result["mIoU_seen"] == pytest.approx(S, abs=1e-9) and result["mIoU_unseen"] == pytest.approx(U, abs=1e-9)
    assert result["hIoU"] == pytest.approx(2 * S * U / (S + U), abs=1e-9)
    assert result["pAcc"] == pytest.approx(100 * (truth == prediction)[valid].double().mean().item(), abs=1e-9)


class ByColour(torch.nn.Module):
    """Stands for a segmenter: class k's logit is minus ten times the distance to VOC's colour of value k + 1."""

    def __init__(self, K):
        super().__init__()
        self.colours = torch.tensor(VOC_COLOURS[1:K + 1]) / 255

    def logits(self, images):
        scores = -10 * (images[:, None] - self.colours[None, :, :, None, None]).norm(dim=2)
        scores[:, 0] += 12  # a seen class that wins on many unseen pixels
        return scores


def test_unseen_only_is_another_metric_beside_the_joint_one(trees, tmp_path):
    source = sources.open_dataset("voc", trees["voc"])
    source.recipe = sources.Recipe(1, crop=100, scale=(0.1, 10), short_side=None, window=200, stride=200)
    model = ByColour(20)
    plain = evaluate.evaluate(model, source, torch.device("cpu"), 4.0)
    result = evaluate.evaluate(model, source, torch.device("cpu"), 4.0, tmp_path / "maps", unseen_only=True)
    assert {key: result[key] for key in plain} == plain and set(result) - set(plain) == {"unseen_only"}
    there, among = [], []
    unseen, truths = sorted(source.unseen), data.ValSet(source)
    for i in range(len(truths)):
        image, truth, name = truths[i]
        scores = model.logits(image[None].float() / 255)[0]
        saved = Image.open(tmp_path / "maps" / f"{name}.png")
        assert saved.mode == "P" and saved.getpalette()[:6] == [*pictures.COLOURS[0], *pictures.COLOURS[1]]
        assert np.array_equal(np.asarray(saved), scores.argmax(0).byte().numpy())
        pixels = torch.isin(truth, torch.tensor(unseen))
        there.append(truth[pixels])
        among.append(torch.tensor(unseen)[scores[unseen].argmax(0)][pixels])
    there, among = torch.cat(there), torch.cat(among)
    both = {k: ((there == k) & (among == k)).sum().item() for k in unseen}
    either = {k: ((there == k) | (among == k)).sum().item() for k in unseen}
    iou = {source.classes[k]: 100 * both[k] / max(either[k], 1) for k in unseen}
    assert result["unseen_only"]["pAcc"] == pytest.approx(100 * (there == among).double().mean().item(), abs=1e-9)
    assert {k: v or 0 for k, v in result["unseen_only"]["IoU"].items()} == pytest.approx(iou, abs=1e-9)
    assert result["unseen_only"]["pAcc"] > 90 > result["gamma_0"]["pAcc"]
    source.unseen = set()
    with pytest.raises(sources.DataError, match="no class of .* was unseen in training"):
        evaluate.evaluate(model, source, torch.device("cpu"), 0.0, unseen_only=True)


# ---------------------------------------------------------------- the commands


def command(*args, ok=True):
    done = subprocess.run([sys.executable, *map(str, args)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
                          capture_output=True, text=True, timeout=300)
    assert (done.returncode == 0) == ok, done.stdout + done.stderr
    return done


@pytest.mark.parametrize("name, strict, head", [("voc", True, "csh"), ("coco-stuff", False, "linear")])
def test_train_and_evaluate_on_an_official_tree(name, strict, head, tiny_clip_file, tmp_path):
    root, out = draw_tree(name, tmp_path / name, val=1, sides=(64, 65)), tmp_path / "run"
    status, text, words = run_inside(
        train, "--dataset", name, "--data-root", root, "--clip", tiny_clip_file, "--body", "small", "--crop", "64",
        "--steps", "2", "--batch-size", "4", "--workers", "0", "--device", "cpu", "--head", head, "--out-dir", out,
        *["--strict"] * strict)
    assert status == 0, words
    assert ("strict: 4 images that hold unseen classes are dropped" if strict else "their images kept") in text
    assert f"{name}: {8 if strict else 12} training images, 1 test images" in text
    assert "warning: 1 test images" in text and (out / "data.png").exists()
    status, text, words = run_inside(evaluate, "--run", out, "--device", "cpu", "--unseen-only", "--save-predictions",
                                     out / "maps")
    assert status == 0, words
    result = json.loads((out / "metrics.json").read_text())
    assert result["images"] == 1 and set(result["unseen_only"]) == {"pAcc", "mIoU", "IoU"}
    assert "another task, unseen pixels labelled among unseen classes alone: mIoU" in text
    assert len(list((out / "maps").iterdir())) == 1


def test_the_data_check_alone(trees, tmp_path, capsys):
    args = ["--dataset", "context-cascade-clip", "--data-root", str(trees["context"]), "--picture"]
    datacheck.main(datacheck.parse([*args, str(tmp_path / "check.png")]))
    text = capsys.readouterr().out
    assert text.startswith("context-cascade-clip: 12 training images, 3 test images, 49 seen classes, 10 unseen\n")
    assert "no error in" in text and (tmp_path / "check.png").exists()


def test_what_is_wrong_comes_before_training_in_one_line(copy, tmp_path):
    root = copy("voc")
    change(root / AUG, lowered)
    line = r"error: the training masks of voc [^\n]*lowered by one[^\n]*"
    done = command("data.py", "--dataset", "voc", "--data-root", root, ok=False)
    assert re.fullmatch(line + "\n", done.stderr), done.stderr
    args = ["--dataset", "voc", "--out-dir", str(tmp_path / "run"), "--clip", "none", "--device", "cpu", "--data-root"]
    with pytest.raises(SystemExit, match=line):
        guard.run_command(train.main, lambda: train.parse([*args, str(root)]))
    with pytest.raises(SystemExit, match="^error: no JPEGImages in (.*\n){4}.*val.txt  1,449 names$"):
        guard.run_command(train.main, lambda: train.parse([*args, str(tmp_path / "nowhere")]))
