"""Official trees and own folders: what is read, the look-up table, the data check, the advice of each error."""
import contextlib
import io
import os
import re
import shutil
import unicodedata
import zlib

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from trees import PROTOCOL, draw_tree, own_data, png, raw_value

import sources
from losses import IGNORE
from sources import check as data_check
from sources import coco_stuff, context, files, voc
from support import progress

MODULES = {"voc": voc, "coco-stuff": coco_stuff, "context": context}


@pytest.fixture(scope="module")
def trees(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees")
    return {name: draw_tree(name, folder / name) for name in MODULES}


def test_the_protocols_are_the_fields(trees):
    sizes = {name: (len(set(p["classes"])), len(p.get("unseen", p.get("unseen_zs3_lineage"))))
             for name, p in PROTOCOL.items()}
    assert sizes == {"voc": (20, 5), "coco-stuff": (171, 15), "context": (59, 10)}
    second = sources.open_dataset("context-cascade-clip", trees["context"])
    assert second.unseen == set(PROTOCOL["context"]["unseen_cascade_clip"]) and second.name == "context-cascade-clip"
    absent = sorted(set(range(182)) - set(PROTOCOL["coco-stuff"]["raw_ids"]))
    assert absent == [11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90]  # COCO's ids without pictures, minus one
    assert [PROTOCOL["voc"]["classes"][k] for k in PROTOCOL["voc"]["unseen"]] == [
        "pottedplant", "sheep", "sofa", "train", "tvmonitor"]
    with pytest.raises(sources.DataError, match="for voc and coco-stuff, not for context: .*/data.md"):
        sources.download_dataset("context")


@pytest.mark.parametrize("name", MODULES)
def test_official_trees(name, trees):
    """What is read, with which labels; the data check; --strict."""
    source, p = sources.open_dataset(name, trees[name]), PROTOCOL[name]
    unseen = set(p.get("unseen", p.get("unseen_zs3_lineage")))
    void = (255,) if name == "coco-stuff" else (0, 255)
    assert source.classes == p["classes"] and source.unseen == unseen and list(source.templates) == p["templates"]
    assert source.recipe == sources.Recipe(p["iterations"], 16, 2e-4, 1500, 512, (0.5, 2), True, "resnet50", "ViT-B/16",
                                           512, 512, 426)
    for training, part in ((False, source.val), (True, source.train)):
        for file in part:
            _, image, labels = files.read_pair(file, source.table(training), len(source.classes))
            raw = np.asarray(Image.open(file[2]))
            assert image.shape[1:] == labels.shape == raw.shape and 255 in raw
            for value in np.unique(raw):
                k = next((k for k in range(len(source.classes)) if raw_value(name, k) == value), None)
                assert (k is None) == (value in void)
                want = IGNORE if k is None or training and k in unseen else source.seen.index(k) if training else k
                assert (labels.numpy()[raw == value] == want).all()
    remarks, picture = data_check.check(source)
    train, val = p["train_images"], p["val_images"]
    assert [remark for remark in remarks if "classes are in none" not in remark] == [
        f"warning: 12 training and 3 test images, the benchmark has {train} and {val}: scores not comparable"]
    assert picture.size[0] == 2 * 192 + 6
    for part, file_list in (("training", source.train), ("test", source.val)):
        read, _ = data_check.look_at(file_list, part)
        labels = set(data_check.sample(source, part, read)[1].unique().tolist())
        assert IGNORE in labels and bool(labels & unseen) == (part == "test")
    assert sources.without_unseen(source) == [file for i, file in enumerate(source.train) if i % 3]  # as drawn
    source.train = source.train[::3]
    with pytest.raises(sources.DataError, match="all 4 training images of .* hold an unseen class"):
        sources.without_unseen(source)


@pytest.mark.parametrize("name, inside", [("voc", "VOCdevkit/VOC2012"), ("context", "VOCdevkit/VOC2010"),
                                          ("coco-stuff", "images")])
def test_each_part_may_lie_in_two_places_and_a_missing_one_shows_the_tree(name, inside, tmp_path):
    root, tree = draw_tree(name, tmp_path / name), MODULES[name].TREE
    for part in tree:
        (root / part).rename(root / "away")
        with pytest.raises(sources.DataError) as error:
            sources.open_dataset(name, root)
        first, *lines = str(error.value).split("\n")
        assert first.startswith(f"no {part} in {root}: expected this tree")
        assert (f"--dataset {name} --data-root {root} --download" in first) == (name != "context")
        assert [line.split()[0] for line in lines] == list(tree)
        (root / inside / part).parent.mkdir(parents=True, exist_ok=True)
        (root / "away").rename(root / inside / part)
        assert len(sources.open_dataset(name, root).train) == 12


def test_lists_as_people_have_them(tmp_path):
    """From Windows or a Mac, with suffixes, empty lines and repeats; file names are composed, as macOS unpacks zips."""
    decomposed = unicodedata.normalize("NFD", "é")
    root = own_data(tmp_path / "own", unseen=["dog,\u00a0puppy"],
                    classes=("caf" + decomposed, "dog,\u00a0puppy", "cat"))
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / f"{folder}/b.{suffix}").rename(root / f"{folder}/{decomposed}.{suffix}")
    (root / "train.txt").write_text("\n a.jpg \n\né.PNG\na\na.png\n" + decomposed)
    for name, code, line in (("classes", "utf-8-sig", "\r\n"), ("train", "utf-8-sig", "\r\n"), ("val", "utf-8", "\r"),
                             ("unseen", "utf-16", "\r\n")):
        words = (root / f"{name}.txt").read_text()
        (root / f"{name}.txt").write_bytes(words.replace("\n", line).encode(code))
    source = sources.open_dataset(root)
    assert source.classes == ["café", "dog, puppy", "cat"] and source.unseen == {1}
    assert [name for name, *_ in source.train] == ["a", "é"] and source.name == str(root)
    data_check.check(source)
    (root / "unseen.txt").unlink()
    assert sources.open_dataset(root).unseen == set()


