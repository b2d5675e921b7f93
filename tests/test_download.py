"""Archives from a server on this machine: whole or not at all, unpacked safely; SBD's mask files."""
import contextlib
import dataclasses
import io
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import threading
import tracemalloc
import zipfile
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import ROOT, command, run_inside
from trees import draw_tree, mat, md5, pack, serve, under, voc_archives

import sources
from sources import check as data_check
from sources import coco_stuff, download, voc
from sources.matlab import read_segmentation

NOBODY = "http://127.0.0.1:9/"
NOISE, LOOSE_ZIP = np.random.RandomState(0).bytes(150_000), io.BytesIO()
with zipfile.ZipFile(LOOSE_ZIP, "w") as file:
    file.writestr("pictures/a.jpg", NOISE)
SET = download.Archive("set.tar", len(NOISE), md5(NOISE), (), 10**9)
LOOSE = download.Archive("set.zip", 10**6, None, (), 10**9)  # without a checksum
WHOLE = {SET: NOISE, LOOSE: LOOSE_ZIP.getvalue()}
HTML = b"<!doctype html><title>Sign in to the network</title>"


def fetch(root, archive, *addresses):
    (root / ".download").mkdir(exist_ok=True)
    return download.fetch(dataclasses.replace(archive, addresses=addresses), root, root / ".download")


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def answer(body, *headers, status="200 OK"):
    return [b"\r\n".join([f"HTTP/1.1 {status}".encode(), *map(str.encode, headers), b"", body])]


def chunked(body):
    return b"%x\r\n%b\r\n" % (len(body), body)


@pytest.mark.parametrize("archive, there, answered, fault, kept", [  # .part before the call, the answer, .part after
    (SET, 0, None, "404", 0),
    (SET, 0, WHOLE[SET][:-1] + b"x", f"its md5 is .*, expected {SET.md5}", 0),
    (SET, 0, WHOLE[SET][:-1], "149,999 bytes there .*, expected 150,000", 0),
    (SET, 0, (WHOLE[SET], 70_000), "ended after 70,000 of 150,000 bytes", 70_000),
    (SET, 30_000, (WHOLE[SET], 20_000), "ended after 20,000", 30_000),  # it knows no ranges, and sends less than before
    (SET, 30_000, (WHOLE[SET], 40_000), "ended after 40,000", 40_000),
    (SET, 0, answer(HTML, "Content-Type: text/html", "Content-Length: 52"), "52 bytes there .text/html.", 0),
    (SET, 9, answer(HTML, "Content-Type: text/html"), "sends text/html and no archive.*Sign in", 9),
    (SET, 0, answer("Sorry, später".encode(), "Content-Length: many"), "no archive", 0),
    (SET, 0, answer(b"%x\r\n" % 150_000 + WHOLE[SET][:60_000], "Transfer-Encoding: chunked"), "IncompleteRead", 60_000),
    (SET, 0, answer(chunked(WHOLE[SET][:50_000]) + chunked(b""), "Transfer-Encoding: chunked"), "after 50,000", 50_000),
    (SET, 0, answer(b"", f"Content-Length: {'9' * 30}"), "9,999,999.* bytes there", 0),
    (SET, 9, answer(b"", "Content-Range: bytes 0-149999/150000", status="206 x"), "from 9 on, .* says 'bytes 0-", 9),
    (SET, 9, answer(b"", "Location: http://[x/", status="302 Found"), "Invalid", 9),
    (SET, 9, [b"hello\r\n\r\n"], "hello", 9),
    (LOOSE, 90_000, None, "404", 90_000),
    (LOOSE, 0, answer(HTML, "Content-Length: 52"), "no archive", 0),
    (LOOSE, 0, bytes(900), "no whole zip", 0),
    (LOOSE, 90_000, answer(b"", "Content-Range: bytes */70", status="416 x"), "416", 0),  # another version, shorter
    (LOOSE, 0, (WHOLE[LOOSE], 70_000), "ended after 70,000", 70_000)])
