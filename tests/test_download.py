"""Archives from a server on this machine: whole or not at all, unpacked safely; SBD's mask files."""
import dataclasses
import errno
import io
import re
import shutil
import struct
import tracemalloc
import zlib
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
from conftest import command, run_inside
from trees import draw_tree, mat, md5, pack, serve, under, voc_archives

import sources
from sources import check as data_check
from sources import coco_stuff, download, voc
from sources.matlab import read_segmentation

NOBODY = "http://127.0.0.1:9/"
WHOLE = np.random.RandomState(0).bytes(150_000)
SET = download.Archive("set.tar", len(WHOLE), md5(WHOLE), (), 10**9)


def fetch(root, *addresses):
    return download.fetch(dataclasses.replace(SET, addresses=addresses), root)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("there, answer, fault, kept", [  # .partial before the call, the server's file, .partial after
    (b"", None, "404", 0),
    (b"", WHOLE[:-1] + b"x", f"its md5 is .*, expected {SET.md5}", 0), (WHOLE + b"more", None, "its md5 is", 0),
    (b"", WHOLE[:-1], "149,999 bytes there, expected 150,000", 0),
    (b"", (WHOLE, 70_000), "ended after 70,000 of 150,000 bytes", 70_000),
    (WHOLE[:30_000], (WHOLE, 20_000), "ended after 20,000", 20_000),  # it knows no ranges
])
def test_an_address_that_fails_leaves_what_is_right(there, answer, fault, kept, tmp_path, capsys):
    target, partial = tmp_path / "set.tar", tmp_path / "set.tar.partial"
    if there:
        partial.write_bytes(there)
    with serve({"/set.tar": answer, "/whole/set.tar": WHOLE}) as (server, asked):
        with pytest.raises(sources.DataError, match=f"from any of 1 addresses: .* {target} .md5 {SET.md5}"):
            fetch(tmp_path, server)
        assert re.fullmatch(f"{server}set.tar\n    failed: [^\n]*{fault}[^\n]*\n", capsys.readouterr().out)
        assert (partial.read_bytes() if partial.exists() else b"") == WHOLE[:kept]
        for _ in range(2):  # the second time without a request
            assert fetch(tmp_path, NOBODY, f"{server}whole/").read_bytes() == WHOLE and names(tmp_path) == ["set.tar"]
        assert [want for path, want in asked if "whole" in path] == [f"bytes={kept}-" if kept else None]
    assert "refused" in capsys.readouterr().out


def test_what_lies_there_is_checked(tmp_path):
    (tmp_path / "set.tar.partial").write_bytes(WHOLE)  # killed between the last byte and the new name
    assert fetch(tmp_path, NOBODY).read_bytes() == WHOLE
    (tmp_path / "set.tar").write_bytes(WHOLE[:-1])
    with pytest.raises(sources.DataError, match="set.tar has the md5 .*: delete it and call again"):
        fetch(tmp_path)


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    big, disk = dataclasses.replace(SET, size=4 * 10**9, addresses=(NOBODY,)), SimpleNamespace(free=5.01e9)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: disk)
    download.reserve("voc", tmp_path, [big, SET])  # one after the other
    disk.free = 4.99e9
    with pytest.raises(sources.DataError, match="4.0 GB; needs 5.0 GB of disk at first and 1.0 GB in the end, 5.0 GB"):
        download.bring("voc", tmp_path, {big: {"pictures": tmp_path / "pictures"}})
    with open(tmp_path / "set.tar.partial", "wb") as file:
        file.truncate(4 * 10**9)  # without taking disk: what has arrived needs no more room
    disk.free = 1.1e9
    download.reserve("voc", tmp_path, [big])
    monkeypatch.setattr(download, "transfer", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(sources.DataError, match="the disk of .* is full: free some space and run it again"):
        fetch(tmp_path, NOBODY)


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_what_is_asked_for_is_unpacked_all_of_it_or_nothing(kind, tmp_path):
    path, wanted = tmp_path / f"set.{kind}", {"pictures": tmp_path / "in/pictures"}
    data = pack(path, {f"pictures/{name}.jpg": WHOLE for name in "abc"} | {"other/d.txt": b"not asked"}).read_bytes()
    for there, parts, message in ((data[:60_000], wanted, f"set.{kind} cannot be unpacked .*: delete it"),
                                  (data, wanted | {"absent": tmp_path / "absent"}, "holds no absent")):
        path.write_bytes(there)
        with pytest.raises(sources.DataError, match=message):
            download.unpack(path, parts)
        assert names(tmp_path) == [path.name]
    (tmp_path / f".partial.{path.name}/pictures/of a killed call").mkdir(parents=True)
    download.unpack(path, wanted)
    assert names(tmp_path) == ["in"] and names(tmp_path / "in/pictures") == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name, data", [("pictures/../../out", b"evil"), ("pictures/../../../out", b"evil"),
                                        ("/{}/out", b"evil"), ("pictures/out", "../../../out")])
def test_nothing_leaves_the_folder(kind, name, data, tmp_path):
    root = tmp_path / "deep/root"
    root.mkdir(parents=True)
    path = pack(root / f"set.{kind}", {"pictures/a.jpg": b"a", name.format(tmp_path): data})
    try:
        download.unpack(path, {"pictures": root / "pictures"})
    except sources.DataError as error:
        assert "\n" not in str(error)
    assert names(tmp_path) + names(tmp_path / "deep") == ["deep", "root"]
    assert names(root) in (["pictures"], [path.name])


