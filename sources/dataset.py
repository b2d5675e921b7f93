"""What a data set is: its classes, which of them are unseen, what its mask values mean, and how it is trained on.

Masks pass through one look-up table: raw value -> class index, and in the training view raw value -> index among the
SEEN classes, everything else 255. An unseen label cannot reach the training loss.
"""
import dataclasses
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from losses import IGNORE
from sources.files import INVALID, DataError, read_values, short
from support.processes import cores

# FIELD: the benchmarks' classes, unseen indexes, mask values, prompts, numbers of images and steps
PROTOCOL = json.loads((Path(__file__).parent / "protocol.json").read_text())


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A data set's training defaults; train.py's flags override them. FIELD for the benchmarks."""
    steps: int
    batch_size: int = 16  # images a step, over all processes
    lr: float = 2e-4
    warmup: int = 1500  # steps
    crop: int = 512  # pixels a side
    scale: tuple = (0.5, 2.0)  # of the image whose short side is `crop`
    jitter: bool = True  # photometric distortion
    body: str = "resnet50"
    clip: str = "ViT-B/16"
    short_side: int = 512  # test images are resized to it
    window: int = 512  # test windows, pixels a side
    stride: int = 426

    def at_crop(self, crop):
        """The recipe at another crop: test images, windows and strides keep their ratio to it."""
        scaled = {key: round(getattr(self, key) * crop / self.crop) for key in ("short_side", "window", "stride")}
        return dataclasses.replace(self, crop=crop, **scaled)


@dataclasses.dataclass
class DataSource:
    """One data set: where its files are and what its mask values mean. Raises DataError if it cannot be trained on."""
    name: str
    classes: list  # K names; synonyms separated by commas
    unseen: set  # indexes into classes
    values: dict  # raw mask value -> class index; what is not in it must be in `void`
    train: list = dataclasses.field(repr=False)  # files.Pair
    val: list = dataclasses.field(repr=False)
    templates: tuple
    recipe: Recipe
    void: tuple = (255,)  # raw mask values without a class: no loss, not scored
    expected: tuple = ()  # a benchmark's numbers of training and test images; empty for own data
    demo: tuple = ()  # image and words of `python predict.py` alone; else a test image, the run's classes

    def __post_init__(self):
        if len(self.seen) < 2:
            raise DataError(f"{self.name} has {len(self.seen)} seen of {len(self.classes)} classes, expected at least "
                            "2, as training tells classes apart: add classes, or name fewer of them as unseen")
        owner = {}
        for k, name in enumerate(self.classes):
            for word in filter(None, map(plain, name.split(","))):
                if (first := owner.setdefault(word, k)) != k:
                    raise DataError(f"{self.name}: the classes {short(self.classes[first])} and {short(name)} share "
                                    f"the name {short(word)}, so text cannot tell them apart: remove it from one")

    @property
    def seen(self):
        return [k for k in range(len(self.classes)) if k not in self.unseen]

    def table(self, training):
        """uint8 (256,): raw mask value -> label. Training: index among the seen classes; unseen become IGNORE."""
        table = torch.full((256,), INVALID, dtype=torch.uint8)
        table[list(self.void)] = IGNORE
        for value, k in self.values.items():
            table[value] = k if not training else IGNORE if k in self.unseen else self.seen.index(k)
        return table

    def departures(self, **settings):
        """What of a run differs from the benchmark: crop=256 -> "crop 256 instead of 512". "" for own data.

        settings: fields of Recipe with the run's values. Ask before `recipe` is replaced."""
        differ = [f"{key.replace('_', ' ')} {value} instead of {getattr(self.recipe, key)}"
                  for key, value in settings.items() if value != getattr(self.recipe, key)]
        return ", ".join(differ) if self.expected else ""


def benchmark(name, protocol, unseen, values, void, train, val):
    """A DataSource with the classes, prompts and numbers of an entry of PROTOCOL."""
    return DataSource(name, protocol["classes"], set(unseen), values, train, val, tuple(protocol["templates"]),
                      Recipe(steps=protocol["iterations"]), void, (protocol["train_images"], protocol["val_images"]))


def plain(name):
    """A name's letters and digits alone, in lower case: "potted_plant" and "Potted plant" are one name."""
    return "".join(filter(str.isalnum, name.lower()))


def without_unseen(source):
    """Strict inductive: the training files whose masks hold no unseen pixel. Every mask is read once."""
    hidden = [value for value, k in source.values.items() if k in source.unseen]
    with ThreadPoolExecutor(min(cores(), 8)) as pool:  # Pillow unpacks outside Python's lock
        held = pool.map(lambda file: np.isin(read_values(file.mask), hidden).any(), source.train)
        kept = [file for file, unseen in zip(source.train, held) if not unseen]
    if not kept:
        raise DataError(f"all {len(source.train)} training images of {source.name} hold an unseen class, so that "
                        "--strict leaves nothing: train without it")
    return kept


def locate(root, inside, tree, hint):
    """A benchmark's tree ({part: what it is}) -> {part: path}, each in `root` or where its archive puts it, `inside`.

    Raises DataError with the tree where a part is missing."""
    where = places(root, inside, tree)
    if missing := [part for part in tree if not where[part].exists()]:
        lines = "\n".join(f"    {part:<{max(map(len, tree))}}  {what}" for part, what in tree.items())
        raise DataError(f"no {missing[0]} in {root}: expected this tree there or in {root / inside}; {hint}\n{lines}")
    return where


def places(root, inside, tree):
    """-> {part: path}; what is missing belongs beside the rest."""
    home = root if any((root / part).exists() for part in tree) else root / inside
    return {part: next((path for path in (root / part, root / inside / part) if path.exists()), home / part)
            for part in tree}