@pytest.mark.parametrize("words", [
    "cat\n\ndog", "\ncat\ndog", "# animals\ncat\ndog", "cat\ndog # a puppy", "cat\x85dog\nsky", "cat\u2028dog\nsky",
    "cat\x0cdog\nsky", "cat\tdog\nsky", "cat\n\ufeffdog", "caf\ufffd\ndog", "cat\ndog".encode("utf-16-le"),
    "cat\ndog".encode("utf-32"), "café\ndog".encode("latin-1"), "猫\n犬".encode("shift-jis"), "x" * 10**6 + "\ndog",
    "cat\n" + "a b" * 3 * 10**5, "0 cat\n1 dog", "1: cat\n2: dog", '["cat",\n"dog"]', "'cat'\n'dog'", "cat\n!!!",
    "{\\rtf1 cat\\\ndog}", "cat, \n,\n", "// animals\ncat\ndog", "cat; puss\ndog", "cat，puss\ndog", "cat\u200b\ndog"])
def test_lists_that_would_be_read_otherwise_than_meant_are_refused(words, tmp_path):
    root = own_data(tmp_path / "own")
    (root / "classes.txt").write_bytes(words if isinstance(words, bytes) else words.encode())
    with pytest.raises(sources.DataError, match="classes.txt.*UTF-8") as error:
        sources.open_dataset(root)
    assert len(str(error.value)) < 400 and len(str(error.value).splitlines()) == 1


