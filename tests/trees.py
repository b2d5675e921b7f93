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
VOC2012 = "VOCdevkit/VOC2012"
FOLDERS = {"voc": ("JPEGImages", "SegmentationClass", "SegmentationClassAug", "ImageSets/Segmentation"),
           "context": ("JPEGImages", "SegmentationClassContext", "ImageSets/SegmentationContext"),
           "coco-stuff": ("train2017", "val2017", "stuffthingmaps/train2017", "stuffthingmaps/val2017")}


def raw_value(name, k):
    """What class k is in the official files."""
    return PROTOCOL["coco-stuff"]["raw_ids"][k] if name == "coco-stuff" else k + 1


def voc_colour(i):
    """VOC's colour map: the bits of i spread over the high bits of red, green and blue."""
    return [sum((i >> 3 * bit + channel & 1) << 7 - bit for bit in range(3)) for channel in range(3)]


VOC_COLOURS = np.array([voc_colour(i) for i in range(256)], np.uint8)


def write(image, mask, values, size, palette=True):
    """A JPEG in the colours of its mask: blocks of up to four raw values, each with a void border, on values[0]."""
    labels = np.full(size, values[0], np.uint8)
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
    for folder in FOLDERS[name]:
        (root / folder).mkdir(parents=True)
    for i in range(train + val):
        part, stem = ("train", f"2007_{i:06d}") if i < train else ("val", f"2008_{i:06d}")
        image = root / "JPEGImages" / f"{stem}.jpg"
        mask = root / ("SegmentationClassContext" if name == "context" else
                       "SegmentationClassAug" if part == "train" else "SegmentationClass") / f"{stem}.png"
        if name == "coco-stuff":
            image = root / f"{part}2017" / f"{i:012d}.jpg"
            mask = root / f"stuffthingmaps/{part}2017" / f"{i:012d}.png"
        ks = [seen[(3 * i + j) % len(seen)] for j in range(3)]
        ks += [unseen[i % len(unseen)]] * (i % 3 == 0 or part == "val")
        write(image, mask, [ground] + [raw_value(name, k) for k in ks], rng.randint(*sides, 2), palette=name == "voc")
        if name == "voc" and part == "val":  # the augmented folder holds them too; they must not be trained on
            shutil.copy(mask, root / "SegmentationClassAug")
        if name != "coco-stuff":
            lists = root / ("ImageSets/Segmentation" if name == "voc" else "ImageSets/SegmentationContext")
            with open(lists / f"{part}.txt", "a") as file:
                file.write(stem + "\n")
    return root


def own_data(root, values=(0, 1, 2), classes=("sky", "dog", "cat"), unseen=()):
    """A folder of own data: images a, b to train on, c to test."""
    for folder in ("images", "masks"):
        (root / folder).mkdir(parents=True)
    for name in ("a", "b", "c"):
        write(root / f"images/{name}.jpg", root / f"masks/{name}.png", values, (70, 80))
    for name, lines in (("train", "ab"), ("val", "c"), ("classes", classes), ("unseen", unseen)):
        (root / f"{name}.txt").write_text("".join(line + "\n" for line in lines))
    return root


# ---------------------------------------------------------------- archives


def pack(path, files, links=()):
    """{name: bytes} -> a tar, tgz or zip."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w:gz" if path.suffix == ".tgz" else "w") as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        for name, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    return path


def under(root, prefix, *folders):
    return {f"{prefix}{path.relative_to(root)}": path.read_bytes() for folder in folders
            for path in sorted((root / folder).rglob("*")) if path.is_file()}


def voc_archives(tree, folder, official=5):
    """A drawn VOC tree -> VOC's and SBD's archives. VOC itself labels the test images and the first `official`."""
    files = under(tree, f"{VOC2012}/", "JPEGImages", "SegmentationClass", "ImageSets")
    masks = {path.stem: path.read_bytes() for path in sorted((tree / "SegmentationClassAug").iterdir())}
    names = list(masks)
    files |= {f"{VOC2012}/SegmentationClass/{name}.png": masks[name] for name in names[:official]}
    files |= {f"{VOC2012}/Annotations/{name}.xml": b"<annotation/>" for name in names}  # not needed
    labels = {name: np.array(Image.open(io.BytesIO(data))) for name, data in masks.items()}
    for name in names[:official]:  # SBD labels some of VOC's pictures too, in its own way
        labels[name] = np.zeros_like(labels[name])
    sbd = {f"benchmark_RELEASE/dataset/cls/{name}.mat": mat(mask) for name, mask in labels.items()}
    sbd["benchmark_RELEASE/dataset/img/x.jpg"] = b"not needed"
    return pack(folder / "VOCtrainval_11-May-2012.tar", files), pack(folder / "benchmark.tgz", sbd)


def mat(mask, order="<", compressed=True):
    """SBD's file of a mask, written after the format's description: GTcls with Boundaries, Segmentation and another."""
    def element(kind, body, small=False):
        if small:
            return struct.pack(order + "I", len(body) << 16 | kind) + body.ljust(4, b"\0")
        return struct.pack(order + "II", kind, len(body)) + body + bytes(-len(body) % 8)

    def array(number, shape, name, *parts):
        head = element(6, struct.pack(order + "II", number, 0)) + \
            element(5, struct.pack(f"{order}{len(shape)}i", *shape)) + element(1, name, 0 < len(name) <= 4)
        return element(14, head + b"".join(parts))

    def numbers(x):
        return array(9, x.shape, b"", element(2, x.tobytes(order="F"), x.size <= 4))

    fields = {"Boundaries": array(1, (2, 1), b"", numbers(mask[:1]), numbers(mask[:2, :2])),  # a cell
              "Segmentation": numbers(mask), "CategoriesPresent": array(6, (1, 2), b"", element(2, b"\7\1", True))}
    names = b"".join(name.encode().ljust(32, b"\0") for name in fields)
    variable = array(2, (1, 1), b"GTcls", element(5, struct.pack(order + "i", 32), True), element(1, names),
                     *fields.values())
    if compressed:
        packed = zlib.compress(variable)
        variable = struct.pack(order + "II", 15, len(packed)) + packed
    return b"MATLAB 5.0 MAT-file".ljust(124) + struct.pack(order + "H", 0x100) + \
        (b"IM" if order == "<" else b"MI") + variable


# ---------------------------------------------------------------- a server


@contextlib.contextmanager
def serve(files):
    """{path: bytes, or a function of the request's handler} -> address, list of (path, Range) asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append((self.path, self.headers["Range"]))
            answer = files.get(self.path)
            if answer is None:
                return self.send_error(404)
            if callable(answer):
                return answer(self)
            first = int((self.headers["Range"] or "bytes=0-")[6:-1])
            self.send_response(206 if self.headers["Range"] else 200)
            self.send_header("Content-Length", str(len(answer) - first))
            self.end_headers()
            self.wfile.write(answer[first:])

        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/", asked
        finally:
            server.shutdown()


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()
