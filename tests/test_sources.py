"""Official trees and own folders: what is read, the look-up table, the data check, the advice of each error."""
import os
import shutil

import numpy as np
import pytest
from PIL import EpsImagePlugin, Image
from trees import PROTOCOL, draw_tree, own_data, raw_value

import sources
from losses import IGNORE
from sources import check as data_check
from sources import coco_stuff, context, files, voc

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


@pytest.mark.parametrize("name", MODULES)
def test_official_trees(name, trees, tmp_path):
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
    remarks = data_check.check(source, tmp_path / "check.png")
    train, val = MODULES[name].COUNTS
    assert [remark for remark in remarks if "classes are in none" not in remark] == [
        f"warning: 12 training images, the benchmark has {train}: scores not comparable",
        f"warning: 3 test images, the benchmark has {val}: scores not comparable"]
    assert Image.open(tmp_path / "check.png").size[0] == 2 * 192 + 6
    for part, file_list in (("training", source.train), ("test", source.val)):
        labels = set(data_check.sample(source, file_list, part)[1].unique().tolist())
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


def test_lists_from_windows_names_with_suffixes_and_masks_of_16_bits(tmp_path):
    root = own_data(tmp_path / "own", unseen=["dog, puppy"], classes=("café", "dog, puppy", "cat"))
    (root / "train.txt").write_text(" a.jpg \nb.PNG\n")
    for name, code in (("classes", "utf-8-sig"), ("train", "utf-8-sig"), ("val", "utf-8"), ("unseen", "utf-16")):
        text = (root / f"{name}.txt").read_text().replace("\n", "\r\n\r\n")
        (root / f"{name}.txt").write_bytes(text.encode(code))
    source = sources.open_dataset(root)
    assert source.classes == ["café", "dog, puppy", "cat"] and source.unseen == {1}
    assert [name for name, *_ in source.train] == ["a", "b"] and source.name == str(root)
    (root / "unseen.txt").unlink()
    assert sources.open_dataset(root).unseen == set()
    mask = root / "masks/b.png"
    before = files.read_values(mask)
    Image.fromarray(before.astype(np.uint16)).save(mask)
    assert np.array_equal(files.read_values(mask), before)


