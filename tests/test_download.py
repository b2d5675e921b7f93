"""From an empty folder to two steps of training, all fetched from a server on this machine; SBD's mask files."""
import dataclasses
import errno
import io
import re
import shutil
import socket
import struct
import tracemalloc
import zlib
from collections import namedtuple

import numpy as np
import pytest
from conftest import run_inside
from PIL import Image
from trees import draw_tree, mat, md5, pack, serve, under, voc_archives

import sources
import train
from sources import check as data_check
from sources import coco_stuff, download, voc
from sources.matlab import read_segmentation

Disk = namedtuple("Disk", "total used free")


@pytest.fixture
def archive(tmp_path):
    """An archive of three files, its bytes, and the folder to fetch it into."""
    files = {f"pictures/{name}.jpg": np.random.RandomState(0).bytes(50_000) for name in "abc"}
    path = pack(tmp_path / "set.tar", files | {"other/d.txt": b"not asked for"})
    (tmp_path / "root").mkdir()
    known = download.Archive("set.tar", path.stat().st_size, md5(path), (), 150_000)
    return known, path.read_bytes(), tmp_path / "root"


def at(known, *addresses):
    return dataclasses.replace(known, addresses=addresses)


def cut(content, length):
    """A server that promises all and closes the connection after `length` bytes."""
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:length])
    return answer


# ---------------------------------------------------------------- fetching


def test_addresses_are_tried_in_order_until_the_checksum_fits(archive, capsys):
    known, content, root = archive
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # refuses connections: nobody listens
        refusing = f"http://127.0.0.1:{closed.getsockname()[1]}/"
        wrong = content[:-1] + b"x"
        with serve({"/wrong/set.tar": wrong, "/short/set.tar": content[:-1], "/cut/set.tar": cut(content, 70_000),
                    "/whole/set.tar": content}) as (server, asked):
            addresses = [server + "gone/", refusing, server + "wrong/", server + "short/", server + "cut/",
                         server + "whole/"]
            path = download.fetch(at(known, *addresses), root)
            assert path.read_bytes() == content and [p.name for p in root.iterdir()] == ["set.tar"]
            assert asked[-1] == ("/whole/set.tar", "bytes=70000-")  # the cut transfer goes on
            lines = [line for line in capsys.readouterr().out.splitlines() if line]
            assert [line for line in lines if line.startswith("http")] == [a + "set.tar" for a in addresses]
            faults = "404", "refused", "its md5 is .*, expected " + known.md5, "there, expected", "ended after 70,000"
            assert all(re.search(fault, line) for line, fault in zip(lines[1::2], faults)), lines
            n = len(asked)
            assert download.fetch(at(known, *addresses), root) == path and len(asked) == n  # no request


def test_what_no_address_gives_is_said_and_what_came_is_kept(archive):
    known, content, root = archive
    with serve({"/set.tar": cut(content, 70_000)}) as (server, asked):
        with pytest.raises(sources.DataError, match=f"from any of 1 addresses: .* as {root}/set.tar .md5 {known.md5}"):
            download.fetch(at(known, server), root)
    assert (root / "set.tar.partial").read_bytes() == content[:70_000]
    with serve({"/set.tar": content}) as (server, asked):  # a server may send all of it again
        download.fetch(at(known, server), root)
        assert asked == [("/set.tar", "bytes=70000-")]
    (root / "set.tar").write_bytes(content[:-1])
    with pytest.raises(sources.DataError, match="set.tar has the md5 .*: delete it and call again"):
        download.fetch(known, root)
    (root / "set.tar").rename(root / "set.tar.partial")
    (root / "set.tar.partial").write_bytes(content)  # killed between the last byte and the new name
    assert download.fetch(at(known, "http://127.0.0.1:9/"), root).read_bytes() == content


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(archive, monkeypatch, capsys):
    known, content, root = archive
    big = dataclasses.replace(known, size=4 * 10**9, unpacked=10**9)
    for free, needs in ((4.99e9, True), (5.01e9, False)):
        monkeypatch.setattr(download.shutil, "disk_usage", lambda _, free=free: Disk(10**10, 0, int(free)))
        if needs:
            with pytest.raises(sources.DataError, match="set.tar, 4.0 GB; takes 5.0 GB of disk on the way and 1.0 GB "
                                                        "in the end, 5.0 GB are free in .*make room, or"):
                download.reserve("voc", root, [big])
        else:
            download.reserve("voc", root, [big, known])
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Disk(10**10, 0, 10**9 + 10**8))
    (root / "set.tar.partial").touch()
    with open(root / "set.tar.partial", "r+b") as file:
        file.truncate(4 * 10**9)  # without taking disk: what has arrived needs no more room
    download.reserve("voc", root, [big])
    capsys.readouterr()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "transfer", full)
    with pytest.raises(sources.DataError, match="the disk of .* is full: make room and call again"):
        download.fetch(at(known, "http://127.0.0.1:9/", "http://127.0.0.1:9/"), root)


