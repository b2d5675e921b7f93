"""Reads users' lists, folders, images and masks. Every error names the file and says what to do."""
import contextlib
import os
import re
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torchvision.transforms.v2 import functional as TF

from losses import IGNORE
from support import UserError

INVALID = 254  # marks mask values that the class list does not know
IMAGES, MASKS = (".jpg", ".jpeg", ".png"), (".png",)  # suffixes in a data set's folders
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # for some others Pillow would start programs
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # 64 MB: long notes and colour profiles do no harm
ORIENTATION = 0x112  # EXIF's tag; 1 is upright
WHITE = (1, 255, 4095, 65535)  # of pictures of floats, 8, 12 and 16 bits: the first that its values do not exceed
LONGEST = 1000  # characters of a class's line: more is no name, and would keep the tokenizer busy for hours
# Quotes, brackets, comments in a list of classes would become part of their texts
NO_CLASS = re.compile(r'\W|.*[#;"{}<>|\\\[\]，、；\ufffd]')


class DataError(UserError):
    """Data that cannot be used; the message names the file and says what to do."""


class Pair(NamedTuple):
    """An image and its mask, of own data or of a benchmark, whose pictures and masks are known to fit."""
    name: str
    image: Path
    mask: Path
    own: bool = False


def short(name):
    """A name for a message, never longer than a line."""
    return repr(name if len(name) <= 60 else name[:60] + "…")


def read_lines(path, classes=False):
    """Text file -> its lines without spaces around them and without empty ones; UTF-8, or UTF-16 with its mark.

    classes: the lines are names for CLIP, and masks count them, so that empty ones, numbers, comments are refused."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}: expected a text file with one name per line")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # Windows' marks
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # UTF-16 without its mark, a file that a power cut left empty
        raise DataError(f"cannot read {path} as UTF-8 text: save it again with the encoding UTF-8")
    # composed, as CLIP reads them: macOS writes é as two characters
    lines = [unicodedata.normalize("NFC", line.strip()) for line in re.split("\r\n|\r|\n", text.rstrip())]
    if classes:
        lines = [plain_spaces(line) for line in lines]
    for n, line in enumerate(lines if classes else [], 1):
        counted = re.match(rf"0*({n - 1}|{n})\b", line)
        if not line or counted or len(line) > LONGEST or not line.isprintable() or NO_CLASS.match(line):
            raise DataError(f"line {n} of {path} is {short(line)}: expected one name a line in UTF-8, without numbers, "
                            f"quotes, comments, tabs or empty lines, at most {LONGEST:,} characters")
    return list(filter(None, lines))


def plain_spaces(line):
    """Spaces as word processors write them -> a space."""
    return re.sub("[\u00a0\u3000]", " ", line)


def list_files(folder, suffixes):
    """Folder -> {file name without suffix: path}, sorted, from one listing of the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    files = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        path = folder / entry.name  # hidden ones are not the user's: ._NAME.jpg is macOS's
        if path.suffix.lower() in suffixes and entry.is_file() and not entry.name.startswith("."):
            other = files.setdefault(unicodedata.normalize("NFC", path.stem), path)
            if other != path:
                raise DataError(f"{folder} holds {other.name} and {path.name}: keep one of them")
    if not files:
        raise DataError(f"no {' or '.join(suffixes)} file in {folder} itself: folders in it are not searched, and "
                        "masks must be PNG, as JPEG changes their values")
    return files


def pair_up(names, images, masks, listing, own=False):
    """Names -> [Pair], each name once. `listing` is where they stand, for the errors.

    A name is only ever looked up, so it cannot lead out of the folders."""
    if not names:
        raise DataError(f"{listing} is empty: expected at least one name")
    names = list(dict.fromkeys(name if name in images else re.sub(r"(?i)\.(jpe?g|png)$", "", name) for name in names))
    for kind, files in (("image", images), ("mask", masks)):
        if missing := [name for name in names if name not in files]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            some = next(iter(files.values()))
            raise DataError(f"{listing} names {short(missing[0])}{more}, but {some.parent} itself holds no {kind} of "
                            f"that name ({some.name}, for example): image and mask must have the name in the list, "
                            "letter for letter, and lie in no further folder")
    return [Pair(name, images[name], masks[name], own) for name in names]


