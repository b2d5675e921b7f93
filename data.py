"""Data: the folder layout of one's own data, the field's benchmarks, splits, transforms and palettes.

    python data.py --dataset voc --download             # fetches VOC 2012, and says what is still missing
    python data.py --dataset voc --data-root data/voc   # the data check: counts, a picture, what is wrong

Own data:
    root/images/NAME.jpg|png    root/masks/NAME.png (index into classes.txt, 255 = void)
    root/train.txt  root/val.txt (a NAME a line)    root/classes.txt  root/unseen.txt (class names a line)
The benchmarks are read where their authors' archives unpack (TREES below): nothing is converted, nothing written.

Masks pass through one look-up table: raw value -> class index, and in the training view raw value -> index among the
SEEN classes, everything else 255. An unseen label cannot reach the training loss.
Images leave as uint8 (3, H, W), labels as uint8 (H, W).
"""
import argparse
import json
import math
import sys
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageDraw
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

from toy import world

HERE = Path(__file__).parent
IGNORE, INVALID = 255, 254  # INVALID marks mask values that the class list does not know
PAD_COLOUR = [124, 116, 104]  # ImageNet's mean, where a crop is larger than the image
CHECKED = 100  # images of each part that the data check decodes
NO_THING = ("background", "void", "other", "unlabelled", "unlabeled", "ignore")
MAX_ONE_CLASS = 0.75  # FIELD: crops with more of one class are drawn again, ten times at most
PROTOCOL = json.loads((HERE / "protocol.json").read_text())  # FIELD: classes, unseen indexes, mask values, prompts
CONTEXT_SPLITS = {"zs3": "unseen_zs3_lineage", "cascade-clip": "unseen_cascade_clip"}  # two are in print
TREES = {  # a folder that the archives may make inside the root, then what is read
    "voc": ("VOCdevkit/VOC2012", {
        "JPEGImages": "17,125 .jpg of VOC 2012",
        "SegmentationClass": "2,913 .png of VOC 2012, palette as it comes: the test masks",
        "SegmentationClassAug": "12,031 .png of VOC and SBD together: all that val.txt does not name are for training",
        "ImageSets/Segmentation/val.txt": "1,449 names"}),
    "coco-stuff": ("images", {
        "train2017": "118,287 .jpg", "val2017": "5,000 .jpg",
        "stuffthingmaps/train2017": "118,287 .png of stuffthingmaps_trainval2017.zip, as they come",
        "stuffthingmaps/val2017": "5,000 .png of the same"}),
    "context": ("VOCdevkit/VOC2010", {
        "JPEGImages": ".jpg of VOC 2010",
        "SegmentationClassContext": ".png as mmsegmentation's pascal_context.py writes them: 0 rest, 1 to 59 classes",
        "ImageSets/SegmentationContext/train.txt": "4,998 names, by the same script",
        "ImageSets/SegmentationContext/val.txt": "5,105 names, by the same script"})}
COUNTS = {"voc": (10582, 1449), "coco-stuff": (118287, 5000), "context": (4998, 5105)}  # training, test


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
    void: tuple = (255,)  # raw mask values without a class: no loss, not scored
    expected: tuple = ()  # numbers of training and test images, where they are known

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


def open_dataset(name, root=None, split=None):
    """toy, voc, coco-stuff, context, or the path of a folder in the layout above -> DataSource. Raises DataError.

    root    by default data/NAME
    split   context only: zs3 (default; ZS3Net's ten unseen classes) or cascade-clip (Cascade-CLIP's)"""
    if split and name != "context":
        raise DataError(f"--split {split} is for --dataset context; {name} has one split")
    if name == "toy":
        root = Path(root or "data/toy")
        if not root.exists():
            print(f"drawing the toy world into {root} …", flush=True)
            root.parent.mkdir(parents=True, exist_ok=True)
            world.write(root)
        return open_folder(root, "toy", world.TEMPLATES, TOY)
    if name in TREES:
        return open_benchmark(name, Path(root or f"data/{name}"), split or "zs3")
    return open_folder(Path(root or name), str(name), tuple(PROTOCOL["coco-stuff"]["templates"]), FOLDER)