LABELS, NOTE = np.arange(60).reshape(6, 10), b"long\0" + b"x" * (3 << 20)
PROFILE = b"icc\0\0" + zlib.compress(bytes(3 << 20))
MASKS = {"grey of 4 bits": ((LABELS % 16, 4), LABELS % 16), "grey of 2 bits": ((LABELS % 4, 2), LABELS % 4),
         "8 bits": ((LABELS,), LABELS), "16 bits with small values": ((LABELS, 16), LABELS),
         "palette of 4 bits": ((LABELS % 16, 4, 3, (b"PLTE", bytes(range(48)))), LABELS % 16),
         "palette of 1 bit": ((LABELS % 2, 1, 3, (b"PLTE", bytes(6))), LABELS % 2),
         "a long note": ((LABELS, 8, 0, (b"tEXt", NOTE)), LABELS),
         "a large profile": ((LABELS, 8, 0, (b"iCCP", PROFILE)), LABELS),
         "a packed note": ((LABELS, 8, 0, (b"zTXt", b"a\0\0" + zlib.compress(NOTE))), LABELS)}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_are_read_as_they_are_stored_and_a_flipped_bit_is_seen(kind, tmp_path):
    how, want = MASKS[kind]
    path, good = tmp_path / "a.png", png(*how)
    path.write_bytes(good)
    got = files.read_values(path)
    assert got.dtype == np.uint8 and np.array_equal(got, want)
    assert files.read_image(path).shape == (3, 6, 10)
    for at in [*range(8, 60), *range(len(good) - 40, len(good) - 12)]:
        path.write_bytes(good[:at] + bytes([good[at] ^ 1 << at % 8]) + good[at + 1:])
        with pytest.raises(sources.DataError, match="cannot read the mask .*a.png .*: expected a whole PNG"):
            files.read_values(path)
    path.write_bytes(good[:len(good) // 2])
    with pytest.raises(sources.DataError, match="a.png"):
        files.read_values(path)


def tiff(values):
    out = io.BytesIO()
    Image.fromarray(values).save(out, "TIFF")
    return out.getvalue()


RAMP = np.linspace(0, 1, 60).reshape(6, 10)
DEEP = [  # a picture, and if it is refused: why
    *((png((RAMP * white).round(), 16), None) for white in (255, 4095, 65535)),
    (png(np.stack(3 * [RAMP * 65535], 2), 16, 2), None), (tiff((RAMP * 4095).round().astype(np.uint16)), None),
    (tiff(RAMP.astype(np.float32)), None), (tiff((RAMP * 255).astype(np.float32)), None),
    (tiff((RAMP * 65535).astype(np.int32)), None),
    (png(np.stack(3 * [RAMP * 4095], 2), 16, 2), "black: its 16 bits hold only values below 4,096"),
    (tiff(RAMP.astype(np.float32) - 1), "values go from -1 to 0: expected 0 to 1"),
    (tiff(np.full((6, 10), np.nan, np.float32)), "values go from nan"),
    (tiff(RAMP.astype(np.float32) * 1.5), "values go from 0 to 1.5")]


@pytest.mark.parametrize("stored, refused", DEEP)
def test_pictures_of_other_depths_are_as_bright_as_they_are_meant(stored, refused, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(stored)
    with pytest.raises(sources.DataError, match=f"a.png .*{refused}") if refused else contextlib.nullcontext():
        assert np.abs(files.read_image(path).numpy() - 255 * RAMP).max() <= 1


def test_own_pictures_that_exif_turns_are_refused_and_the_benchmarks_are_read_as_stored(tmp_path, trees):
    own, voc_root, exif = own_data(tmp_path / "own"), shutil.copytree(trees["voc"], tmp_path / "voc"), Image.Exif()
    for name, root, folder in ((str(own), own, "images"), ("voc", voc_root, "JPEGImages")):
        path = min((root / folder).iterdir())
        before = files.read_image(path)
        for note in (1, 3):
            exif[0x112] = note
            Image.open(path).save(path, quality=100, subsampling=0, exif=exif)
            source = sources.open_dataset(name, root)
            refused = pytest.raises(sources.DataError, match="a.jpg .its EXIF note turns it")
            with refused if note == 3 and name != "voc" else contextlib.nullcontext():
                image = files.read_pair(source.train[0], source.table(True), 3)[1]
                assert (image.float() - before.float()).abs().mean() < 3
                data_check.check(source)


def test_programs_pipes_and_folders_among_the_data(tmp_path, monkeypatch):
    """PostScript under the name of a picture: Pillow would give it to Ghostscript, which can run programs."""
    path, started = tmp_path / "a.png", []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    for read in (files.read_image, files.read_values):
        with pytest.raises(sources.DataError, match="a.png"):
            read(path)
    os.mkfifo(tmp_path / "b.png")
    (tmp_path / "c.png").mkdir()
    (tmp_path / "._d.png").write_bytes(b"of macOS")
    assert list(files.list_files(tmp_path, (".png",))) == ["a"] and not started


def text(name, words):
    return lambda root: (root / name).write_text(words, "latin-1")


def remove(name):
    return lambda root: (root / name).unlink()


def masks(pattern, function):
    """Changes the raw values of these masks; what the function makes is an array or an image."""
    def spoil(root):
        for path in sorted(root.glob(pattern)):
            made = function(np.array(Image.open(path)))
            (made if isinstance(made, Image.Image) else Image.fromarray(made.astype(np.uint8))).save(path)
    return spoil


def raised(raw):
    return np.where(raw == 255, raw, raw + 1)


B, AUG = "masks/b.png", "SegmentationClassAug/*"
BROKEN = [
    ("own", remove("val.txt"), "no file .*val.txt: expected a text file"),
    ("own", text("train.txt", "\n"), "train.txt is empty"),
    ("own", text("train.txt", "../images/a\nb\n"), "names '../images/a', but .*images itself holds no image of that"),
    *(("own", text("train.txt", f"{name}\nb\n"), "names .*, but .* no image of that name") for name in (
        "/etc/passwd", "..", "~", "$(touch ran)", "{0.__class__}", "%s%n", "x" * 900)),
    ("own", lambda r: [p.rename(p.with_stem(f"{p.stem}_mask")) for p in r.glob("masks/*")],
     "names 'a' .and 1 more., but .*masks itself holds no mask of that name .a_mask.png, for .*letter for letter"),
    ("own", lambda r: (r / "images").rename(r / "x") and shutil.copytree(r / "x", r / "images/x"),
     "no .jpg or .jpeg or .png file in .*images itself: folders in it are not searched"),
    ("own", lambda r: [p.rename(p.with_suffix(".jpg")) for p in r.glob("masks/*")], "no .png file in .*must be PNG"),
    ("own", lambda r: shutil.copy(r / "masks/a.png", r / "images/a.png"), "holds a.jpg and a.png: keep one"),
    ("own", text("unseen.txt", "Cat\n"), "'Cat', which is not a line of classes.txt: copy the whole line"),
    ("own", text("unseen.txt", "cat\ndog\n"), "has 1 seen of 3 classes, expected at least 2"),
    ("own", text("classes.txt", "a b, Cat\nsky\ndog, cat\n"), "'a b, Cat' and 'dog, cat' share the name 'cat'"),
    ("own", text("classes.txt", "potted_plant\nsky\npotted plant\n"), "'potted_plant' and 'potted plant' share"),
    ("own", text("classes.txt", "\n".join(f"class{k}" for k in range(255))), "255 lines, expected .* 254 at most"),
    ("own", text("classes.txt", "\n".join("abc") + " very long" * 80), "too long for CLIP: .*77"),
    ("own", masks(B, lambda m: Image.fromarray(m.astype(np.uint16) * 257)), "b.png has .* values up to 65535:"),
    ("own", masks(B, lambda m: np.stack([m, m * 3, m], -1)), "b.png has Pillow's mode RGB .* one channel of 8 bits"),
    ("own", lambda r: Image.open(r / B).convert("L").save(r / B, "JPEG"), "b.png .damaged or another format.: .* PNG"),
    ("own", text("images/b.jpg", "\0\0\0\x18ftypheic"), "b.jpg .damaged or another format.: .* JPEG, .*replace it"),
    ("own", masks(B, lambda m: m[1:]), "70×80 pixels, its mask .* is 69×80, .*: turn or scale the mask"),
    ("own", masks("masks/*", raised), "hold 3, but .* 0 sky … 2 cat: .*from 0, and 255 .* .values here: 1, 2, 3.$"),
    ("own", masks("masks/*", lambda m: np.where(m, 255, 0)), "hold 0 and 255 alone, .*: write 1 for the object"),
    ("own", masks("masks/*", lambda m: m * 0 + 255), "no training mask of .* has a pixel of a seen class"),
    ("voc", masks(AUG, lambda m: m - np.uint8(1)), r"training masks of voc hold 0 .background. [\d,]+ times.*shifted"),
    ("voc", masks(AUG, raised), "hold 0 .background. 0 times, .*shifted by one"),
    ("voc", masks("*Aug/2007_000000.png", lambda m: m * 0 + 21), "1 of 12 training masks .* hold 21, which is no"),
    ("coco-stuff", remove("stuffthingmaps/train2017/2007_000003.png"), "'2007_000003', but .* no mask of that name"),
    ("coco-stuff", masks("*/val2017/*.png", raised), "test masks .* hold 182, which is no class.*as they come"),
]


@pytest.mark.parametrize("name, spoil, message", BROKEN, ids=[message for *_, message in BROKEN])
def test_broken_data_gives_one_line_that_says_what_to_do(name, spoil, message, tmp_path):
    root = own_data(tmp_path / "own") if name == "own" else draw_tree(name, tmp_path / name)
    spoil(root)
    with pytest.raises(sources.DataError, match=message) as error:
        data_check.check(sources.open_dataset(str(root) if name == "own" else name, root))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


def test_the_whole_check_reads_every_file_and_names_each_kind_of_fault(tmp_path, capsys, monkeypatch):
    """One value too many in one of 230 masks, as in ADE20K's 0 to 150: a quick look at 100 sees nothing."""
    root, labels = own_data(tmp_path / "own", classes=[f"class{k}" for k in range(5)]), np.arange(36).reshape(6, 6) % 5
    monkeypatch.setattr(progress, "EVERY", 0)
    for stem in (stems := [f"{i:03d}" for i in range(230)]):
        Image.new("RGB", (6, 6)).save(root / f"images/{stem}.jpg")
        (root / f"masks/{stem}.png").write_bytes(png(labels))
    (root / "train.txt").write_text("\n".join(stems))
    args = data_check.parse(["--dataset", str(root), "--picture", str(tmp_path / "check.png")])
    data_check.main(args)
    assert re.search(r"training images: \d+ of 230 read, 0:00:\d\d left\n(.*\n)*no error", capsys.readouterr().out)
    (root / "masks/001.png").write_bytes(png(np.where(labels, labels, 5)))
    assert f"looked at up to 100 images of each part: `python data.py --dataset {root}`" in data_check.check(
        sources.open_dataset(root))[0][-1]
    (root / "masks/002.png").write_bytes(png(labels)[:-30])
    for stem in ("004", "005", "007", "008"):
        (root / f"images/{stem}.jpg").write_bytes(b"x")
    with pytest.raises(sources.DataError, match="own: 3 kinds of faults, each named above"):
        data_check.main(args)
    assert re.search("1 of 225 training masks .*001.png, hold 5, .*0 class0 … 4 class4: .*\n"
                     "cannot read the mask .*002.png .* .in 1 of 230 files: 002.\ncannot read the image .*004.jpg .*"
                     "in 4 of 230 files: 004, 005, 007, …", capsys.readouterr().out)


def test_remarks_of_the_data_check(tmp_path):
    root = own_data(tmp_path / "named", (0, 1), ("background", "dog", "cat"))
    (root / "val.txt").write_text("b\n")
    remarks, _ = data_check.check(sources.open_dataset(root))
    assert "'background' is a class, but CLIP cannot know" in remarks[0] and "such as b.jpg" in remarks[1]
    assert "1 of 3 seen classes are in none of the 2 training masks looked at (of 2): cat" in remarks[2]


@pytest.mark.parametrize("value, label", [(16, 8), (255, 3), (3, 4), (3, 99)])
def test_a_leak_into_the_training_view_stops_the_run(value, label, trees, monkeypatch):
    """Potted plants, void pixels or birds trained as another class: found without a mask that shows them."""
    source = sources.open_dataset("voc", trees["voc"])
    table = source.table(training=True)
    table[value] = label
    monkeypatch.setattr(sources.DataSource, "table", lambda self, training: table)
    with pytest.raises(sources.DataError, match=f"mask value {value} of voc would be trained as label {label}"):
        data_check.check(source)
