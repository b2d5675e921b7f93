"""Reads users' lists, folders, images and masks. Every error names the file and says what to do."""
import contextlib
import os
import re
import unicodedata
import zlib
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
LONGEST = 1000  # characters of a line: more is no name, and would keep the tokenizer busy for hours
# Numbers, quotes, brackets, comments in a list of classes would become part of their texts
NO_CLASS = re.compile('$|\\W|.*[#;"{}<>|\\\\\\[\\]，、；\u200b\ufeff\ufffd]')


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


# ---------------------------------------------------------------- lists and folders


def read_lines(path, numbered=False):
    """Text file -> its lines without spaces around them and without empty ones; UTF-8, or UTF-16 with its mark.

    numbered: masks count the lines, so that an empty one or a comment is refused."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}: expected a text file with one name per line")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # Windows' marks
    except UnicodeDecodeError:
        raise DataError(f"cannot read {path} as UTF-8 text: save it again with the encoding UTF-8") from None
    # composed, as CLIP reads them: macOS writes é as two characters
    lines = [unicodedata.normalize("NFC", line.strip()) for line in re.split("\r\n|\r|\n", text.rstrip())]
    for n, line in enumerate(lines, 1):
        odd = len(line) > LONGEST or any(unicodedata.category(c) in ("Cc", "Zl", "Zp", "Co", "Cn") for c in line)
        if odd or numbered and lines != [""] and (NO_CLASS.match(line) or re.match(rf"0*({n - 1}|{n})\b", line)):
            raise DataError(f"line {n} of {path} is {short(line)}: expected one name a line in UTF-8, without numbers, "
                            f"quotes, comments, tabs or empty lines, at most {LONGEST:,} characters")
    return list(filter(None, lines))


def list_files(folder, suffixes):
    """Folder -> {file name without suffix: path}, sorted, from one listing of the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    with os.scandir(folder) as entries:  # hidden ones are not the user's: ._NAME.jpg is macOS's
        kinds = sorted((entry.name, entry.is_file()) for entry in entries if not entry.name.startswith("."))
    files = {}
    for path in (folder / name for name, is_file in kinds if is_file):  # no pipes, no folders
        if path.suffix.lower() in suffixes:
            stem = unicodedata.normalize("NFC", path.stem)
            if stem in files:
                raise DataError(f"{folder} holds {files[stem].name} and {path.name}: keep one of them")
            files[stem] = path
    if not files:
        found = f"it holds {kinds[0][0]}" if kinds else "it is empty"
        raise DataError(f"no {' or '.join(suffixes)} file in {folder} itself: {found}"
                        + "; masks must be PNG, as JPEG changes their values" * (suffixes == MASKS))
    return files


def pair_up(names, images, masks, listing, own=False):
    """Names -> [Pair], each name once. `listing` is where they stand, for the errors.

    A name is only ever looked up, so it cannot lead out of the folders."""
    if not names:
        raise DataError(f"{listing} is empty: expected at least one name")
    names = list(dict.fromkeys(name if name in images else without_suffix(name) for name in names))
    for kind, files in (("image", images), ("mask", masks)):
        if missing := [name for name in names if name not in files]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{listing} names {short(missing[0])}{more}, but {next(iter(files.values())).parent} holds "
                            f"no such {kind}: {advice(missing[0], files, images.keys() & masks.keys())}")
    return [Pair(name, images[name], masks[name], own) for name in names]


def without_suffix(name):
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGES else name


def advice(name, files, whole):
    """What to do about a name without a file: is it there in a subfolder, or called NAME_mask.png, NAME.heic?"""
    base, some = without_suffix(re.split(r"[/\\]", name)[-1]), next(iter(files.values()))
    if base in files:
        return f"write it as {short(base)}, without folder"
    like = re.compile(rf"{re.escape(base)}(?![^\W_])", re.IGNORECASE)  # a letter or digit more is another name
    for path in some.parent.rglob("*") if base else ():
        if like.match(unicodedata.normalize("NFC", path.name)) and path.is_file():
            return f"found {path.relative_to(some.parent)}, expected {base}{some.suffix}"
    return f"expected names like {min(whole)!r}, each with an image and a mask" if whole else \
        f"{some.name} is there, but image and mask must have one name"


# ---------------------------------------------------------------- images


