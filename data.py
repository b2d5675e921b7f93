"""Data: the folder layout of one's own data, the field's benchmarks, splits, transforms and palettes.

    root/images/NAME.jpg|png    root/masks/NAME.png (index into classes.txt, 255 = void)
    root/train.txt  root/val.txt (a NAME a line)    root/classes.txt  root/unseen.txt (class names a line)

Masks pass through one look-up table: raw value -> class index, and in the training view raw value -> index among the
SEEN classes, everything else 255. An unseen label cannot reach the training loss.
Images leave as uint8 (3, H, W), labels as uint8 (H, W).
"""
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from toy import world

HERE = Path(__file__).parent
IGNORE, INVALID = 255, 254  # INVALID marks mask values that the class list does not know
PAD_COLOUR = [124, 116, 104]  # ImageNet's mean, where a crop is larger than the image
MAX_ONE_CLASS = 0.75  # FIELD: crops with more of one class are drawn again, ten times at most
TEMPLATES_15 = tuple(json.loads((HERE / "protocol.json").read_text())["coco-stuff"]["templates"])


class DataError(ValueError):
    """Data that cannot be used; the message names the file and says what to do."""


@dataclass(frozen=True)
class Recipe:
    """A data set's training defaults; train.py's flags override them. METHOD: FIELD for the benchmarks."""
    steps: int
    batch_size: int = 16  # images a step, over all processes
    lr: float = 2e-4
    warmup: int = 1500  # steps
    crop: int = 512  # pixels a side
    scale: tuple = (0.5, 2.0)  # of the image whose short side is `crop`
    jitter: bool = True  # photometric distortion
    body: str = "resnet50"
    clip: str = "ViT-B/16"
    short_side: int | None = 512  # test images are resized to it; None keeps their size
    window: int = 512  # test windows, pixels a side
    stride: int = 426


TOY = Recipe(steps=600, batch_size=32, lr=3e-3, warmup=50, crop=world.SIZE, scale=(0.75, 1.5), jitter=False,
             body="small", clip=str(HERE / "toy" / "clip.pt"), short_side=None, window=world.SIZE, stride=world.SIZE)
FOLDER = Recipe(steps=20000, short_side=None)


@dataclass
class DataSource:
    """One data set: where its files are and what its mask values mean."""
    name: str
    classes: list  # K names; synonyms separated by commas
    unseen: set  # indexes into classes
    values: dict  # raw mask value -> class index; what is not in it must be in `void`
    train: list = field(repr=False)  # (name, image path, mask path)
    val: list = field(repr=False)
    templates: tuple
    recipe: Recipe
    void: tuple = (255,)

    @property
    def seen(self):
        return [k for k in range(len(self.classes)) if k not in self.unseen]

    def table(self, training):
        """uint8 (256,): raw mask value -> label. Training: index among the seen classes; unseen become IGNORE."""
        table = torch.full((256,), INVALID, dtype=torch.uint8)
        table[list(self.void)] = IGNORE
        for value, k in self.values.items():
            label = k if not training else IGNORE if k in self.unseen else self.seen.index(k)
            table[value] = label
        return table


# ---------------------------------------------------------------- data sets


def open_dataset(name, root=None):
    """toy, or the path of a folder in the layout above -> DataSource. Raises DataError."""
    if name == "toy":
        root = Path(root or "data/toy")
        if not root.exists():
            print(f"drawing the toy world into {root} …", flush=True)
            root.parent.mkdir(parents=True, exist_ok=True)
            world.write(root)
        return open_folder(root, "toy", world.TEMPLATES, TOY)
    return open_folder(Path(root or name), str(name), TEMPLATES_15, FOLDER)


def open_folder(root, name, templates, recipe):
    if not root.is_dir():
        raise DataError(f"no folder {root}: give toy, or a folder that holds images/, masks/, train.txt, val.txt and "
                        "classes.txt")
    classes = read_lines(root / "classes.txt")
    if len(classes) > INVALID or len(set(classes)) < len(classes):
        raise DataError(f"{root}/classes.txt has {len(classes)} lines, {len(set(classes))} different ones: "
                        f"expected at most {INVALID}, each once")
    unseen = read_lines(root / "unseen.txt") if (root / "unseen.txt").exists() else []
    if unknown := [c for c in unseen if c not in classes]:
        raise DataError(f"{root}/unseen.txt names {unknown[0]!r}, which is not a line of classes.txt")
    if len(set(unseen)) == len(classes):
        raise DataError(f"{root}/unseen.txt names every class: nothing is left to train on")
    images, masks = list_files(root / "images", (".jpg", ".jpeg", ".png")), list_files(root / "masks", (".png",))
    splits = [pair_up(read_lines(root / f"{split}.txt"), images, masks, root / f"{split}.txt")
              for split in ("train", "val")]
    return DataSource(name, classes, {classes.index(c) for c in unseen}, {k: k for k in range(len(classes))},
                      *splits, templates, recipe)


def read_lines(path):
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}): expected text, a name a line") from None
    return [line for line in lines if line]


