"""The benchmarks' official trees, drawn small; archives of the official layout, and a server for them."""
import contextlib
import hashlib
import http.server
import io
import json
import shutil
import struct
import tarfile
import threading
import zipfile
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

PROTOCOL = json.loads((Path(__file__).parents[1] / "sources" / "protocol.json").read_text())
LISTS = {"voc": "ImageSets/Segmentation", "context": "ImageSets/SegmentationContext"}
FILES = {  # images and masks of each part
    "voc": {"train": ("JPEGImages", "SegmentationClassAug"), "val": ("JPEGImages", "SegmentationClass")},
    "context": dict.fromkeys(("train", "val"), ("JPEGImages", "SegmentationClassContext")),
    "coco-stuff": {part: (f"{part}2017", f"stuffthingmaps/{part}2017") for part in ("train", "val")}}
VOC_COLOURS = np.array([[sum((i >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]
                        for i in range(256)], np.uint8)  # the bits of i spread over the high bits of R, G and B


def raw_value(name, k):
    """What class k is in the official files."""
    return PROTOCOL["coco-stuff"]["raw_ids"][k] if name == "coco-stuff" else k + 1


def write(image, mask, values, size, palette=True):
    """A JPEG in the colours of its mask: blocks of up to four raw values, each with a void border, on values[0]."""
    labels = np.full(size, values[0], np.uint8)
    for value, (top, left) in zip(values[1:], ((4, 4), (4, 32), (32, 4), (32, 32))):
        labels[top:top + 24, left:left + 24] = 255
        labels[top + 1:top + 23, left + 1:left + 23] = value
    for path in (image, mask):
        path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(VOC_COLOURS[labels]).save(image, quality=95)
    labels = Image.fromarray(labels)
    if palette:  # as VOC has them; the others are plain grey
        labels.putpalette(VOC_COLOURS.flatten().tolist())
    labels.save(mask)


def draw_tree(name, root, train=12, val=3, sides=(60, 90)):
    """The tree as its archives unpack; training image i holds an unseen class where i % 3 == 0, test images always."""
    rng, protocol = np.random.RandomState(0), PROTOCOL[name]
    unseen = protocol.get("unseen") or protocol["unseen_zs3_lineage"]
    seen = [k for k in range(len(protocol["classes"])) if k not in unseen]
    ground = raw_value(name, seen[-1]) if name == "coco-stuff" else 0
    for i in range(train + val):
        part, stem = ("train", f"2007_{i:06d}") if i < train else ("val", f"2008_{i:06d}")
        images, masks = FILES[name][part]
        mask = root / masks / f"{stem}.png"
        ks = [seen[(3 * i + j) % len(seen)] for j in range(3)]
        ks += [unseen[i % len(unseen)]] * (i % 3 == 0 or part == "val")
        write(root / images / f"{stem}.jpg", mask, [ground, *(raw_value(name, k) for k in ks)],
              rng.randint(*sides, 2), palette=name == "voc")
        if name == "voc" and part == "val":  # the augmented folder holds them too; they must not be trained on
            shutil.copy(mask, root / "SegmentationClassAug")
        if name in LISTS:
            (root / LISTS[name]).mkdir(parents=True, exist_ok=True)
            with open(root / LISTS[name] / f"{part}.txt", "a") as file:
                file.write(f"{stem}\n")
    return root


def png(values, depth=8, colour=0, *chunks):
    """Values (H, W) or (H, W, channels) as a PNG of these bits a channel; more chunks (type, data) after its header."""
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    H, W = values.shape[:2]
    bits = np.unpackbits(values.reshape(H, -1, 1).astype(">u2").view(np.uint8), axis=2)[..., 16 - depth:]
    rows = np.packbits(bits.reshape(H, -1), axis=1)
    packed = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*pair) for pair in (
        (b"IHDR", struct.pack(">2I5B", W, H, depth, colour, 0, 0, 0)), *chunks, (b"IDAT", packed), (b"IEND", b"")))


def own_data(root, values=(0, 1, 2), classes=("sky", "dog", "cat"), unseen=()):
    """A folder of own data: images a, b to train on, c to test."""
    for name in ("a", "b", "c"):
        write(root / f"images/{name}.jpg", root / f"masks/{name}.png", values, (70, 80))
    for name, lines in (("train", "ab"), ("val", "c"), ("classes", classes), ("unseen", unseen)):
        (root / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    return root


def pack(path, files):
    """{name: bytes, or in a tar str, the target of a symbolic link} -> a tar, tgz or zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            if isinstance(data, str):
                member.type, member.linkname, data = tarfile.SYMTYPE, data, b""
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def under(root, prefix=""):
    """{name in the archive: bytes} of all files in a folder."""
    return {f"{prefix}{path.relative_to(root)}": path.read_bytes() for path in root.rglob("*") if path.is_file()}


def voc_archives(tree, folder):
    """A drawn VOC tree -> VOC's and SBD's archives. VOC itself labels the test images and the first five."""
    masks = {path.stem: path for path in sorted((tree / "SegmentationClassAug").iterdir())}
    files = {name: data for name, data in under(tree, "VOCdevkit/VOC2012/").items() if "ClassAug" not in name}
    sbd = {"benchmark_RELEASE/dataset/img/x.jpg": b"not needed"}
    for i, (name, path) in enumerate(masks.items()):
        mask = np.array(Image.open(path))
        if i < 5:  # SBD labels some of VOC's pictures too, in its own way
            files[f"VOCdevkit/VOC2012/SegmentationClass/{name}.png"] = path.read_bytes()
            mask[:] = 0
        files[f"VOCdevkit/VOC2012/Annotations/{name}.xml"] = b"not needed"
        sbd[f"benchmark_RELEASE/dataset/cls/{name}.mat"] = mat(mask)
    return pack(folder / "VOCtrainval_11-May-2012.tar", files), pack(folder / "benchmark.tgz", sbd)


def mat(mask, compressed=True):
    """SBD's file of a mask, written after the format's description: a struct GTcls with the field Segmentation."""
    def element(kind, body):
        return struct.pack("<II", kind, len(body)) + body + bytes(-len(body) % 8)

    def array(number, shape, name, body):
        return element(14, element(6, struct.pack("<II", number, 0)) + element(5, struct.pack("<2i", *shape)) +
                       element(1, name) + body)

    names = element(5, struct.pack("<i", 32)) + element(1, b"Segmentation".ljust(32, b"\0"))
    data = array(2, (1, 1), b"GTcls", names + array(9, mask.shape, b"", element(2, mask.tobytes(order="F"))))
    if compressed:
        packed = zlib.compress(data)
        data = struct.pack("<II", 15, len(packed)) + packed
    return b"".ljust(124) + b"\0\1IM" + data


@contextlib.contextmanager
def serve(files):
    """{path: bytes} -> address, list of (path, Range) asked for. (bytes, n) instead of bytes: sent from the start
    whatever the Range, and the connection ends after n of them. [bytes]: the whole answer, headers included."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Range"]))
            if not (data := files.get(self.path)):
                return self.send_error(404)
            if isinstance(data, list):
                return self.wfile.write(data[0])
            ranges = isinstance(data, bytes)
            data, last = (data, None) if ranges else data
            first = int(self.headers["Range"][6:-1]) if ranges and self.headers["Range"] else 0
            self.send_response(206 if first else 200)
            self.send_header("Content-Length", str(len(data) - first))
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            self.wfile.write(data[first:last])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", asked
        server.shutdown()


def md5(data):
    return hashlib.md5(data).hexdigest()