def test_an_address_that_fails_leaves_what_is_right(archive, there, answered, fault, kept, tmp_path, capsys):
    whole, name, partial = WHOLE[archive], archive.name, tmp_path / f".download/{archive.name}.part"
    partial.parent.mkdir()
    if there:
        partial.write_bytes(whole[:there])
    with serve({f"/{name}": answered, f"/whole/{name}": whole}) as (server, asked):
        with pytest.raises(sources.DataError, match=f"from any of 1 addresses .*{fault}.* at {tmp_path}/{name}"):
            fetch(tmp_path, archive, server)
        assert re.fullmatch(f"{server}{name}\n    failed: [^\n]*{fault}[^\n]*\n", capsys.readouterr().out)
        assert (partial.read_bytes() if partial.exists() else b"") == whole[:kept]
        for _ in range(2):  # the second time without a request
            assert fetch(tmp_path, archive, NOBODY, f"{server}whole/").read_bytes() == whole
            assert names(tmp_path) == [".download"] and names(partial.parent) == [name]
        assert [want for path, want in asked if "whole" in path] == [f"bytes={kept}-" if kept else None]
    assert "refused" in capsys.readouterr().out


def test_what_the_user_put_there_is_used_or_named_and_never_deleted(tmp_path):
    (tmp_path / ".download").mkdir()
    (tmp_path / ".download/set.tar.part").write_bytes(NOISE)  # killed between the last byte and the new name
    assert fetch(tmp_path, SET, NOBODY).read_bytes() == NOISE
    path = tmp_path / "set.tar"
    path.write_bytes(NOISE[:-1])
    with pytest.raises(sources.DataError, match="set.tar is not the official archive .its md5 .*: move it"):
        fetch(tmp_path, SET)
    data = pack(path, {"pictures/a.jpg": b"a"}).read_bytes()
    mine = dataclasses.replace(SET, md5=md5(data))
    for part, message in (("absent", "holds no absent"), ("pictures", None)):
        with pytest.raises(sources.DataError, match=message) if message else contextlib.nullcontext():
            download.bring("voc", tmp_path, {mine: {part: tmp_path / "in" / part}}, tmp_path / ".download")
        assert path.read_bytes() == data
    (tmp_path / "link").symlink_to("nowhere")
    download.bring("voc", tmp_path, {mine: {"pictures": tmp_path / "link"}}, tmp_path / ".download")
    assert names(tmp_path / "in/pictures") == ["a.jpg"] and (tmp_path / "link").is_symlink()