# ---------------------------------------------------------------- unpacking


def test_only_what_is_asked_for_is_unpacked_and_all_of_it_or_nothing(archive, monkeypatch):
    known, content, root = archive
    (root / "set.tar").write_bytes(content[:60_000])
    with pytest.raises(sources.DataError, match="set.tar cannot be unpacked .*: delete it and call again"):
        download.unpack(root / "set.tar", {"pictures": root / "in/pictures"})
    assert [p.name for p in root.iterdir()] == ["set.tar"]
    (root / "set.tar").write_bytes(content)
    with pytest.raises(sources.DataError, match="holds no absent"):
        download.unpack(root / "set.tar", {"pictures": root / "in/pictures", "absent": root / "absent"})
    assert [p.name for p in root.iterdir()] == ["set.tar"]
    (root / ".partial.set.tar").mkdir()  # of a call that was killed
    (root / ".partial.set.tar/old").touch()
    download.unpack(root / "set.tar", {"pictures": root / "in/pictures"})
    assert [p.name for p in root.iterdir()] == ["in"]
    assert sorted(p.name for p in (root / "in/pictures").iterdir()) == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
@pytest.mark.parametrize("name", ["pictures/../../out.txt", "pictures/../../../out.txt", "/{}/out.txt", "link"])
def test_nothing_leaves_the_folder(kind, name, tmp_path):
    root = tmp_path / "deep/root"
    root.mkdir(parents=True)
    links = [("pictures/out.txt", "../../../out.txt")] if name == "link" and kind != "zip" else []
    files = {"pictures/a.jpg": b"a"} | ({} if name == "link" else {name.format(tmp_path): b"evil"})
    try:
        download.unpack(pack(root / f"set.{kind}", files, links), {"pictures": root / "pictures"})
    except sources.DataError as error:
        assert "\n" not in str(error) and not (root / "pictures").exists()
    assert {p.name for p in tmp_path.iterdir()} == {"deep"} and {p.name for p in root.parent.iterdir()} == {"root"}
    assert {p.name for p in root.iterdir()} <= {"pictures", f"set.{kind}"}


# ---------------------------------------------------------------- the data sets


@pytest.fixture(scope="module")
def voc_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    tree = draw_tree("voc", folder / "tree", sides=(64, 65))
    served = voc_archives(tree, folder)
    with serve({f"/{path.name}": path.read_bytes() for path in served}) as (server, asked):
        yield tree, served, server, asked


@pytest.fixture
def voc_addresses(voc_server, monkeypatch):
    tree, served, server, asked = voc_server
    for name, path in zip(("VOC", "SBD"), served):
        monkeypatch.setattr(voc, name, dataclasses.replace(
            getattr(voc, name), size=path.stat().st_size, md5=md5(path), addresses=(server,)))
    asked.clear()
    return tree, asked


