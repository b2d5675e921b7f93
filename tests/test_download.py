"""From an empty folder to two steps of training, all fetched from a server on this machine; SBD's mask files."""
import dataclasses
import errno
import io
import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from conftest import run_inside
from PIL import Image
from trees import draw_tree, mat, md5, pack, serve, under, voc_archives

import sources
from sources import check as data_check
from sources import coco_stuff, download, voc
from sources.matlab import read_segmentation

Disk = namedtuple("Disk", "total used free")
NOBODY = "http://127.0.0.1:9/"


@pytest.fixture
def archive(tmp_path):
    """-> a function of addresses that makes the Archive; its bytes; the folder to fetch it into."""
    path = pack(tmp_path / "set.tar", {f"pictures/{name}.jpg": np.random.RandomState(0).bytes(50_000) for name in "abc"}
                | {"other/d.txt": b"not asked for"})
    (tmp_path / "root").mkdir()
    known = download.Archive("set.tar", path.stat().st_size, md5(path), (), 150_000)
    return lambda *addresses: dataclasses.replace(known, addresses=addresses), path.read_bytes(), tmp_path / "root"


def cut(content, length):
    """A server that promises all and closes the connection after `length` bytes."""
    def answer(handler):
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(content)))
        handler.end_headers()
        handler.wfile.write(content[:length])
    return answer


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# ---------------------------------------------------------------- fetching


def test_addresses_are_tried_in_order_until_the_checksum_fits(archive, capsys):
    at, content, root = archive
    with socket.socket() as closed, serve({
            "/wrong/set.tar": content[:-1] + b"x", "/short/set.tar": content[:-1], "/cut/set.tar": cut(content, 70_000),
            "/whole/set.tar": content}) as (server, asked):
        closed.bind(("127.0.0.1", 0))  # refuses connections, as nobody listens
        tries = [f"{server}gone/", f"http://127.0.0.1:{closed.getsockname()[1]}/",
                 *(f"{server}{name}/" for name in ("wrong", "short", "cut", "whole"))]
        path = download.fetch(at(*tries), root)
        assert path.read_bytes() == content and names(root) == ["set.tar"]
        assert asked[-1] == ("/whole/set.tar", "bytes=70000-")  # goes on where the connection was cut
        lines = [line for line in capsys.readouterr().out.splitlines() if line]
        assert [line for line in lines if line.startswith("http")] == [folder + "set.tar" for folder in tries]
        faults = "404", "refused", f"its md5 is .*, expected {at().md5}", "bytes there, expected", "ended after 70,000"
        assert all(re.search(fault, line) for line, fault in zip(lines[1::2], faults)), lines
        n = len(asked)
        assert download.fetch(at(*tries), root) == path and len(asked) == n  # no request


def test_what_came_is_kept_and_checked(archive):
    at, content, root = archive
    with serve({"/set.tar": cut(content, 70_000)}) as (server, _):
        with pytest.raises(sources.DataError, match=f"from any of 1 addresses: .* {root}/set.tar .md5 {at().md5}"):
            download.fetch(at(server), root)
    assert (root / "set.tar.partial").read_bytes() == content[:70_000]
    with serve({"/set.tar": cut(content, len(content))}) as (server, _):  # a server that knows no ranges
        assert download.fetch(at(server), root).read_bytes() == content
    (root / "set.tar").write_bytes(content[:-1])
    with pytest.raises(sources.DataError, match="set.tar has the md5 .*: delete it and call again"):
        download.fetch(at(), root)
    (root / "set.tar").unlink()
    (root / "set.tar.partial").write_bytes(content + b"more")  # of whatever: not taken, but no obstacle
    with serve({"/set.tar": content}) as (server, _):
        assert download.fetch(at(NOBODY, server), root).read_bytes() == content
    (root / "set.tar").rename(root / "set.tar.partial")  # killed between the last byte and the new name
    assert download.fetch(at(NOBODY), root).read_bytes() == content


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(archive, monkeypatch):
    at, _, root = archive
    big, free = dataclasses.replace(at(NOBODY), size=4 * 10**9, unpacked=10**9), 5.01e9
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: Disk(10**10, 0, int(free)))
    download.reserve("voc", root, [big, at()])  # one after the other
    free = 4.99e9
    with pytest.raises(sources.DataError, match="set.tar: 4.0 GB; needs 5.0 GB of disk at first and 1.0 GB in the "
                                                "end, 5.0 GB are free in .*make room, or"):
        download.bring("voc", root, {big: {"pictures": root / "pictures"}})
    with open(root / "set.tar.partial", "wb") as file:
        file.truncate(4 * 10**9)  # without taking disk: what has arrived needs no more room
    free = 1.1e9
    download.reserve("voc", root, [big])

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(download, "transfer", full)
    with pytest.raises(sources.DataError, match="the disk of .* is full: free some space and run it again"):
        download.fetch(big, root)