def test_downloads_take_turns_and_a_killed_one_frees_its_place(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(download, "WAIT", 0.1)
    code = f"import pathlib, sources\nwith sources.workshop(pathlib.Path({str(tmp_path)!r})):\n" \
           "    print(flush=True)\n    input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=-1, stdout=-1, cwd=ROOT) as other:
        other.stdout.readline()
        threading.Timer(0.5, other.kill).start()
        with download.workshop(tmp_path) as folder:
            assert other.poll() is not None and names(tmp_path) == [folder.name, ".download.lock"]
    assert not folder.exists() and "another process downloads into" in capsys.readouterr().out


def test_a_disk_that_is_too_small_is_refused_before_the_first_byte(tmp_path, monkeypatch):
    big, disk = dataclasses.replace(SET, size=4 * 10**9, addresses=(NOBODY,)), SimpleNamespace(free=6.01e9)
    monkeypatch.setattr(download.shutil, "disk_usage", lambda _: disk)
    download.reserve("voc", tmp_path, [big, SET], tmp_path)
    disk.free = 5.99e9
    with pytest.raises(sources.DataError, match="4.0 GB; needs 6.0 GB of disk, keeps 2.0 GB, 6.0 GB are free .*: make"):
        download.bring("voc", tmp_path, {big: {"a": tmp_path / "a"}, SET: {"b": tmp_path / "b"}}, tmp_path)
    with open(tmp_path / "set.tar.part", "wb") as file:
        file.truncate(4 * 10**9)  # without taking disk: what has arrived needs no more room
    disk.free = 1.1e9  # of which the images need 1
    download.reserve("voc", tmp_path, [big], tmp_path)


@pytest.mark.parametrize("kind", ["tar", "tgz", "zip"])
def test_what_is_asked_for_is_unpacked_all_of_it_or_nothing(kind, tmp_path):
    path, wanted = tmp_path / f"set.{kind}", {"pictures": tmp_path / "in/pictures"}
    data = pack(path, {f"pictures/{name}.jpg": NOISE for name in "abc"} | {"other/d.txt": b"not asked"}).read_bytes()
    for there, parts, message in ((data[:60_000], wanted, f"set.{kind} cannot be unpacked"),
                                  (data, wanted | {"absent": tmp_path / "absent"}, "holds no absent")):
        path.write_bytes(there)
        with pytest.raises(sources.DataError, match=message):
            download.unpack(path, parts, tmp_path / "scratch")
        assert set(names(tmp_path)) <= {path.name, "scratch"}
    (tmp_path / "scratch/pictures/of a killed call").mkdir(parents=True)
    download.unpack(path, wanted, tmp_path / "scratch")
    assert names(tmp_path / "in/pictures") == ["a.jpg", "b.jpg", "c.jpg"]


@pytest.mark.parametrize("kind", ["tar", "zip"])
@pytest.mark.parametrize("name, data", [("pictures/../../out", b"evil"), ("pictures/../../../out", b"evil"),
                                        ("/{}/out", b"evil"), ("pictures/out", "../../../out")])
def test_nothing_leaves_the_folder(kind, name, data, tmp_path):
    root = tmp_path / "deep/root"
    root.mkdir(parents=True)
    path = pack(root / f"set.{kind}", {"pictures/a.jpg": b"a", name.format(tmp_path): data})
    try:
        download.unpack(path, {"pictures": root / "pictures"}, root / "scratch")
    except sources.DataError as error:
        assert "\n" not in str(error)
    assert names(tmp_path) + names(tmp_path / "deep") == ["deep", "root"]
    assert set(names(root)) <= {"pictures", path.name, "scratch"}


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
    assert names(root) == [".download.lock", "VOCdevkit"]  # archives and what came between are gone
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
    assert len(asked) == 4 and len(sources.open_dataset("voc", root).train) == 12 and not (root / ".download").exists()
    (tmp_path / "benchmark.tgz").rename(root / "benchmark.tgz")  # the user's own, packed and unpacked: used, and stay
    for extra in ([], ["benchmark_RELEASE"]):
        shutil.rmtree(masks)
        if extra:
            with tarfile.open(root / "benchmark.tgz") as archive:
                archive.extractall(root, filter="data")
            (root / "benchmark.tgz").write_bytes(b"is not asked")
        (root / ".download").mkdir()
        sources.download_dataset("voc", root)
        assert under(masks) == under(drawn / "SegmentationClassAug") and len(asked) == 4
        assert names(root) == [".download.lock", "VOCdevkit", "benchmark.tgz", *extra]


def test_coco_stuff_from_its_three_archives(official, tmp_path):
    tree, root = draw_tree("coco-stuff", tmp_path / "tree"), tmp_path / "data"
    asked = official(coco_stuff, {
        "TRAIN": pack(tmp_path / "train2017.zip", under(tree / "train2017", "train2017/")),
        "VAL": pack(tmp_path / "val2017.zip", under(tree / "val2017", "val2017/")),
        "MAPS": pack(tmp_path / "stuffthingmaps_trainval2017.zip", under(tree / "stuffthingmaps"))})
    for _ in range(2):
        sources.download_dataset("coco-stuff", root)
    (root / ".download.lock").unlink()
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


def test_damaged_and_hostile_masks_give_one_line_and_take_no_memory():
    rng, mask, refused = np.random.RandomState(1), np.random.RandomState(0).randint(0, 21, (40, 50)).astype(np.uint8), 0
    good = [mat(mask, compressed) for compressed in (False, True)]
    bomb = zlib.compress(struct.pack("<II", 14, 1 << 30) + bytes(1 << 27))  # 128 MB in 128 kB
    files = [good[0][:128] + struct.pack("<II", 15, len(bomb)) + bomb]
    files += [good[0][:at] + struct.pack("<i", 0x7FFFFFF0) + good[0][at + 4:] for at in range(128, 600, 4)]
    for i in range(160):
        data = bytearray(good[i % 2])
        data[rng.randint(128 * (i % 3 > 0), min(len(data), 500))] = rng.randint(256)
        files.append(bytes(data[:rng.randint(len(data))] if i % 5 == 0 else data))
    with pytest.raises(sources.DataError):  # a size that numpy would fill in
        read_segmentation(good[0].replace(struct.pack("<2i", 40, 50), struct.pack("<2i", -1, 50)), "x")
    tracemalloc.start()
    for data in files:
        try:
            read_segmentation(data, "x.mat")
        except sources.DataError as error:
            refused += 1
            assert str(error).startswith("cannot read the mask x.mat (") and "\n" not in str(error)
    assert refused > 100 and tracemalloc.get_traced_memory()[1] < 3 << 24  # the limit, and zlib's own
    tracemalloc.stop()
