"""Official trees and own folders: what is read, the look-up table, the data check, the advice of each error."""
import contextlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image
from trees import PROTOCOL, draw_tree, own_data, raw_value

import sources
from losses import IGNORE
from sources import check as data_check
from sources import coco_stuff, context, files, voc

MODULES = {"voc": voc, "coco-stuff": coco_stuff, "context": context}
SAMPLE = Path(os.environ.get("VOC_SAMPLE", Path(__file__).parents[2] / "shared" / "voc"))  # a few real pictures


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return {name: draw_tree(name, folder / name) for name in MODULES}


@pytest.fixture
def copy(trees, tmp_path):
    return lambda name: shutil.copytree(trees[name], tmp_path / name)


# ---------------------------------------------------------------- what is read


def test_the_protocols_are_the_fields():
    sizes = {name: (len(set(p["classes"])), len(p.get("unseen", p.get("unseen_zs3_lineage"))))
             for name, p in PROTOCOL.items()}
    assert sizes == {"voc": (20, 5), "coco-stuff": (171, 15), "context": (59, 10)}
    absent = sorted(set(range(182)) - set(PROTOCOL["coco-stuff"]["raw_ids"]))
    assert absent == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # COCO's ids without pictures, minus one
    assert [PROTOCOL["voc"]["classes"][k] for k in PROTOCOL["voc"]["unseen"]] == [
        "pottedplant", "sheep", "sofa", "train", "tvmonitor"]


@pytest.mark.parametrize("name", MODULES)
def test_official_trees(name, trees, tmp_path):
    source, p = sources.open_dataset(name, trees[name]), PROTOCOL[name]
    unseen = set(p.get("unseen", p.get("unseen_zs3_lineage")))
    void = (255,) if name == "coco-stuff" else (0, 255)
    assert (len(source.train), len(source.val)) == (12, 3)
    assert source.classes == p["classes"] and source.unseen == unseen and list(source.templates) == p["templates"]
    assert source.recipe == sources.Recipe(p["iterations"], 16, 2e-4, 1500, 512, (0.5, 2.0), True, "resnet50",
                                           "ViT-B/16", 512, 512, 426)
    for training, part in ((False, source.val), (True, source.train)):
        table = source.table(training)
        for file in part:
            _, image, labels = files.read_pair(file, table, len(source.classes))
            raw = np.asarray(Image.open(file[2]))
            assert image.shape[1:] == labels.shape == raw.shape and 255 in raw
            for value in np.unique(raw):
                k = next((k for k in range(len(source.classes)) if raw_value(name, k) == value), None)
                assert (k is None) == (value in void)
                want = IGNORE if k is None or training and k in unseen else source.seen.index(k) if training else k
                assert (labels.numpy()[raw == value] == want).all()
    kept = sources.without_unseen(source)
    assert kept == [file for i, file in enumerate(source.train) if i % 3]  # as drawn
    remarks = data_check.check(source, tmp_path / "check.png")
    counts = MODULES[name].COUNTS
    assert [remark for remark in remarks if "benchmark" in remark] == [
        f"warning: {n} {part} images, the benchmark has {count}: scores not comparable"
        for n, part, count in ((12, "training", counts[0]), (3, "test", counts[1]))]
    assert all("classes are in none" in remark for remark in remarks if "benchmark" not in remark)
    sheet = Image.open(tmp_path / "check.png")
    assert sheet.size[0] == 2 * 192 + 6 and len(sheet.getcolors(1 << 20)) > 5
    source.train = source.train[::3]
    with pytest.raises(sources.DataError, match="all 4 training images of .* hold an unseen class"):
        sources.without_unseen(source)


def test_recipes_at_another_crop_and_what_departs_from_a_benchmark(trees, tmp_path):
    source = sources.open_dataset("voc", trees["voc"])
    half = source.recipe.at_crop(256)
    assert (half.crop, half.short_side, half.window, half.stride) == (256, 256, 256, 213)
    assert source.departures(crop=512, steps=20000, batch_size=16) == ""
    assert source.departures(crop=256, batch_size=8) == "crop 256 instead of 512, batch size 8 instead of 16"
    own = sources.open_dataset(own_data(tmp_path / "own"))
    assert own.departures(crop=256) == "" and own.recipe.short_side == 512  # tested as VOC is
    assert sources.TOY.at_crop(64) == sources.TOY and sources.TOY.short_side == 64


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
    assert second.unseen == set(PROTOCOL["context"]["unseen_cascade_clip"]) != first.unseen
    assert (first.name, second.name) == ("context", "context-cascade-clip") and first.train == second.train