def open_benchmark(name, root, split="zs3"):
    inside, tree = TREES[name]
    top = root if name == "coco-stuff" or not (root / inside).is_dir() else root / inside
    where = {part: top / inside / part if name == "coco-stuff" and not (top / part).exists() else top / part
             for part in tree}
    if missing := [part for part in tree if not where[part].exists()]:
        lines = "\n".join(f"    {part:<{max(map(len, tree))}}  {what}" for part, what in tree.items())
        also = "; the images may lie one folder down, in images/" if name == "coco-stuff" else f" or {root / inside}"
        hint = ": python data.py --dataset voc --download gets all but SegmentationClassAug" if name == "voc" else ""
        raise DataError(f"no {missing[0]} in {top}: expected this tree in {root}{also}{hint}\n{lines}")

    protocol, jpg, png = PROTOCOL[name], (".jpg",), (".png",)
    classes, unseen, void = protocol["classes"], protocol.get("unseen"), (0, 255)
    if (root / "classes.txt").exists():  # a user's own list beside the data: then the masks may follow it
        for k, (theirs, ours) in enumerate(zip_longest(read_lines(root / "classes.txt"), classes)):
            if not theirs or not ours or plain(theirs) != plain(ours):
                raise DataError(f"line {k + 1} of {root}/classes.txt is {theirs!r}, class {k + 1} of {name} is "
                                f"{ours!r}: take the file away if the masks are the official ones, else open it as "
                                "own data")
    values = {k + 1: k for k in range(len(classes))}
    if name == "voc":
        images, val = list_files(where["JPEGImages"], jpg), read_lines(where["ImageSets/Segmentation/val.txt"])
        masks = list_files(where["SegmentationClassAug"], png)
        splits = [pair_up(sorted(masks.keys() - set(val)), images, masks, where["SegmentationClassAug"]),
                  pair_up(val, images, list_files(where["SegmentationClass"], png),
                          where["ImageSets/Segmentation/val.txt"])]
    elif name == "coco-stuff":
        values, void, splits = {value: k for k, value in enumerate(protocol["raw_ids"])}, (255,), []
        for part in ("train2017", "val2017"):
            images = list_files(where[part], jpg)
            splits.append(pair_up(list(images), images, list_files(where[f"stuffthingmaps/{part}"], png), where[part]))
    else:
        if split not in CONTEXT_SPLITS:
            raise DataError(f"no split {split!r} of context: choose {' or '.join(CONTEXT_SPLITS)}")
        unseen, name = protocol[CONTEXT_SPLITS[split]], f"context {split}"
        images, masks = list_files(where["JPEGImages"], jpg), list_files(where["SegmentationClassContext"], png)
        lists = [where[f"ImageSets/SegmentationContext/{part}.txt"] for part in ("train", "val")]
        splits = [pair_up(read_lines(path), images, masks, path) for path in lists]
    return DataSource(name, classes, set(unseen), values, *splits, tuple(protocol["templates"]),
                      Recipe(steps=protocol["iterations"]), void, COUNTS[name.split()[0]])


def download_voc(root):
    """Gets and unpacks VOC 2012 into root/VOCdevkit/VOC2012 (2 GB)."""
    try:
        torchvision.datasets.VOCSegmentation(root, "2012", "val", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(f"VOC 2012 did not arrive ({error}): try again, or unpack VOCtrainval_11-May-2012.tar into "
                        f"{root}") from None
    target = root / TREES["voc"][0] / "SegmentationClassAug"
    if not target.is_dir():
        raise DataError(f"VOC 2012 is in {target.parent}, but the augmented masks have no official download: unpack "
                        "SegmentationClassAug.zip (12,031 .png; the README of github.com/DrSleep/tensorflow-deeplab-"
                        f"resnet links it) as {target}")


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


def plain(name):
    return "".join(filter(str.isalnum, name.lower()))


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
        raise DataError(f"{source} is empty: expected at least one image")
    for kind, files in (("image", images), ("mask", masks)):
        if missing := [name for name in names if name not in files]:
            more = f" (and for {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{source} names {missing[0]!r}, but no {kind} of that name exists{more}")
    return [(name, images[name], masks[name]) for name in names]


# ---------------------------------------------------------------- reading and transforms


def read_image(path):
    """File -> uint8 RGB (3, H, W)."""
    try:
        with Image.open(path) as image:
            return tv_tensors.Image(TF.pil_to_tensor(image.convert("RGB")))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the image {path} ({error}): replace it or take it off the list") from None


def read_values(path):
    """Mask file -> raw values, uint8 array (H, W). Pillow keeps palette indexes as they are."""
    try:
        with Image.open(path) as image:
            if image.mode not in ("P", "L"):
                raise DataError(f"the mask {path} is {image.mode}: expected one channel of class indexes (P or L); "
                                "save it again without the colours")
            return np.array(image)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read the mask {path} ({error}): replace it or take it off the list") from None