# ---------------------------------------------------------------- unpacking


def test_what_is_asked_for_is_unpacked_all_of_it_or_nothing(archive):
    _, content, root = archive
    path, wanted = root / "set.tar", {"pictures": root / "in/pictures"}
    for data, parts, message in ((content[:60_000], wanted, "set.tar cannot be unpacked .*: delete it and call again"),
                                 (content, wanted | {"absent": root / "absent"}, "holds no absent")):
        path.write_bytes(data)
        with pytest.raises(sources.DataError, match=message):
            download.unpack(path, parts)
        assert names(root) == ["set.tar"]
    (root / ".partial.set.tar/pictures").mkdir(parents=True)  # of a call that was killed
    (root / ".partial.set.tar/pictures/old.jpg").touch()
    download.unpack(path, wanted)
    assert names(root) == ["in"] and names(root / "in/pictures") == ["a.jpg", "b.jpg", "c.jpg"]


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
    assert names(tmp_path) == ["deep"] and names(tmp_path / "deep") == ["root"]
    assert names(root) in (["pictures"], [f"set.{kind}"])


# ---------------------------------------------------------------- the data sets


@pytest.fixture(scope="module")
def voc_server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("voc")
    tree = draw_tree("voc", folder / "tree", sides=(64, 65))
    served = voc_archives(tree, folder)
    with serve({f"/{path.name}": path.read_bytes() for path in served}) as (server, asked):
        yield tree, served, server, asked


@pytest.fixture
def from_server(voc_server, monkeypatch):
    """VOC's addresses lead to the server -> the tree that it serves, the list of what was asked for."""
    tree, served, server, asked = voc_server
    for name, path in zip(("VOC", "SBD"), served):
        monkeypatch.setattr(voc, name, dataclasses.replace(
            getattr(voc, name), size=path.stat().st_size, md5=md5(path), addresses=(server,)))
    asked.clear()
    return tree, asked