@pytest.mark.skipif(not SAMPLE.is_dir(), reason="no sample of VOC's own files")
def test_real_pictures_of_voc(tmp_path):
    source = sources.open_dataset("voc", SAMPLE)
    assert len(source.train) == 30 and len(source.val) == len(files.read_lines(SAMPLE / voc.VAL))
    assert not {name for name, *_ in source.train} & {name for name, *_ in source.val}
    for name, _, mask in source.val:  # VOC's own masks and those of SegmentationClassAug are the same
        assert np.array_equal(files.read_values(mask), files.read_values(SAMPLE / voc.AUG / f"{name}.png"))
    remarks = data_check.check(source, tmp_path / "check.png")
    assert all("images, the benchmark has" in remark or "classes are in none" in remark for remark in remarks)


# ---------------------------------------------------------------- lists and masks as people have them


def test_lists_from_windows_and_names_with_suffixes(tmp_path):
    root = own_data(tmp_path / "own", unseen=["dog, puppy"], classes=("café", "dog, puppy", "cat"))
    for name, mark in (("classes", b"\xef\xbb\xbf"), ("train", b"\xef\xbb\xbf"), ("val", b""), ("unseen", b"\xff\xfe")):
        text = (root / f"{name}.txt").read_text().replace("\n", "\r\n\r\n").replace("a\r", " a.jpg \r")
        text = text.replace("b\r", "b.PNG\r")
        (root / f"{name}.txt").write_bytes(mark + text.encode("utf-16-le" if mark == b"\xff\xfe" else "utf-8"))
    (root / "images/._a.jpg").write_bytes(b"of macOS")
    source = sources.open_dataset(root)
    assert source.classes == ["café", "dog, puppy", "cat"] and source.unseen == {1}
    assert [name for name, *_ in source.train] == ["a", "b"] and source.name == str(root)
    (root / "unseen.txt").unlink()
    assert sources.open_dataset(root).unseen == set()


def mask_of(change):
    def spoil(root):
        path = root / "masks/b.png"
        change(np.array(Image.open(path))).save(path)
    return spoil


def text(name, data):
    return lambda root: (root / name).write_bytes(data if isinstance(data, bytes) else data.encode())


def sixteen(values):
    return Image.fromarray(values.astype(np.uint16))


OWN = {
    "no list": (lambda r: (r / "val.txt").unlink(), "no file .*val.txt: expected a text file"),
    "empty list": (text("train.txt", "\n"), "train.txt is empty"),
    "latin-1": (text("classes.txt", b"caf\xe9\n"), "classes.txt as UTF-8 text: save it again with the encoding UTF-8"),
    "folder in names": (text("train.txt", "images/a\nb\n"), "names 'images/a', but .*without folder"),
    "path": (text("train.txt", "../../etc/passwd\n"), "names '../../etc/passwd', but .*images holds no such image"),
    "no image": (lambda r: (r / "images/b.jpg").unlink(), "train.txt names 'b', but .*images holds no such image"),
    "mask named otherwise": (lambda r: (r / "masks/b.png").rename(r / "masks/b_mask.png"),
                             r"names 'b', but .*masks holds no such mask: .*each needs an image and a mask"),
    "masks as JPEG": (lambda r: [p.rename(p.with_suffix(".jpg")) for p in sorted((r / "masks").iterdir())],
                      "no .png file in .*masks: it holds a.jpg; masks must be PNG, as JPEG"),
    "two images": (lambda r: shutil.copy(r / "masks/a.png", r / "images/a.png"), "holds a.jpg and a.png: keep one"),
    "unseen": (text("unseen.txt", "Cat\n"), "'Cat', which is not a line of classes.txt: copy the whole line"),
    "too few seen": (text("unseen.txt", "cat\ndog\n"), "has 1 seen of 3 classes, expected at least 2"),
    "one class": (text("classes.txt", "cat\n"), "has 1 seen of 1 classes"),
    "twice": (text("classes.txt", "a\nb\na\n"), "names 'a' twice: give the second another name"),
    "synonym twice": (text("classes.txt", "rocket, missile\nsky\nprojectile, Missile\n"),
                      "'rocket, missile' and 'projectile, Missile' share the name 'missile'"),
    "underscore": (text("classes.txt", "potted_plant\nsky\npotted plant\n"), "'potted_plant' and 'potted plant' share"),
    "too many": (text("classes.txt", "\n".join(map(str, range(255)))), "255 lines, expected .* 254 at most"),
    "16 bits": (mask_of(lambda m: sixteen(m.astype(int) * 257)),
                "b.png has 16 bits and holds the value 65535: .*255 where no"),
    "RGB": (mask_of(lambda m: Image.fromarray(np.stack([m, m * 3, m], -1))), "is RGB, .*write each colour's class"),
    "equal RGB": (mask_of(lambda m: Image.fromarray(m).convert("RGB")), r"channels are equal, so .*getchannel\(0\)"),
    "1 bit": (mask_of(lambda m: Image.fromarray(m > 0)), "b.png has 1 bit a pixel, .*save it with 8 bits"),
    "value": (mask_of(lambda m: Image.fromarray(m * 0 + 77)), "the value 77, which none of the 3 .*0 to 2, and 255"),
    "size": (mask_of(lambda m: Image.fromarray(m[1:])), "70×80 pixels, its mask .* is 69×80, .*: scale the mask to"),
    "turned": (mask_of(lambda m: Image.fromarray(m.T.copy())), "its mask .* is 80×70, .*EXIF"),
    "image": (text("images/b.jpg", b"\xff\xd8\xff"), "cannot read the image .*b.jpg .*replace it or leave it out"),
    "mask": (text("masks/b.png", "no png"), "cannot read the mask .*b.png .*expected a whole PNG"),
    "void alone": (lambda r: [Image.fromarray(np.full((70, 80), 255, np.uint8)).save(r / f"masks/{n}.png")
                              for n in "ab"], "no training mask of .* has a pixel of a seen class"),
}


