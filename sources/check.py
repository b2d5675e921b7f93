"""The data check finds in seconds what training would only show as bad scores. train.py starts with it.

    python data.py --dataset voc --download   # fetches what is missing, then looks at it
    python data.py --dataset my_data          # the check alone: counts, mask values, a picture
"""
import argparse

import numpy as np
import torch

from sources import IGNORE, INVALID, NAMES, DataError, download_dataset, open_dataset
from sources.files import read_pair, value_counts
from support import pictures

CHECKED = 100  # images of each part that are decoded, evenly spread
NO_THING = ("background", "void", "other", "unlabelled", "unlabeled", "ignore")


def check(source):
    """Looks at a data set -> remarks, a line each, and a picture. Raises DataError.

    The picture (Pillow) has a training sample, with labels as the losses see them, and a test sample. Only it can show
    that the masks of own data follow another order than classes.txt."""
    check_table(source)
    remarks, samples = [], []
    if named := [name for name in source.classes if name.lower() in NO_THING]:
        remarks.append(f"warning: {named[0]!r} is a class, but CLIP cannot know what it means: label it 255")
    if both := {file[1] for file in source.train} & {file[1] for file in source.val}:
        remarks.append(f"warning: {len(both)} test images are training images too, such as {min(both).name}")
    for part, files in (("training", source.train), ("test", source.val)):
        if source.expected and len(files) != (expected := source.expected[part == "test"]):
            remarks.append(f"warning: {len(files)} {part} images, the benchmark has {expected}: scores not comparable")
        looked = files[::-(-len(files) // CHECKED)]
        masks = [value_counts(file[2]) for file in looked]
        check_values(source, part, masks)
        samples.append(sample(source, looked, part))
        kind, wanted = ("seen", source.seen) if part == "training" else ("unseen", source.unseen)
        pixels = sum(masks)
        if absent := [source.classes[k] for value, k in source.values.items() if k in wanted and not pixels[value]]:
            if part == "training" and len(absent) == len(wanted):
                need_seen(source)
            names = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
            remarks.append(f"warning: {len(absent)} of {len(wanted)} {kind} classes are in none of the {len(masks)} "
                           f"{part} masks looked at (of {len(files)}): {names}")
    shown = {k for _, labels in samples for k in labels.unique().tolist()}
    names = {k: name[:24] + " *" * (k in source.unseen) for k, name in enumerate(source.classes) if k in shown}
    rows = [[image, pictures.coloured(labels)] for image, labels in samples]
    return remarks, pictures.sheet(rows, ("image", "labels (white: no class)"), names)


def check_table(source):
    """Proves for all 256 mask values, and so for every mask, that the losses cannot see an unseen class."""
    names = [source.classes[k] for k in source.seen]  # of the labels that the losses see
    for value, label in enumerate(source.table(training=True).tolist()):
        k = source.values.get(value)
        right = (IGNORE, INVALID) if k is None or k in source.unseen else (source.seen.index(k),)
        if label not in right:
            raise DataError(f"the mask value {value} of {source.name} would be trained as "
                            f"{names[label] if label < len(names) else label}: this is a bug, please report it")


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


def sample(source, files, part):
    """Reads all these images -> the one with most classes, and its labels as indexes into all classes.

    Of training images one that hides something is taken, if there is any."""
    training, names, most = part == "training", torch.arange(256), (False, -1)
    if training:
        names[:len(source.seen)] = torch.tensor(source.seen)
    table = source.table(training)
    for file in files:
        _, image, labels = read_pair(file, table, len(source.classes))
        worth = training and bool((labels == IGNORE).any()), len(labels.unique())
        if worth > most:
            most, best = worth, (image, names[labels.long()])
    return best


def need_seen(source):
    """Raises DataError if no training mask at all has a pixel to learn from."""
    seen = [value for value, k in source.values.items() if k not in source.unseen]
    if not any(value_counts(file[2])[seen].any() for file in source.train):
        raise DataError(f"no training mask of {source.name} has a pixel of a seen class: are the masks empty, or is "
                        "every class in them named as unseen?")


# ---------------------------------------------------------------- the command


def main(args):
    if args.download:
        download_dataset(args.dataset, args.data_root)
    source = open_dataset(args.dataset, args.data_root)
    print(f"{source.name}: {len(source.train)} training images, {len(source.val)} test images, "
          f"{len(source.seen)} seen classes, {len(source.unseen)} unseen", flush=True)
    remarks, picture = check(source)
    pictures.save(picture, args.picture)
    for remark in remarks:
        print(remark)
    print(f"no error in up to {CHECKED} training and {CHECKED} test images; are the labels in {args.picture} right?")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--dataset", required=True, metavar="NAME", help=f"{', '.join(NAMES)}, or a folder (docs/data.md)")
    group("--data-root", metavar="FOLDER", help="where it lies (default: data/NAME, or the folder itself)")
    group("--download", action="store_true", help="voc, coco-stuff: first fetch what is missing")
    group("--picture", default="data_check.png", metavar="FILE", help="gets a training and a test sample with their "
          "labels (default: %(default)s)")
    return parser.parse_args(argv)