def test_from_nothing_to_two_steps_of_voc(voc_addresses, tiny_clip_file, tmp_path, monkeypatch):
    drawn, asked = voc_addresses
    root, out = tmp_path / "data", tmp_path / "run"
    args = ["--dataset", "voc", "--data-root", root]
    status, text, words = run_inside(data_check, *args, "--download", "--picture", tmp_path / "check.png")
    assert status == 0, words
    assert "voc: VOCtrainval_11-May-2012.tar and benchmark.tgz, 0.0 GB; takes 2.2 GB of disk on the way" in text
    assert "voc: 12 training images, 3 test images, 15 seen classes, 5 unseen" in text
    assert (tmp_path / "check.png").exists() and [path for path, _ in asked] == [
        "/VOCtrainval_11-May-2012.tar", "/benchmark.tgz"]
    tree = root / "VOCdevkit/VOC2012"
    assert {p.name for p in root.iterdir()} == {"VOCdevkit"}  # archives and partial folders are gone
    assert {p.name for p in tree.iterdir()} == {"JPEGImages", "SegmentationClass", "ImageSets", "SegmentationClassAug"}
    names = sorted((drawn / "SegmentationClassAug").iterdir())
    assert len(names) == 15
    for path in names:  # those that VOC labels are VOC's own, though SBD's say something else
        image = Image.open(tree / "SegmentationClassAug" / path.name)
        assert image.mode == "P" and np.array_equal(np.asarray(image), np.asarray(Image.open(path)))
        assert image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]

    status, text, words = run_inside(data_check, *args, "--download", "--picture", tmp_path / "check.png")
    assert status == 0 and "has all its files, nothing to fetch" in text and len(asked) == 2
    status, text, words = run_inside(
        train, *args, "--clip", tiny_clip_file, "--body", "small", "--crop", "64", "--steps", "2", "--batch-size", "4",
        "--workers", "0", "--device", "cpu", "--out-dir", out)
    assert status == 0, words
    assert "voc: 12 training images, 3 test images" in text and (out / "metrics.json").exists()


def test_what_a_user_has_already_is_kept(voc_addresses, tmp_path):
    drawn, asked = voc_addresses
    root = tmp_path / "data"
    shutil.copytree(drawn, root, ignore=shutil.ignore_patterns("JPEGImages"))
    (root / "SegmentationClassAug/own").touch()
    sources.download_dataset("voc", root)
    assert [path for path, _ in asked] == ["/VOCtrainval_11-May-2012.tar"]  # nothing of SBD
    assert (root / "SegmentationClassAug/own").exists()
    assert [p.name for p in (root / "VOCdevkit/VOC2012").iterdir()] == ["JPEGImages"]
    assert len(sources.open_dataset("voc", root).train) == 12


def test_masks_are_all_there_or_none(voc_addresses, tmp_path, monkeypatch):
    _, asked = voc_addresses

    def broken(data, name):
        raise sources.DataError("made up")

    with monkeypatch.context() as patch:
        patch.setattr(voc, "read_segmentation", broken)
        with pytest.raises(sources.DataError, match="made up"):
            sources.download_dataset("voc", tmp_path)
    assert not (tmp_path / "VOCdevkit/VOC2012/SegmentationClassAug").exists()
    sources.download_dataset("voc", tmp_path)  # goes on from the archive that is there
    assert len(asked) == 2 and len(sources.open_dataset("voc", tmp_path).train) == 12


def test_coco_stuff_from_its_three_archives(tmp_path, monkeypatch):
    tree, root = draw_tree("coco-stuff", tmp_path / "tree"), tmp_path / "data"
    packed = {"TRAIN": {"train2017": "train2017"}, "VAL": {"val2017": "val2017"},
              "MAPS": {"stuffthingmaps/train2017": "train2017", "stuffthingmaps/val2017": "val2017"}}
    served = {}
    for name, folders in packed.items():
        known = getattr(coco_stuff, name)
        files = {f"{inside}/{key}": value for folder, inside in folders.items()
                 for key, value in under(tree / folder, "", ".").items()}
        served[name] = pack(tmp_path / known.name, files)
    with serve({f"/{path.name}": path.read_bytes() for path in served.values()}) as (server, asked):
        for name, path in served.items():
            known = getattr(coco_stuff, name)
            monkeypatch.setattr(coco_stuff, name, dataclasses.replace(
                known, size=path.stat().st_size if known.md5 else known.size, md5=known.md5 and md5(path),
                addresses=(server,), unpacked=10**6))
        sources.download_dataset("coco-stuff", root)
        sources.download_dataset("coco-stuff", root)
        assert len(asked) == 3
    source = sources.open_dataset("coco-stuff", root)
    assert (len(source.train), len(source.val)) == (12, 3)
    assert {p.name for p in root.iterdir()} == {"train2017", "val2017", "stuffthingmaps"}
    first = source.train[0][2]
    assert first.read_bytes() == (tree / "stuffthingmaps/train2017" / first.name).read_bytes()