@pytest.mark.parametrize("case", OWN)
def test_broken_folders_say_what_to_do(case, tmp_path):
    spoil, message = OWN[case]
    root = own_data(tmp_path / "own")
    spoil(root)
    with pytest.raises(sources.DataError, match=message) as error:
        data_check.check(sources.open_dataset(root))
    assert "\n" not in str(error.value)


def test_advice_is_right(tmp_path):
    """Small values in 16 bits are read; what the error of a grey RGB mask says to do mends it."""
    root = own_data(tmp_path / "own")
    right = files.read_values(root / "masks/b.png")
    mask_of(sixteen)(root)
    assert np.array_equal(files.read_values(root / "masks/b.png"), right)
    mask_of(lambda m: Image.fromarray(m.astype(np.uint8)).convert("RGB"))(root)
    mask_of(lambda m: Image.fromarray(m).getchannel(0))(root)
    assert np.array_equal(files.read_values(root / "masks/b.png"), right)


def test_programs_pipes_and_folders_among_the_data(tmp_path, monkeypatch):
    """PostScript under the name of a picture: Pillow would give it to Ghostscript, which can run programs."""
    path, started = tmp_path / "a.png", []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    assert Image.open(path).format == "EPS"
    for read in (files.read_image, files.read_values):
        with pytest.raises(sources.DataError, match="a.png"):
            read(path)
    os.mkfifo(tmp_path / "b.png")  # would be waited for
    (tmp_path / "c.png").mkdir()
    assert list(files.list_files(tmp_path, (".png",))) == ["a"] and not started
    with pytest.raises(sources.DataError, match="no file .*b.png"):
        files.read_lines(tmp_path / "b.png")