def read_mask(path, table, classes):
    """File and look-up table -> uint8 labels (H, W)."""
    raw = read_values(path)
    labels = table.numpy()[raw]
    if (labels == INVALID).any():
        known = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs((table != INVALID).nonzero()[:, 0]))
        raise DataError(f"the mask {path} holds the value {raw[labels == INVALID][0]}, which none of the {classes} "
                        f"classes has: expected {known}")
    return tv_tensors.Mask(torch.from_numpy(labels))


def runs(numbers):
    """Ascending integers -> [(first, last)] of each stretch without a gap."""
    found = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = int(number)
        else:
            found.append([int(number), int(number)])
    return found


def without_unseen(source, workers=0):
    """Strict inductive: the training files whose masks hold no unseen pixel. Every mask is read once, none kept."""
    hidden = {value for value, k in source.values.items() if k in source.unseen}
    loader = DataLoader(source.train, 64, collate_fn=partial(_without, hidden), num_workers=workers)
    kept = [file for files in loader for file in files]
    if not kept:
        raise DataError(f"all {len(source.train)} training images of {source.name} hold an unseen class: "
                        "--strict leaves nothing")
    return kept


def _without(values, files):
    return [file for file in files if values.isdisjoint(present(read_values(file[2])))]


def present(raw):
    """Raw values (H, W) -> those that occur, ascending."""
    return np.flatnonzero(np.bincount(raw.ravel(), minlength=256)).tolist()


class TrainTransform:
    """Random scale, crop, flip and photometric distortion of image and labels together, padded with IGNORE.

    The crop is cut before it is resized: the same picture as resizing first, for a fraction of the work."""

    def __init__(self, recipe):
        self.crop, self.scale, self.jitter = recipe.crop, recipe.scale, recipe.jitter

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
        if self.jitter:
            image = distort(image)
        pad = [0, 0, self.crop - size[1], self.crop - size[0]]  # right and below
        return TF.pad(image, pad, fill=PAD_COLOUR), TF.pad(labels, pad, fill=IGNORE)


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
    return tv_tensors.Image(flat.clamp_(0, 255).to(torch.uint8).view(image.shape))


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


# ---------------------------------------------------------------- the data check