@contextlib.contextmanager
def opened(path, kind, formats, expected):
    """Every picture is opened here; what goes wrong in the block becomes a DataError that names it."""
    try:
        if not os.path.isfile(path):  # a pipe would be waited for
            raise FileNotFoundError("there is no such file")
        with Image.open(path, formats=formats) as image:
            yield image
    except Exception as error:  # Pillow raises all sorts on damaged files
        found = what_it_is(path) if isinstance(error, Image.UnidentifiedImageError) else error
        if isinstance(error, Image.DecompressionBombError):
            expected = f"at most {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels"
        raise DataError(f"cannot read the {kind} {path} ({found}): expected {expected}; replace it or leave it "
                        "out") from None


def what_it_is(path):
    """A file's true kind, whatever its name says."""
    with contextlib.suppress(Exception), Image.open(path, formats=FORMATS) as image:
        return f"it is {image.format}"
    with open(path, "rb") as file:
        start = file.read(16)
    return "it is HEIC or AVIF" if start[4:8] == b"ftyp" else f"it starts with {start!r}" if start else "it is empty"


def read_image(path, upright=False, own=False):
    """File -> uint8 RGB (3, H, W). `upright`: rotated as EXIF says; masks are not rotated.

    own: a picture that EXIF turns is refused, as its mask may be turned or not."""
    with opened(path, "image", FORMATS, f"an intact file in one of the formats {', '.join(FORMATS)}") as image:
        deep = image.mode[0] not in "IF" and ";16" in str(image.tile)  # of which Pillow takes the upper 8 bits
        shown = TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image) if upright else image))
        turned = own and image.getexif().get(ORIENTATION, 1) not in (0, 1)
    if turned:
        raise DataError(f"the image {path} is turned by its EXIF note, and masks are not: save it turned and without "
                        "the note (Pillow's ImageOps.exif_transpose)")
    if deep and shown.max() < 16:
        raise DataError(f"the image {path} is black, as its 16 bits hold only values below 4,096: scale them to 8 bits")
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


# ---------------------------------------------------------------- masks


def read_values(path):
    """Mask file -> raw values as they are stored, uint8 array (H, W): a palette's indexes, not its colours."""
    with opened(path, "mask", ("PNG",), "a whole PNG file") as image:
        verify(path.read_bytes())
        spread = {"L;2": 85, "L;4": 17}.get(image.tile[0][3])  # Pillow spreads grey of 2 and 4 bits over 0 to 255
        mode, values = image.mode, np.array(image) // spread if spread else np.array(image)
    if mode == "1":
        raise DataError(f"the mask {path} has 1 bit a pixel, so that 1 and 255 look the same: save it with 8 bits")
    if values.ndim == 3:  # RGB, RGBA, LA
        equal = mode == "LA" or (values[..., :3] == values[..., :1]).all()
        raise DataError(f"the mask {path} is {mode}, expected one channel with the class's index: " + (
            "its channels are equal, so Pillow's image.getchannel(0).save(…) makes it right" if equal else
            "write each colour's class index in its place, as an 8-bit grey PNG"))
    if values.max(initial=0) > 255:
        raise DataError(f"the mask {path} has 16 bits and holds the value {values.max()}: expected class indexes "
                        f"below {INVALID}, and 255 where no class is")
    return values.astype(np.uint8, copy=False)  # 16-bit files with small values are as good as 8-bit ones


def verify(data):
    """Raises ValueError if a PNG's bytes do not match its own checksums, which Pillow does not compare."""
    at = 8
    while data[at + 4:at + 8] != b"IEND":
        end = at + 8 + int.from_bytes(data[at:at + 4])
        if zlib.crc32(data[at + 4:end]).to_bytes(4) != data[end:end + 4]:
            raise ValueError("it is damaged: a checksum differs")
        at = end + 4


def read_raw(pair):
    """Pair -> uint8 image (3, H, W) and its mask's raw values (H, W), of one size."""
    image, raw = read_image(pair.image, own=pair.own), read_values(pair.mask)
    if image.shape[1:] != raw.shape:
        (H, W), (h, w) = image.shape[1:], raw.shape
        mend = "save the image turned as its EXIF note says" if (H, W) == (w, h) else \
            "scale the mask to the image, by nearest neighbours"
        raise DataError(f"the image {pair.image} is {H}×{W} pixels, its mask {pair.mask} is {h}×{w}, expected one "
                        f"size: {mend}")
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