@pytest.fixture
def official(monkeypatch):
    """-> a function: from now on the archives {name in the module: path} come from a server -> what it is asked for."""
    served = {}
    with serve(served) as (server, asked):
        def redirect(module, archives):
            for name, path in archives.items():
                known, data = getattr(module, name), path.read_bytes()
                served[f"/{path.name}"] = data
                size = len(data) if known.md5 else 10**6  # rounded where there is no checksum
                monkeypatch.setattr(module, name, dataclasses.replace(known, size=size, md5=known.md5 and md5(data),
                                                                      addresses=(server,), unpacked=10**6))
            return asked
        yield redirect


def test_voc_from_an_empty_folder(official, tmp_path, monkeypatch):
    drawn, root = draw_tree("voc", tmp_path / "drawn", sides=(64, 65)), tmp_path / "data"
    asked = official(voc, dict(zip(("VOC", "SBD"), voc_archives(drawn, tmp_path))))
    flags = ["--dataset", "voc", "--data-root", root, "--download", "--picture", tmp_path / "check.png"]
    status, text, words = run_inside(data_check, *flags)
    assert status == 0 and text.startswith("voc: fetching VOCtrainval_11-May-2012.tar, benchmark.tgz: 0.0 GB"), words
    assert "\nvoc: 12 training images, 3 test images, 15 seen classes, 5 unseen\n" in text and len(asked) == 2
    tree, masks = root / "VOCdevkit/VOC2012", root / "VOCdevkit/VOC2012/SegmentationClassAug"
    assert names(root) == ["VOCdevkit"]  # archives and what came between are gone
    assert names(tree) == ["ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"]
    assert under(masks) == under(drawn / "SegmentationClassAug")  # where VOC has a mask, SBD's says something else
    text = command(tmp_path, "data.py", *flags).stdout  # in a process of its own, without the server
    assert "has all its files, nothing to fetch" in text and "voc: 12 training images" in text

    shutil.rmtree(tree / "JPEGImages")
    (masks / "mine").touch()
    sources.download_dataset("voc", root)
    assert len(asked) == 3 and (masks / "mine").exists()  # nothing of SBD
    shutil.rmtree(masks)
    with monkeypatch.context() as patch, pytest.raises(TypeError):
        patch.setattr(voc, "read_segmentation", None)
        sources.download_dataset("voc", root)
    assert not masks.exists()  # all masks are made or none
    sources.download_dataset("voc", root)  # goes on from what came
    assert len(asked) == 4 and len(sources.open_dataset("voc", root).train) == 12


def test_coco_stuff_from_its_three_archives(official, tmp_path):
    tree, root = draw_tree("coco-stuff", tmp_path / "tree"), tmp_path / "data"
    asked = official(coco_stuff, {
        "TRAIN": pack(tmp_path / "train2017.zip", under(tree / "train2017", "train2017/")),
        "VAL": pack(tmp_path / "val2017.zip", under(tree / "val2017", "val2017/")),
        "MAPS": pack(tmp_path / "stuffthingmaps_trainval2017.zip", under(tree / "stuffthingmaps"))})
    for _ in range(2):
        sources.download_dataset("coco-stuff", root)
    assert len(asked) == 3 and under(root) == under(tree)
    assert len(sources.open_dataset("coco-stuff", root).train) == 12


def test_masks_equal_scipys():
    scipy_io, sparse = pytest.importorskip("scipy.io"), pytest.importorskip("scipy.sparse")
    rng = np.random.RandomState(0)
    for i, shape in enumerate([(1, 1), (2, 2), *rng.randint(1, 80, (58, 2))]):  # the first two are small elements
        mask, out = rng.randint(0, 256, shape).astype(np.uint8), io.BytesIO()
        cells = np.empty((3, 1), object)
        cells[:] = [[sparse.csc_matrix(mask > 9)], [np.float64(2)], [np.zeros((0, 2))]]
        before = {"Boundaries": cells, "CategoriesPresent": np.arange(4.0), "text": "text"} if i % 2 else {}
        fields = {**before, "Segmentation": mask, "after": np.int16([1, 2])}
        scipy_io.savemat(out, {"other": mask.T, "GTcls": fields, "GTinst": fields}, do_compression=i % 3 == 0,
                         long_field_names=i % 5 == 0, oned_as="row" if i % 4 else "column")
        assert np.array_equal(read_segmentation(out.getvalue(), "x"), mask)
        big = mat(mask, ">", compressed=bool(i % 2))  # scipy writes this machine's order alone, but reads both
        assert np.array_equal(scipy_io.loadmat(io.BytesIO(big))["GTcls"]["Segmentation"][0, 0], mask)
        assert np.array_equal(read_segmentation(big, "x"), mask)


def test_damaged_and_hostile_masks_give_one_line_and_take_no_memory():
    rng, mask, refused = np.random.RandomState(1), np.random.RandomState(0).randint(0, 21, (40, 50)).astype(np.uint8), 0
    good = [mat(mask, order, compressed) for order in "<>" for compressed in (False, True)]
    bomb = zlib.compress(struct.pack("<II", 14, 1 << 30) + bytes(1 << 27))  # 128 MB in 128 kB
    files = [good[0][:128] + struct.pack("<II", 15, len(bomb)) + bomb]
    files += [good[0][:at] + struct.pack("<i", 0x7FFFFFF0) + good[0][at + 4:] for at in range(128, 600, 4)]
    for i in range(160):
        data = bytearray(good[i % 4])
        data[rng.randint(128 * (i % 3 > 0), min(len(data), 500))] = rng.randint(256)
        files.append(bytes(data[:rng.randint(len(data))] if i % 5 == 0 else data))
    tracemalloc.start()
    for data in files:
        try:
            read_segmentation(data, "x.mat")
        except sources.DataError as error:
            refused += 1
            assert str(error).startswith("cannot read the mask x.mat (") and "\n" not in str(error)
    assert refused > 100 and tracemalloc.get_traced_memory()[1] < 3 << 24  # the limit, and zlib's own
    tracemalloc.stop()