def check(source, picture=None):
    """Looks, in seconds, for what training would only show as bad figures -> lines of remarks. Raises DataError.

    Listings were checked whole when the set was opened; here CHECKED images of each part, evenly spread, go through
    TrainSet and ValSet. `picture`: a training sample and a test sample, image | labels, with their classes.
    One's own classes.txt is the order itself: only the picture can show that the masks follow another."""
    remarks, parts = [], {"training": source.train, "test": source.val}
    for (part, files), expected in zip(parts.items(), source.expected):
        if len(files) != expected:
            remarks.append(f"warning: {len(files)} {part} images, the benchmark has {expected}: figures do not compare")
    if named := [name for name in source.classes if name.lower() in NO_THING]:
        remarks.append(f"warning: {named[0]!r} is a class, but no thing that CLIP could know: the field makes it 255")

    view, whole, most = TrainSet(source, source.recipe), ValSet(source), -1
    for part, files in parts.items():
        chosen = range(0, len(files), -(-len(files) // CHECKED))
        masks = [np.bincount(read_values(files[i][2]).ravel(), minlength=256) for i in chosen]  # pixels of each value
        check_values(source, part, masks)
        for i, pixels in zip(chosen, masks):
            if part == "test":
                test = whole[i][:2]
                continue
            image, labels = view[i, i]
            held = {source.classes[k] for value, k in source.values.items() if pixels[value] and k not in source.unseen}
            given = {source.classes[source.seen[k]] for k in labels.unique().tolist() if k != IGNORE}
            if given - held:
                raise DataError(f"{files[i][2]}: the training view shows {min(given - held)!r}, which is unseen or not "
                                "in this mask: a fault of the program, please report it")
            if len(given) > most:
                most, sample = len(given), (image, labels)
        kind, wanted = ("seen", source.seen) if part == "training" else ("unseen", sorted(source.unseen))
        found = {k for value, k in source.values.items() if sum(masks)[value]}
        if absent := [source.classes[k] for k in wanted if k not in found]:
            names = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
            remarks.append(f"warning: {len(absent)} of {len(wanted)} {kind} classes are in none of the {len(masks)} "
                           f"{part} masks looked at (of {len(files)}): {names}")
    if picture:
        seen = torch.full((256,), IGNORE)
        seen[:len(source.seen)] = torch.tensor(source.seen)
        rows = [(sample[0], seen[sample[1].long()]), test]
        shown = {k for _, labels in rows for k in labels.unique().tolist()}
        draw([[image, coloured(labels)] for image, labels in rows], ("image", "labels (white: no class)"), shown,
             source).save(picture)
    return remarks


def check_values(source, part, masks):
    """Pixels of each raw value, mask by mask: are the masks shifted, converted, or of another class list?"""
    pixels, K = sum(masks), len(source.classes)
    unknown = [v for v in np.flatnonzero(pixels).tolist() if v not in source.values and v not in source.void]
    first, last, these = source.classes[0], source.classes[-1], f"the {part} masks of {source.name}"
    if 0 in source.void:  # VOC, Context
        right = f"expected 0 background, 1 {first} … {K} {last}: use the files as they come"
        if len(masks) >= 10 and not pixels[0]:
            raise DataError(f"{these} never hold 0, they look raised by one: {right}")
        if pixels[255] > pixels[0]:
            raise DataError(f"{these} hold more 255 (void) than 0 (background), they look lowered by one: {right}")
    elif source.expected and unknown:
        raise DataError(f"{these} hold {unknown[0]}, an id that stuffthingmaps never use, they look converted or "
                        "shifted: use the files of stuffthingmaps_trainval2017.zip as they come")
    elif K in unknown:
        mend = "if 0 is background, make it 255 and lower the others by one" if pixels[0] else "lower all by one"
        raise DataError(f"{these} hold {K}, but the {K} lines of classes.txt are 0 {first} … {K - 1} {last}: {mend}")


# ---------------------------------------------------------------- pictures


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


def coloured(labels):
    """Class indexes (H, W) -> uint8 picture (3, H, W); class k has colour k + 1, as black is hard to see."""
    return torch.tensor(palette()[1:] + [(255, 255, 255)], dtype=torch.uint8)[labels.long()].permute(2, 0, 1)


def draw(rows, titles, shown, source, side=192):
    """Rows of uint8 pictures (3, H, W), one column a title -> a sheet with the `shown` classes' colours below.

    Unseen classes have a *."""
    strips = []
    for row in rows:
        height = round(side * row[0].shape[1] / row[0].shape[2])
        strips.append(torch.cat([TF.resize(tile, [height, side], TF.InterpolationMode.NEAREST) for tile in row], dim=2))
    canvas = TF.to_pil_image(torch.cat(strips, dim=1))
    shown = sorted(k for k in shown if k < len(source.classes))
    columns, line = len(titles), 16
    sheet = Image.new("RGB", (canvas.width, 20 + canvas.height + line * -(-len(shown) // columns) + 8), "white")
    pen = ImageDraw.Draw(sheet)
    for i, title in enumerate(titles):
        pen.text((i * side + 4, 4), title, fill="black")
    sheet.paste(canvas, (0, 20))
    for i, k in enumerate(shown):
        x, y = i % columns * side + 4, 20 + canvas.height + 6 + i // columns * line
        pen.rectangle((x, y, x + 10, y + 10), fill=palette()[k + 1])
        pen.text((x + 16, y - 1), source.classes[k][:24] + (" *" if k in source.unseen else ""), fill="black")
    return sheet


def save_mask(mask, path):
    """uint8 (H, W) array of class indexes -> palette PNG in the colours of `coloured`."""
    image = Image.fromarray(mask, "L")
    image.putpalette([channel for colour in palette()[1:] + [(255, 255, 255)] for channel in colour])
    image.save(path)


# ---------------------------------------------------------------- command


def main(args):
    if args.download:
        if args.dataset != "voc":
            raise DataError(f"--download is for --dataset voc; --dataset {args.dataset} shows the tree to unpack")
        download_voc(Path(args.data_root or "data/voc"))
    source = open_dataset(args.dataset, args.data_root, args.split)
    print(f"{source.name}: {len(source.train)} training images, {len(source.val)} test images, "
          f"{len(source.seen)} seen classes, {len(source.unseen)} unseen", flush=True)
    for remark in check(source, args.picture):
        print(remark)
    print(f"no error in up to {CHECKED} training and {CHECKED} test images; look at {args.picture}: do the labels fit?")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", required=True, help="toy, voc, coco-stuff, context or a folder")
    parser.add_argument("--data-root", help="where it lies (default: data/NAME)")
    parser.add_argument("--split", choices=CONTEXT_SPLITS, help="of context (default: zs3)")
    parser.add_argument("--picture", default="data_check.png", help="where the sample is drawn (default: %(default)s)")
    parser.add_argument("--download", action="store_true", help="voc: fetch VOC 2012 into the root first")
    return parser.parse_args(argv)


if __name__ == "__main__":
    try:
        main(parse())
    except DataError as error:
        sys.exit(f"error: {error}")