def list_files(folder, suffixes):
    """Folder -> {file name without suffix: path}, one listing of the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    return {path.stem: path for path in sorted(folder.iterdir()) if path.suffix.lower() in suffixes}


def pair_up(names, images, masks, source):
    """Names -> [(name, image, mask)]; a name is only ever looked up, so it cannot lead out of the folders."""
    if not names:
        raise DataError(f"{source} is empty: expected a name a line")
    for name in names:
        if name not in images or name not in masks:
            kind = "image" if name not in images else "mask"
            raise DataError(f"{source} names {name!r}, but no {kind} of that name exists")
    return [(name, images[name], masks[name]) for name in names]


# ---------------------------------------------------------------- reading and transforms


def read_image(path):
    """File -> uint8 RGB (3, H, W)."""
    try:
        with Image.open(path) as image:
            return tv_tensors.Image(TF.pil_to_tensor(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): replace it or take it off the list") from None


def read_mask(path, table, classes):
    """File and look-up table -> uint8 labels (H, W). Pillow keeps palette indexes as they are."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise DataError(f"the mask {path} is {image.mode}: expected one channel of class indexes (P or L)")
            raw = TF.pil_to_tensor(image)[0]
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the mask {path} ({error}): replace it or take it off the list") from None
    labels = table[raw.long()]
    if (labels == INVALID).any():
        raise DataError(f"the mask {path} holds the value {int(raw[labels == INVALID][0])}, "
                        f"which none of the {classes} classes has")
    return tv_tensors.Mask(labels)


class TrainTransform:
    """Random scale, crop, flip and photometric distortion of image and labels together, padded with IGNORE.

    The crop is cut before it is resized: the same picture as resizing first, for a fraction of the work."""

    def __init__(self, recipe):
        self.crop, self.scale = recipe.crop, recipe.scale
        # not v2.RandomPhotometricDistort: it also permutes the colour channels, which turns "red" into "blue"
        self.jitter = v2.RandomApply([v2.ColorJitter(0.125, 0.5, 0.5, 0.05)], 0.5 if recipe.jitter else 0.0)

    def __call__(self, image, labels):
        H, W = labels.shape
        factor = self.crop / min(H, W) * torch.empty(()).uniform_(*self.scale).item()  # pixels out per pixel in
        side = self.crop / factor  # of the window, in the source's pixels
        h, w = min(math.ceil(side), H), min(math.ceil(side), W)
        for _ in range(10):
            top, left = int(torch.randint(H - h + 1, ())), int(torch.randint(W - w + 1, ()))
            part = labels[top:top + h, left:left + w]
            count = torch.bincount(part[::2, ::2].flatten().long(), minlength=256)[:INVALID]
            if count.max() <= MAX_ONE_CLASS * count.sum():
                break
        size = [min(round(h * factor), self.crop), min(round(w * factor), self.crop)]
        image = TF.resized_crop(image, top, left, h, w, size, antialias=True)
        labels = TF.resized_crop(labels, top, left, h, w, size)  # nearest, since it is a Mask
        if torch.rand(()) < 0.5:
            image, labels = TF.horizontal_flip(image), TF.horizontal_flip(labels)
        image = self.jitter(image)
        pad = [0, 0, self.crop - size[1], self.crop - size[0]]  # right and below
        return TF.pad(image, pad, fill=PAD_COLOUR), TF.pad(labels, pad, fill=IGNORE)


class TrainSet(Dataset):
    """Seen-only view. Item (position, i): image i, its random crop drawn from (seed, position) alone.

    So a batch depends on neither the workers, nor the number of processes, nor an interruption."""

    def __init__(self, source, recipe, seed=0):
        self.files, self.table, self.classes = source.train, source.table(training=True), len(source.classes)
        self.transform, self.seed = TrainTransform(recipe), seed

    def __getitem__(self, item):
        position, i = item
        name, image, mask = self.files[i]
        image, labels = read_image(image), read_mask(mask, self.table, self.classes)
        if image.shape[1:] != labels.shape:
            raise DataError(f"{name}: image {tuple(image.shape[1:])} and mask {tuple(labels.shape)} differ in size")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed * 1_000_003 + position)
            image, labels = self.transform(image, labels)
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor)


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
        name, image, mask = self.files[i]
        image, labels = read_image(image), read_mask(mask, self.table, self.classes)
        if image.shape[1:] != labels.shape:
            raise DataError(f"{name}: image {tuple(image.shape[1:])} and mask {tuple(labels.shape)} differ in size")
        return image.as_subclass(torch.Tensor), labels.as_subclass(torch.Tensor), name


# ---------------------------------------------------------------- palettes


def palette():
    """VOC's colour map, 256 RGB triples: the bits of the index spread over the colours' high bits."""
    colours = []
    for i in range(256):
        rgb = [0, 0, 0]
        for bit in range(8):
            for channel in range(3):
                rgb[channel] |= (i >> channel & 1) << (7 - bit)
            i >>= 3
        colours.append(tuple(rgb))
    return colours


def save_mask(mask, path):
    """uint8 (H, W) array of class indexes -> palette PNG; class k has colour k + 1, as black is hard to see."""
    image = Image.fromarray(mask, "L")
    image.putpalette([channel for colour in palette()[1:] + [(255, 255, 255)] for channel in colour])
    image.save(path)