def test_an_unknown_data_set_and_a_broken_call_say_so(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(sources.DataError, match="coco is no data set, .* no folder coco: expected toy, voc"):
        sources.open_dataset("coco")
    for name, message in (("toy", "toy has nothing to fetch"), ("context", "has no --download: .*docs/data.md")):
        with pytest.raises(sources.DataError, match=message):
            sources.download_dataset(name)
    with contextlib.suppress(sources.DataError):
        sources.open_dataset("voc")
    assert not list(tmp_path.iterdir())  # nothing was made


# ---------------------------------------------------------------- the data check


def change(folder, function, count=None):
    for path in sorted(folder.iterdir())[:count]:
        Image.fromarray(function(np.array(Image.open(path))).astype(np.uint8)).save(path)


def lowered(raw):  # what "reduce zero label" leaves on the disk
    return raw - np.uint8(1)


def raised(raw):
    return np.where(raw == 255, raw, raw + 1)


AUG, MAPS = "SegmentationClassAug", "stuffthingmaps/train2017"
BROKEN = {
    "lowered by one": ("voc", lambda r: change(r / AUG, lowered), "the training masks of voc hold more 255.*lowered"),
    "raised by one": ("voc", lambda r: change(r / AUG, raised), r"never hold 0, they look raised by one.*1 aeroplane"),
    "val lowered": ("voc", lambda r: change(r / "SegmentationClass", lowered), "the test masks of voc .*lowered by"),
    "background a class": ("voc", lambda r: change(r / AUG, lambda m: np.where(m == 0, 21, m), 2),
                           "000000.png holds the value 21, which none of the 20 classes has: expected 0 to 20"),
    "one mask": ("coco-stuff", lambda r: (r / MAPS / "000000000003.png").unlink(), "'000000000003', but .*such mask"),
    "absent id": ("coco-stuff", lambda r: change(r / MAPS, lambda m: np.where(m == 0, 11, m)),
                  "hold 11, an id that stuffthingmaps never use.*trainval2017.zip"),
    "one-based maps": ("coco-stuff", lambda r: change(r / "stuffthingmaps/val2017", raised), "hold 182, an id"),
    "id outside": ("context", lambda r: change(r / "SegmentationClassContext", lambda m: np.where(m == 1, 61, m), 1),
                   r"2007_000000.png holds the value 61, which none of the 59"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_trees_give_one_line(case, copy):
    name, spoil, message = BROKEN[case]
    root = copy(name)
    spoil(root)
    with pytest.raises(sources.DataError, match=message) as error:
        data_check.check(sources.open_dataset(name, root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", MODULES)
def test_a_missing_part_shows_the_tree(name, copy):
    root, tree = copy(name), MODULES[name].TREE
    for part in tree:
        (root / part).rename(root / "away")
        with pytest.raises(sources.DataError) as error:
            sources.open_dataset(name, root)
        lines = str(error.value).split("\n")
        assert lines[0].startswith(f"no {part} in {root}: expected this tree")
        assert (f"--dataset {name} --data-root {root} --download" in lines[0]) == (name != "context")
        assert [line.split()[0] for line in lines[1:]] == list(tree)
        (root / "away").rename(root / part)


def test_own_masks_that_count_from_one_or_keep_background(tmp_path):
    for name, values, message in (("one", (1, 2, 3), "3 lines of classes.txt are 0 sky … 2 cat: lower all by one"),
                                  ("background", (0, 1, 2, 3), "if 0 is background, make it 255 and lower the others")):
        with pytest.raises(sources.DataError, match="hold 3, but the .*" + message):
            data_check.check(sources.open_dataset(own_data(tmp_path / name, values)))
    root = own_data(tmp_path / "named", (0, 1), ("background", "dog", "cat"))
    (root / "val.txt").write_text("b\n")
    remarks = data_check.check(sources.open_dataset(root))
    assert "'background' is a class, but CLIP cannot know" in remarks[0] and "such as b.jpg" in remarks[1]
    assert "1 of 3 seen classes are in none of the 2 training masks looked at (of 2): cat" in remarks[2]


@pytest.mark.parametrize("value, label", [(16, 8), (255, 3), (3, 4), (3, 99)])
def test_a_leak_into_the_training_view_stops_the_run(value, label, trees, monkeypatch):
    """Potted plants, void pixels or birds trained as another class: found without a mask that shows them."""
    source, honest = sources.open_dataset("voc", trees["voc"]), sources.DataSource.table

    def leaking(self, training):
        table = honest(self, training)
        if training:
            table[value] = label
        return table

    monkeypatch.setattr(sources.DataSource, "table", leaking)
    shown = source.classes[label] if label < 15 else label
    with pytest.raises(sources.DataError, match=f"mask value {value} of voc would be trained as '?{shown}"):
        data_check.check(source)


def test_the_picture_shows_a_training_image_as_the_losses_see_it(trees, tmp_path):
    source = sources.open_dataset("voc", trees["voc"])
    image, labels = data_check.sample(source, source.train, "training")
    assert set(labels.unique().tolist()) <= {IGNORE, *source.seen} and (labels == IGNORE).any()
    _, test_labels = data_check.sample(source, source.val, "test")
    assert set(test_labels.unique().tolist()) & source.unseen and image.dtype == torch.uint8
