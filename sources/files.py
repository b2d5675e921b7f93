"""Reads users' lists, folders, images and masks. Every error names the file and says what to do."""
import os

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from losses import IGNORE
from support import UserError

INVALID = 254  # marks mask values that the class list does not know
IMAGES, MASKS = (".jpg", ".jpeg", ".png"), (".png",)  # suffixes in a data set's folders
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # for some others Pillow would start programs


class DataError(UserError):
    """Data that cannot be used; the message names the file and says what to do."""


# ---------------------------------------------------------------- lists and folders


def read_lines(path):
    """Text file -> its lines without spaces around them and without empty ones; UTF-8, or UTF-16 with its mark."""
    if not path.is_file():  # a pipe would be waited for
        raise DataError(f"no file {path}: expected a text file with one name per line")
    data = path.read_bytes()
    try:
        text = data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")  # Windows' marks
    except UnicodeDecodeError:
        raise DataError(f"cannot read {path} as UTF-8 text: save it again with the encoding UTF-8") from None
    return [line.strip() for line in text.splitlines() if line.strip()]


def list_files(folder, suffixes):
    """Folder -> {file name without suffix: path}, sorted, from one listing of the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file())  # no pipes, no folders
    files = {}
    for path in (folder / name for name in names if not name.startswith(".")):  # ._NAME.jpg is macOS's
        if path.suffix.lower() in suffixes:
            if path.stem in files:
                raise DataError(f"{folder} holds {files[path.stem].name} and {path.name}: keep one of them")
            files[path.stem] = path
    if not files:
        found = f"it holds {names[0]}" if names else "it is empty"
        raise DataError(f"no {' or '.join(suffixes)} file in {folder}: {found}"
                        + "; masks must be PNG, as JPEG changes their values" * (suffixes == MASKS))
    return files


def pair_up(names, images, masks, listing):
    """Names -> [(name, image path, mask path)]. `listing` is where they stand, for the errors.

    A name is only ever looked up, so it cannot lead out of the folders."""
    if not names:
        raise DataError(f"{listing} is empty: expected at least one name")
    names = [name if name in images else without_suffix(name) for name in names]
    for kind, files in (("image", images), ("mask", masks)):
        if missing := [name for name in names if name not in files]:
            more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
            example = next(iter(files.values()))
            raise DataError(f"{listing} names {missing[0][:60]!r}{more}, but {example.parent} holds no such {kind}: "
                            f"write names like {example.stem!r}, without folder; each needs an image and a mask")
    return [(name, images[name], masks[name]) for name in names]


def without_suffix(name):
    stem, suffix = os.path.splitext(name)
    return stem if suffix.lower() in IMAGES else name


# ---------------------------------------------------------------- images


def read_image(path, upright=False):
    """File -> uint8 RGB (3, H, W). `upright`: rotated as EXIF says; masks are not rotated."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image) if upright else image))
    except FileNotFoundError:
        raise DataError(f"no image {path}") from None
    except Image.DecompressionBombError:
        raise DataError(f"the image {path} has over {2 * Image.MAX_IMAGE_PIXELS // 10**6} megapixels: make it "
                        "smaller, or cut it into pieces") from None
    except Exception as error:  # Pillow raises all sorts on damaged files
        raise DataError(f"cannot read the image {path} ({error}): expected an intact file in one of the formats "
                        f"{', '.join(FORMATS)}; replace it or leave it out") from None


def rgb(image):
    """Any Pillow image -> RGB: 16 bits are scaled, where Pillow would cut at 255; what is transparent becomes white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# ---------------------------------------------------------------- masks


def read_values(path):
    """Mask file -> raw values, uint8 array (H, W). Pillow keeps palette indexes as they are."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            mode, values = image.mode, np.array(image)
    except Exception as error:
        raise DataError(f"cannot read the mask {path} ({error}): expected a whole PNG file; replace it or leave it "
                        "out") from None
    if mode == "1":
        raise DataError(f"the mask {path} has 1 bit a pixel, so that 1 and 255 look the same: save it with 8 bits")
    if values.ndim == 3:  # RGB, RGBA, LA
        equal = mode == "LA" or (values[..., :3] == values[..., :1]).all()
        raise DataError(f"the mask {path} is {mode}, expected one channel with the class's index: " + (
            "its channels are equal, so Pillow's image.getchannel(0).save(…) makes it right" if equal else
            "write each colour's class index in its place, as an 8-bit grey PNG"))
    if values.max(initial=0) > 255 or values.min(initial=0) < 0:
        raise DataError(f"the mask {path} has 16 bits and holds the value {values.max()}: expected class indexes "
                        f"below {INVALID}, and 255 where no class is")
    return values.astype(np.uint8, copy=False)  # 16-bit files with small values are as good as 8-bit ones


def value_counts(path):
    """Mask file -> number of pixels of each raw value, int array (256,)."""
    return np.bincount(read_values(path).ravel(), minlength=256)


def read_mask(path, table, classes):
    """File and look-up table (DataSource.table) -> uint8 labels (H, W)."""
    raw = read_values(path)
    labels = table.numpy()[raw]
    if (labels == INVALID).any():
        *known, _ = np.flatnonzero(table.numpy() != INVALID)  # the last is 255
        raise DataError(f"the mask {path} holds the value {raw[labels == INVALID][0]}, which none of the {classes} "
                        f"classes has: expected {known[0]} to {known[-1]}, and {IGNORE} where no class is")
    return torch.from_numpy(labels)


def read_pair(file, table, classes):
    """(name, image path, mask path) -> name, uint8 image (3, H, W), uint8 labels (H, W), of one size."""
    name, path, mask = file
    image, labels = read_image(path), read_mask(mask, table, classes)
    if image.shape[1:] != labels.shape:
        (H, W), (h, w) = image.shape[1:], labels.shape
        mend = "save the image turned as its EXIF note says" if (H, W) == (w, h) else \
            "scale the mask to the image, by nearest neighbours"
        raise DataError(f"the image {path} is {H}×{W} pixels, its mask {mask} is {h}×{w}, expected one size: {mend}")
    return name, image, labels