# ---------------------------------------------------------------- SBD's masks


def test_masks_equal_scipys():
    scipy_io = pytest.importorskip("scipy.io")
    rng = np.random.RandomState(0)
    for i in range(60):
        shape = (1, 1) if i == 0 else (2, 2) if i == 1 else tuple(rng.randint(1, 80, 2))  # small elements
        mask = rng.randint(0, 256, shape).astype(np.uint8)
        cells = np.empty((3, 1), object)
        cells[:] = [[mask[:1]], [np.float64(2)], [np.zeros((0, 2))]]
        before = {"Boundaries": cells, "CategoriesPresent": np.arange(4.0), "text": "text"} if i % 2 else {}
        struct_ = {**before, "Segmentation": mask, "after": np.int16([1, 2])}
        out = io.BytesIO()
        scipy_io.savemat(out, {"other": mask.T, "GTcls": struct_, "GTinst": struct_}, do_compression=i % 3 == 0,
                         long_field_names=i % 5 == 0, oned_as="row" if i % 4 else "column")
        assert np.array_equal(read_segmentation(out.getvalue(), "x"), mask)
        for order in "<>":  # scipy writes this machine's order alone, but reads both
            data = mat(mask, order, compressed=bool(i % 2))
            assert np.array_equal(scipy_io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0], mask)
            assert np.array_equal(read_segmentation(data, "x"), mask)


def test_damaged_masks_give_one_line():
    rng, refused = np.random.RandomState(1), 0
    mask = rng.randint(0, 21, (40, 50)).astype(np.uint8)
    for i in range(120):
        data = bytearray(mat(mask, "<>"[i % 2], compressed=i % 4 < 2))
        if i % 3 == 0:
            data = data[:rng.randint(len(data))]
        else:
            for at_ in rng.randint(0 if i % 3 == 1 else 128, min(len(data), 700), 3):
                data[at_] = rng.randint(256)
        try:
            assert read_segmentation(bytes(data), "x.mat").size <= 1 << 24
        except sources.DataError as error:
            refused += 1
            assert str(error).startswith("cannot read the mask x.mat (") and "\n" not in str(error)
    assert refused > 60


def test_hostile_masks_take_no_memory():
    mask = np.zeros((40, 50), np.uint8)
    bomb = zlib.compress(struct.pack("<II", 14, 1 << 30) + bytes(1 << 26))  # 64 MB in 64 kB
    plain = mat(mask, compressed=False)
    files = [plain[:at] + struct.pack("<i", 0x7FFFFFF0) + plain[at + 4:] for at in range(128, 1200, 4)]  # sizes, counts
    tracemalloc.start()
    with pytest.raises(sources.DataError, match="cut short or too large"):
        read_segmentation(plain[:128] + struct.pack("<II", 15, len(bomb)) + bomb, "x")
    assert tracemalloc.get_traced_memory()[1] < 3 << 24  # the limit, and what zlib takes to grow it
    tracemalloc.reset_peak()
    for data in files:
        try:
            assert read_segmentation(data, "x").shape == mask.shape
        except sources.DataError as error:
            assert "\n" not in str(error)
    assert tracemalloc.get_traced_memory()[1] < 1 << 21
    tracemalloc.stop()