def test_from_nothing_to_two_steps_of_voc(from_server, tiny_clip_file, tmp_path):
    drawn, asked = from_server
    root, out = tmp_path / "data", tmp_path / "run"
    args = ["--dataset", "voc", "--data-root", root]
    command = [data_check, *args, "--download", "--picture", tmp_path / "check.png"]
    status, text, words = run_inside(*command)
    assert status == 0, words
    assert "voc: fetching VOCtrainval_11-May-2012.tar, benchmark.tgz: 0.0 GB; needs 2.2 GB of disk" in text
    assert "voc: 12 training images, 3 test images, 15 seen classes, 5 unseen" in text
    assert (tmp_path / "check.png").exists() and len(asked) == 2
    tree = root / "VOCdevkit/VOC2012"
    assert names(root) == ["VOCdevkit"]  # archives and what came between are gone
    assert names(tree) == ["ImageSets", "JPEGImages", "SegmentationClass", "SegmentationClassAug"]
    assert len(names(tree / "SegmentationClassAug")) == 15
    for path in (drawn / "SegmentationClassAug").iterdir():  # where VOC has a mask, SBD's says something else
        image = Image.open(tree / "SegmentationClassAug" / path.name)
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(path)))
        assert image.mode == "P" and image.getpalette()[:6] == [0, 0, 0, 128, 0, 0]

    status, text, words = run_inside(*command)
    assert status == 0 and "has all its files, nothing to fetch" in text and len(asked) == 2
    flags = ["--clip", tiny_clip_file, "--body", "small", "--crop", 64, "--steps", 2, "--batch-size", 4, "--workers", 0,
             "--device", "cpu", "--out-dir", out]
    done = subprocess.run([sys.executable, "train.py", *map(str, args + flags)], cwd=Path(__file__).parents[1],
                          capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert "voc: 12 training images, 3 test images" in done.stdout and (out / "metrics.json").exists()


def test_what_a_user_has_is_kept_and_masks_are_all_made_or_none(from_server, tmp_path, monkeypatch):
    drawn, asked = from_server
    root = shutil.copytree(drawn, tmp_path / "data", ignore=shutil.ignore_patterns("JPEGImages"))
    (root / "SegmentationClassAug/mine").touch()
    sources.download_dataset("voc", root)
    assert [path for path, _ in asked] == ["/VOCtrainval_11-May-2012.tar"]  # nothing of SBD
    assert (root / "SegmentationClassAug/mine").exists() and len(sources.open_dataset("voc", root).train) == 12

    def broken(*_):
        raise sources.DataError("made up")

    shutil.rmtree(root / "SegmentationClassAug")
    with monkeypatch.context() as patch:
        patch.setattr(voc, "read_segmentation", broken)
        with pytest.raises(sources.DataError, match="made up"):
            sources.download_dataset("voc", root)
    assert "SegmentationClassAug" not in names(root)
    sources.download_dataset("voc", root)  # goes on from what came
    assert len(asked) == 2 and len(sources.open_dataset("voc", root).train) == 12


def test_coco_stuff_from_its_three_archives(tmp_path, monkeypatch):
    tree, root = draw_tree("coco-stuff", tmp_path / "tree"), tmp_path / "data"
    held = {"TRAIN": ["train2017"], "VAL": ["val2017"], "MAPS": ["stuffthingmaps/train2017", "stuffthingmaps/val2017"]}
    served = {}
    with serve(served) as (server, asked):
        for name, folders in held.items():
            known = getattr(coco_stuff, name)
            path = pack(tmp_path / known.name, {f"{folder.split('/')[-1]}/{key}": data for folder in folders
                                                for key, data in under(tree / folder, "", ".").items()})
            served[f"/{path.name}"] = path.read_bytes()
            monkeypatch.setattr(coco_stuff, name, dataclasses.replace(
                known, size=path.stat().st_size if known.md5 else known.size, md5=known.md5 and md5(path),
                addresses=(server,), unpacked=10**6))
        for _ in range(2):
            sources.download_dataset("coco-stuff", root)
        assert len(asked) == 3
    source = sources.open_dataset("coco-stuff", root)
    assert (len(source.train), len(source.val)) == (12, 3) and names(root) == ["stuffthingmaps", "train2017", "val2017"]
    mask = source.train[0][2]
    assert mask.read_bytes() == (tree / "stuffthingmaps/train2017" / mask.name).read_bytes()


# ---------------------------------------------------------------- SBD's masks


def test_masks_equal_scipys():
    scipy_io, sparse = pytest.importorskip("scipy.io"), pytest.importorskip("scipy.sparse")
    rng = np.random.RandomState(0)
    for i in range(60):
        shape = (1, 1) if i == 0 else (2, 2) if i == 1 else tuple(rng.randint(1, 80, 2))  # small elements
        mask = rng.randint(0, 256, shape).astype(np.uint8)
        cells = np.empty((3, 1), object)
        cells[:] = [[sparse.csc_matrix(mask > 9)], [np.float64(2)], [np.zeros((0, 2))]]
        before = {"Boundaries": cells, "CategoriesPresent": np.arange(4.0), "text": "text"} if i % 2 else {}
        fields = {**before, "Segmentation": mask, "after": np.int16([1, 2])}
        out = io.BytesIO()
        scipy_io.savemat(out, {"other": mask.T, "GTcls": fields, "GTinst": fields}, do_compression=i % 3 == 0,
                         long_field_names=i % 5 == 0, oned_as="row" if i % 4 else "column")
        assert np.array_equal(read_segmentation(out.getvalue(), "x"), mask)
        for order in "<>":  # scipy writes this machine's order alone, but reads both
            data = mat(mask, order, compressed=bool(i % 2))
            assert np.array_equal(scipy_io.loadmat(io.BytesIO(data))["GTcls"]["Segmentation"][0, 0], mask)
            assert np.array_equal(read_segmentation(data, "x"), mask)


def test_damaged_and_hostile_masks_give_one_line_and_take_no_memory():
    rng, mask = np.random.RandomState(1), np.random.RandomState(0).randint(0, 21, (40, 50)).astype(np.uint8)
    plain, files = mat(mask, compressed=False), []
    for i in range(120):
        data = bytearray(mat(mask, "<>"[i % 2], compressed=i % 4 < 2))
        for place in rng.randint(0 if i % 3 == 1 else 128, min(len(data), 700), 3):
            data[place] = rng.randint(256)
        files.append(bytes(data)[:rng.randint(len(data)) if i % 3 == 0 else None])
    files += [plain[:at] + struct.pack("<i", 0x7FFFFFF0) + plain[at + 4:] for at in range(128, 1200, 4)]
    bomb = zlib.compress(struct.pack("<II", 14, 1 << 30) + bytes(1 << 27))  # 128 MB in 128 kB
    files += [plain[:128] + struct.pack("<II", 15, len(bomb)) + bomb]
    refused = 0
    tracemalloc.start()
    for data in files:
        try:
            read_segmentation(data, "x.mat")
        except sources.DataError as error:
            refused += 1
            assert str(error).startswith("cannot read the mask x.mat (") and "\n" not in str(error)
    assert refused > 100 and tracemalloc.get_traced_memory()[1] < 3 << 24  # the limit, and zlib's own
    tracemalloc.stop()
