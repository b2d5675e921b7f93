"""What training and test see of a data set: reading, transforms, loaders.

Images leave as uint8 (3, H, W), labels as uint8 (H, W). Which files and classes there are is in sources.py; as a
command this file is the data check (datacheck.py).
"""
import math
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as TF

from sources import IGNORE, INVALID, DataError

PAD_COLOUR = [124, 116, 104]  # ImageNet's mean, where a crop is larger than the image
PADDING = INVALID  # label of such pixels, which no mask has, until `split_padding`
MAX_ONE_CLASS = 0.75  # FIELD: crops with more of one class, or with none, are drawn again, ten times at most
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # for some others Pillow would start programs


# ---------------------------------------------------------------- reading and transforms


def read_image(path, upright=False):
    """File -> uint8 RGB (3, H, W). `upright`: turned as the camera noted in EXIF, which masks do not follow."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image) if upright else image))
    except FileNotFoundError:
        raise DataError(f"no image {path}") from None
    except Exception as error:  # Pillow raises all sorts on damaged files
        raise DataError(f"cannot read the image {path} ({error}): replace it or take it off the list") from None


def rgb(image):
    """Any Pillow image -> RGB: 16 bits are scaled, where Pillow would cut at 255; what is transparent becomes white."""
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image, np.float32)
        image = Image.fromarray((values / (257 if values.max() > 255 else 1)).clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_values(path):
    """Mask file -> raw values, uint8 array (H, W). Pillow keeps palette indexes as they are."""
    try:
        with Image.open(path, formats=("PNG",)) as image:
            if image.mode not in ("P", "L"):
                raise DataError(f"the mask {path} is {image.mode}: expected one channel of class indexes (P or L); "
                                "save it again without the colours")
            return np.array(image)
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"cannot read the mask {path} ({error}): replace it or take it off the list") from None


def value_counts(path):
    """Mask file -> number of pixels of each raw value, int array (256,)."""
    return np.bincount(read_values(path).ravel(), minlength=256)


def read_mask(path, table, classes):
    """File and look-up table -> uint8 labels (H, W)."""
    raw = read_values(path)
    labels = table.numpy()[raw]
    if (labels == INVALID).any():
        known = np.flatnonzero(table.numpy() != INVALID)
        stretches = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
        expected = ", ".join(f"{s[0]} to {s[-1]}" if len(s) > 1 else str(s[0]) for s in stretches)
        raise DataError(f"the mask {path} holds the value {raw[labels == INVALID][0]}, which none of the {classes} "
                        f"classes has: expected {expected}")
    return torch.from_numpy(labels)


def read_pair(file, table, classes):
    """(name, image path, mask path) -> name, uint8 image (3, H, W), uint8 labels (H, W), of one size."""
    name, path, mask = file
    image, labels = read_image(path), read_mask(mask, table, classes)
    if image.shape[1:] != labels.shape:
        raise DataError(f"the image {path} is {tuple(image.shape[1:])} pixels, its mask {mask} is "
                        f"{tuple(labels.shape)}: expected one size")
    return name, image, labels


def without_unseen(source, workers=0):
    """Strict inductive: the training files whose masks hold no unseen pixel. Every mask is read once, none kept."""
    hidden = [value for value, k in source.values.items() if k in source.unseen]
    loader = DataLoader(source.train, 64, collate_fn=partial(_without, hidden), num_workers=workers)
    kept = [file for files in loader for file in files]
    if not kept:
        raise DataError(f"all {len(source.train)} training images of {source.name} hold an unseen class: "
                        "--strict leaves nothing")
    return kept


def _without(values, files):
    return [file for file in files if not value_counts(file[2])[values].any()]


def augment(image, labels, recipe):
    """Random scale, crop, flip and photometric distortion of image and labels together, padded with PADDING.

    The crop is cut before it is resized: the same picture as resizing first, for a fraction of the work."""
    H, W = labels.shape
    factor = recipe.crop / min(H, W) * torch.empty(()).uniform_(*recipe.scale).item()  # pixels out per pixel in
    side = math.ceil(recipe.crop / factor)  # of the window, in the source's pixels
    h, w = min(side, H), min(side, W)
    for _ in range(10):
        top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
        part = labels[top:top + h, left:left + w]
        count = torch.bincount(part[::2, ::2].flatten().long(), minlength=256)[:INVALID]
        if 0 < count.max() <= MAX_ONE_CLASS * count.sum():
            break
    size = [min(round(h * factor), recipe.crop), min(round(w * factor), recipe.crop)]
    image = TF.crop(image, top, left, h, w)
    if recipe.jitter:  # before the resize: mostly fewer pixels, never more than were decoded
        image = distort(image)
    image = TF.resize(image, size, antialias=True)
    # plain "nearest" reads half an output pixel to the upper left of where the image was read
    labels = TF.resized_crop(labels[None], top, left, h, w, size, InterpolationMode.NEAREST_EXACT)
    if torch.rand(()) < 0.5:
        image, labels = TF.horizontal_flip(image), TF.horizontal_flip(labels)
    pad = [0, 0, recipe.crop - size[1], recipe.crop - size[0]]  # right and below
    return TF.pad(image, pad, fill=PAD_COLOUR), TF.pad(labels, pad, fill=PADDING)[0]


def split_padding(labels, grid):
    """Labels (B, H, W) of crops, the size (h, w) of a grid -> labels with IGNORE in the padding, and bool (B, h·w): the
    positions that lie in the picture."""
    padding = labels == PADDING
    outside = F.interpolate(padding[:, None].float(), grid, mode="nearest-exact").flatten(1)
    return labels.masked_fill(padding, IGNORE), outside == 0


def distort(image):
    """Photometric distortion of uint8 (3, H, W): brightness, contrast, saturation and hue, each in half of the cases.

    FIELD: the four, their odds and ranges. OURS: one affine map of RGB instead of a way through HSV, a tenth of the
    time; saturation scales the distance from the grey axis, hue turns about it. Channels are never exchanged."""
    def draw(low, high, neutral):
        return torch.empty(()).uniform_(low, high).item() if torch.rand(()) < 0.5 else neutral

    brightness, contrast, saturation = draw(-32, 32, 0), draw(0.5, 1.5, 1), draw(0.5, 1.5, 1)
    hue = math.radians(draw(-36, 36, 0))
    grey = torch.full((3, 3), 1 / 3)  # projection on the grey axis
    turn = torch.tensor([[0., -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)  # a right angle about it
    colour = contrast * (grey + saturation * (math.cos(hue) * (torch.eye(3) - grey) + math.sin(hue) * turn))
    shift = torch.full((3, 1), contrast * brightness + 0.5)  # 0.5: the cast below rounds down
    flat = torch.addmm(shift, colour, image.reshape(3, -1).float())
    return flat.clamp_(0, 255).to(torch.uint8).view(image.shape)


class TrainSet(Dataset):
    """Seen-only view. Item (position, i): image i, its random crop drawn from (seed, position) alone.

    So a batch depends on neither the workers, nor the number of processes, nor an interruption."""

    def __init__(self, source, recipe, seed=0):
        self.files, self.table, self.classes = source.train, source.table(training=True), len(source.classes)
        self.recipe, self.seed = recipe, seed

    def __getitem__(self, item):
        position, i = item
        _, image, labels = read_pair(self.files[i], self.table, self.classes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + position)  # torch.manual_seed asks all devices
            return augment(image, labels, self.recipe)


class Steps(Sampler):
    """Endless shuffled epochs cut into batches: step s takes positions s·B … s·B + B − 1, each rank its part."""

    def __init__(self, images, batch_size, first, last, seed=0, rank=0, ranks=1):
        self.images, self.batch_size, self.first, self.last = images, batch_size, first, last
        self.seed, self.rank, self.ranks = seed, rank, ranks

    def __len__(self):
        return self.last - self.first

    def __iter__(self):
        local, shuffled_epoch = self.batch_size // self.ranks, None
        for step in range(self.first, self.last):
            start = step * self.batch_size + self.rank * local
            batch = []
            for position in range(start, start + local):
                epoch, i = divmod(position, self.images)
                if epoch != shuffled_epoch:
                    generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                    order, shuffled_epoch = torch.randperm(self.images, generator=generator).tolist(), epoch
                batch.append((position, order[i]))
            yield batch


class ValSet(Dataset):
    """Whole images with all classes: uint8 image (3, H, W), labels (H, W), name. `part` = (rank, ranks): no repeats."""

    def __init__(self, source, part=(0, 1)):
        rank, ranks = part
        self.files, self.classes = source.val[rank::ranks], len(source.classes)
        self.table = source.table(training=False)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        name, image, labels = read_pair(self.files[i], self.table, self.classes)
        return image, labels, name


if __name__ == "__main__":
    from sources import check as datacheck
    from support import command as guard
    guard.run_command(datacheck.main, datacheck.parse)
