"""Where the data sets lie and what their mask values mean: the toy world, one's own folder, the field's benchmarks.

Own data:
    root/images/NAME.jpg|png    root/masks/NAME.png (index into classes.txt, 255 = void)
    root/train.txt  root/val.txt (a NAME a line)    root/classes.txt  root/unseen.txt (class names a line)
The benchmarks are read where their authors' archives unpack (TREES below): nothing is converted, nothing written.

Masks pass through one look-up table: raw value -> class index, and in the training view raw value -> index among the
SEEN classes, everything else 255. An unseen label cannot reach the training loss.
"""
import contextlib
import dataclasses
import json
import os
from itertools import zip_longest
from pathlib import Path

import torch
import torchvision

from toy import world

HERE = Path(__file__).parent
IGNORE, INVALID = 255, 254  # INVALID marks mask values that the class list does not know
PROTOCOL = json.loads((Path(__file__).parent / "protocol.json").read_text())  # FIELD: classes, unseen indexes, mask values, prompts
CONTEXT = {"context": "unseen_zs3_lineage", "context-cascade-clip": "unseen_cascade_clip"}  # two splits are in print
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
NAMES = ("toy", "voc", "coco-stuff", *CONTEXT)


class DataError(ValueError):
    """Data that cannot be used; the message names the file and says what to do."""


@dataclasses.dataclass(frozen=True)
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

    def at_crop(self, crop):
        """The recipe at another crop: test images, windows and strides keep their ratio to it."""
        scaled = {key: value and round(value * crop / self.crop)
                  for key in ("short_side", "window", "stride") for value in [getattr(self, key)]}
        return dataclasses.replace(self, crop=crop, **scaled)

    @property
    def sides(self):
        """Short sides, least and largest, at which test images are labelled: those that training shows."""
        return [self.short_side] * 2 if self.short_side else [round(self.crop * factor) for factor in self.scale]


TOY = Recipe(steps=1000, batch_size=32, lr=3e-3, warmup=50, crop=world.SIZE, scale=(0.75, 1.5), jitter=False,
             body="small", clip="toy/clip.pt", short_side=None, window=world.SIZE, stride=48)
FOLDER = Recipe(steps=20000, short_side=None)


@dataclasses.dataclass
class DataSource:
    """One data set: where its files are and what its mask values mean."""
    name: str
    classes: list  # K names; synonyms separated by commas
    unseen: set  # indexes into classes
    values: dict  # raw mask value -> class index; what is not in it must be in `void`
    train: list = dataclasses.field(repr=False)  # (name, image path, mask path)
    val: list = dataclasses.field(repr=False)
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


def open_dataset(name, root=None):
    """One of NAMES, or the path of a folder in the layout above -> DataSource. Raises DataError.

    root: by default data/NAME; toy's default alone is drawn where it is missing. context has ZS3Net's ten unseen
    classes, context-cascade-clip Cascade-CLIP's."""
    if name == "toy":
        root = Path(root or world.ROOT)
        if root == world.ROOT and not root.exists():
            print(f"drawing the toy world into {root} …", flush=True)
            with contextlib.suppress(FileExistsError):  # another process was first: its world is the same
                world.write(root)
        return open_folder(root, "toy", world.TEMPLATES, TOY)
    if name in NAMES:
        return open_benchmark(name, root)
    return open_folder(Path(root or name), str(name), tuple(PROTOCOL["coco-stuff"]["templates"]), FOLDER)


def open_benchmark(name, root=None):
    benchmark = "context" if name in CONTEXT else name
    root = Path(root or f"data/{benchmark}")
    inside, tree = TREES[benchmark]
    where = {part: root / part if (root / part).exists() else root / inside / part for part in tree}
    if missing := [part for part in tree if not where[part].exists()]:
        lines = "\n".join(f"    {part:<{max(map(len, tree))}}  {what}" for part, what in tree.items())
        hint = ": python data.py --dataset voc --download gets all but SegmentationClassAug" if name == "voc" else ""
        raise DataError(f"no {missing[0]} in {root}: expected this tree there or in {root / inside}{hint}\n{lines}")

    protocol, jpg, png = PROTOCOL[benchmark], (".jpg",), (".png",)
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
        unseen = protocol[CONTEXT[name]]
        images, masks = list_files(where["JPEGImages"], jpg), list_files(where["SegmentationClassContext"], png)
        lists = [where[f"ImageSets/SegmentationContext/{part}.txt"] for part in ("train", "val")]
        splits = [pair_up(read_lines(path), images, masks, path) for path in lists]
    return DataSource(name, classes, set(unseen), values, *splits, tuple(protocol["templates"]),
                      Recipe(steps=protocol["iterations"]), void, COUNTS[benchmark])


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
        raise DataError(f"no folder {root}: give a folder that holds images/, masks/, train.txt, val.txt and "
                        "classes.txt (python -m toy.world --root FOLDER draws one)")
    classes = read_lines(root / "classes.txt")
    if len(classes) > INVALID or len(set(classes)) < len(classes):
        raise DataError(f"{root}/classes.txt has {len(classes)} lines, {len(set(classes))} different ones: "
                        f"expected at most {INVALID}, each once")
    unseen = read_lines(root / "unseen.txt") if (root / "unseen.txt").exists() else []
    if not classes:
        raise DataError(f"{root}/classes.txt is empty: expected a class a line")
    if unknown := [c for c in unseen if c not in classes]:
        raise DataError(f"{root}/unseen.txt names {unknown[0][:60]!r}, which is not a line of classes.txt")
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
        if not path.is_file():  # a pipe would be waited for
            raise FileNotFoundError
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}): expected text, a name a line") from None
    return [line for line in lines if line]


def list_files(folder, suffixes):
    """Folder -> {file name without suffix: path}, one listing of the folder."""
    if not folder.is_dir():
        raise DataError(f"no folder {folder}")
    paths = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_file())  # no pipes, no folders
    return {path.stem: path for path in paths if path.suffix.lower() in suffixes}


def pair_up(names, images, masks, source):
    """Names -> [(name, image, mask)]; a name is only ever looked up, so it cannot lead out of the folders."""
    if not names:
        raise DataError(f"{source} is empty: expected at least one image")
    for kind, files in (("image", images), ("mask", masks)):
        if missing := [name for name in names if name not in files]:
            more = f" (and for {len(missing) - 1} more)" if len(missing) > 1 else ""
            raise DataError(f"{source} names {missing[0][:60]!r}, but no {kind} of that name exists{more}")
    return [(name, images[name], masks[name]) for name in names]