def test_programs_pipes_and_folders_among_the_data(tmp_path, monkeypatch):
    """PostScript under the name of a picture: Pillow would give it to Ghostscript, which can run programs."""
    path, started = tmp_path / "a.png", []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args, **_: started.append(args))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    for read in (files.read_image, files.read_values):
        with pytest.raises(sources.DataError, match="a.png"):
            read(path)
    os.mkfifo(tmp_path / "b.png")  # would be waited for
    (tmp_path / "c.png").mkdir()
    (tmp_path / "._d.png").write_bytes(b"of macOS")
    assert list(files.list_files(tmp_path, (".png",))) == ["a"] and not started
    with pytest.raises(sources.DataError, match="no file .*b.png"):
        files.read_lines(tmp_path / "b.png")


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
    ("own", text("classes.txt", "café\n"), "classes.txt as UTF-8 text: save it again with the encoding UTF-8"),
    ("own", text("train.txt", "../images/a\nb\n"), "names '../images/a', but .*images holds no such image: .*without"),
    ("own", remove(B), "names 'b', but .*masks holds no such mask: .*each needs an image and a mask"),
    ("own", lambda r: [p.rename(p.with_suffix(".jpg")) for p in r.glob("masks/*")], "holds a.jpg; masks must be PNG"),
    ("own", lambda r: shutil.copy(r / "masks/a.png", r / "images/a.png"), "holds a.jpg and a.png: keep one"),
    ("own", text("unseen.txt", "Cat\n"), "'Cat', which is not a line of classes.txt: copy the whole line"),
    ("own", text("unseen.txt", "cat\ndog\n"), "has 1 seen of 3 classes, expected at least 2"),
    ("own", text("classes.txt", "a\nb\na\n"), "names 'a' twice: give the second another name"),
    ("own", text("classes.txt", "a b, Cat\nsky\ndog, cat\n"), "'a b, Cat' and 'dog, cat' share the name 'cat'"),
    ("own", text("classes.txt", "potted_plant\nsky\npotted plant\n"), "'potted_plant' and 'potted plant' share"),
    ("own", text("classes.txt", "cat\n, \nsky\n"), "the class ',' has no name: give it a word"),
    ("own", text("classes.txt", "\n".join(map(str, range(255)))), "255 lines, expected .* 254 at most"),
    ("own", masks(B, lambda m: Image.fromarray(m.astype(np.uint16) * 257)), "16 bits and holds the value 65535"),
    ("own", masks(B, lambda m: np.stack([m, m * 3, m], -1)), "is RGB, .*write each colour's class"),
    ("own", masks(B, lambda m: np.stack([m, m, m], -1)), r"channels are equal, so .*getchannel\(0\)"),
    ("own", masks(B, lambda m: Image.fromarray(m > 0)), "b.png has 1 bit a pixel, .*save it with 8 bits"),
    ("own", masks(B, lambda m: m * 0 + 77), "the value 77, which none of the 3 .*0 to 2, and 255"),
    ("own", masks(B, lambda m: m[1:]), "70×80 pixels, its mask .* is 69×80, .*: scale the mask to"),
    ("own", masks(B, lambda m: m.T), "its mask .* is 80×70, .*EXIF"),
    ("own", text("images/b.jpg", "ÿØÿ"), "cannot read the image .*b.jpg .*replace it or leave it out"),
    ("own", text(B, "no png"), "cannot read the mask .*b.png .*expected a whole PNG"),
    ("own", masks("masks/*", lambda m: m * 0 + 255), "no training mask of .* has a pixel of a seen class"),
    ("own", masks("masks/*", raised), "hold 3, but the 3 lines of classes.txt are 0 sky … 2 cat: lower all by one"),
    ("own", masks("masks/*", lambda m: np.where(m == 2, 3, m)), "hold 3, but .*: if 0 is background, make it 255"),
    ("voc", masks(AUG, lambda m: m - np.uint8(1)), "the training masks of voc hold more 255.*lowered"),
    ("voc", masks(AUG, raised), r"never hold 0, they look raised by one.*1 aeroplane"),
    ("voc", masks("*Aug/2007_000000.png", lambda m: m * 0 + 21), "the value 21, which none of the 20 .*: expected 0"),
    ("coco-stuff", remove("stuffthingmaps/train2017/2007_000003.png"), "'2007_000003', but .*such mask"),
    ("coco-stuff", masks("*/train2017/*.png", lambda m: np.where(m == 0, 11, m)), "training masks .* hold 11, an id"),
    ("coco-stuff", masks("*/val2017/*.png", raised), "test masks .* hold 182, an id .*trainval2017.zip"),
]


@pytest.mark.parametrize("name, spoil, message", BROKEN, ids=[message for *_, message in BROKEN])
def test_broken_data_gives_one_line_that_says_what_to_do(name, spoil, message, tmp_path):
    root = own_data(tmp_path / "own") if name == "own" else draw_tree(name, tmp_path / name)
    spoil(root)
    with pytest.raises(sources.DataError, match=message) as error:
        data_check.check(sources.open_dataset(str(root) if name == "own" else name, root))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["toy", "context"])
def test_data_sets_without_a_download_say_so(name, tmp_path):
    with pytest.raises(sources.DataError, match=f"for voc and coco-stuff, not for {name}: .*/data.md"):
        sources.download_dataset(name, tmp_path / "data")


def test_remarks_of_the_data_check(tmp_path):
    root = own_data(tmp_path / "named", (0, 1), ("background", "dog", "cat"))
    (root / "val.txt").write_text("b\n")
    remarks = data_check.check(sources.open_dataset(root))
    assert "'background' is a class, but CLIP cannot know" in remarks[0] and "such as b.jpg" in remarks[1]
    assert "1 of 3 seen classes are in none of the 2 training masks looked at (of 2): cat" in remarks[2]


@pytest.mark.parametrize("value, label", [(16, 8), (255, 3), (3, 4), (3, 99)])
def test_a_leak_into_the_training_view_stops_the_run(value, label, trees, monkeypatch):
    """Potted plants, void pixels or birds trained as another class: found without a mask that shows them."""
    source = sources.open_dataset("voc", trees["voc"])
    table = source.table(training=True)
    table[value] = label
    monkeypatch.setattr(sources.DataSource, "table", lambda self, training: table)
    shown = source.classes[label] if label < 15 else label
    with pytest.raises(sources.DataError, match=f"mask value {value} of voc would be trained as '?{shown}"):
        data_check.check(source)