@contextlib.contextmanager
def opened(path, kind, formats, expected):
    """Every picture is opened here; what goes wrong in the block becomes a DataError that names it."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with Image.open(path, formats=formats) as image:
            yield image
    except Exception as error:  # Pillow raises all sorts on damaged files
        found = "damaged or another format" if isinstance(error, Image.UnidentifiedImageError) else error
        raise DataError(f"cannot read the {kind} {path} ({found}): expected {expected}; replace it or leave it "
                        "out") from None


def read_image(path, upright=False, own=False):
    """File -> uint8 RGB (3, H, W). `upright`: rotated as EXIF says; masks are not rotated.

    own: a picture that EXIF turns is refused, as its mask may be turned or not."""
    with opened(path, "image", FORMATS, f"an intact file in one of the formats {', '.join(FORMATS)}") as image:
        deep = image.mode[0] not in "IF" and ";16" in str(image.tile)  # of which Pillow takes the upper 8 bits
        if own and image.getexif().get(ORIENTATION, 1) not in (0, 1):
            raise ValueError("its EXIF note turns it, but not its mask: save it turned, without the note")
        shown = TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image) if upright else image))
        if deep and shown.max() < 16:
            raise ValueError("black: its 16 bits hold only values below 4,096, scale them to 8 bits")
    return shown


def rgb(image):
    """Any Pillow image -> RGB: 12 and 16 bits and floats are scaled to 8 bits; what is transparent becomes white.

    Raises ValueError for values that are no brightness."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        real, low, high = image.mode == "F", values.min(), values.max()
        if not (0 <= low <= high <= WHITE[-1]) or real and 1 < high < 16:  # not finite either
            raise ValueError(f"its values go from {low:g} to {high:g}: expected 0 to 1 (floats), 255, 4,095 or 65,535")
        white = next(white for white in WHITE[not real:] if high <= white)
        image = Image.fromarray((values * (255 / white)).round().astype(np.uint8))
    elif "transparency" in image.info or image.mode.endswith(("A", "a")):
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_values(path):
    """Mask file -> raw values as they are stored, uint8 array (H, W): a palette's indexes, not its colours."""
    with opened(path, "mask", ("PNG",), "a whole PNG file") as image:
        with Image.open(path, formats=["PNG"]) as checked:
            checked.verify()  # PNG's checksums, which are not looked at where an image is unpacked
        spread = {"L;2": 85, "L;4": 17}.get(image.tile[0][3], 1)  # Pillow spreads grey of 2 and 4 bits over 0 to 255
        mode, values = image.mode, np.array(image)
    highest = int(values.max(initial=0))
    if mode == "1" or values.ndim > 2 or highest > 255:  # 1 bit: is that 0 and 1, or 0 and 255?
        raise DataError(f"the mask {path} has Pillow's mode {mode} and values up to {highest}: expected one channel of "
                        "8 bits, grey or palette, with each pixel's class index, and 255 where no class is")
    return (values // spread).astype(np.uint8)  # 16-bit files with small values are as good as 8-bit ones


def read_raw(pair):
    """Pair -> uint8 image (3, H, W) and its mask's raw values (H, W), of one size."""
    image, raw = read_image(pair.image, own=pair.own), read_values(pair.mask)
    if image.shape[1:] != raw.shape:
        (H, W), (h, w) = image.shape[1:], raw.shape
        raise DataError(f"the image {pair.image} is {H}×{W} pixels, its mask {pair.mask} is {h}×{w}, expected one "
                        "size: turn or scale the mask as the image is, by nearest neighbours")
    return image, raw


def read_pair(pair, table, classes):
    """Pair and look-up table (DataSource.table) -> name, uint8 image (3, H, W), uint8 labels (H, W)."""
    image, raw = read_raw(pair)
    labels = table.numpy()[raw]
    if (labels == INVALID).any():
        *known, _ = np.flatnonzero(table.numpy() != INVALID)  # the last is 255
        raise DataError(f"the mask {pair.mask} holds the value {raw[labels == INVALID][0]}, which none of the "
                        f"{classes} classes has: expected {known[0]} to {known[-1]}, and {IGNORE} where no class is")
    return pair.name, image, torch.from_numpy(labels)
