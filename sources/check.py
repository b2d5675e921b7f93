"""The data check: what training would only show as bad figures, found in seconds. train.py starts with it.

    python data.py --dataset voc --download             # fetches VOC 2012, and says what is still missing
    python data.py --dataset voc --data-root data/voc   # the data check: counts, a picture, what is wrong
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from support import pictures
from data import TrainSet, ValSet, value_counts
from sources import IGNORE, NAMES, DataError, download_voc, open_dataset

CHECKED = 100  # images of each part that are decoded
NO_THING = ("background", "void", "other", "unlabelled", "unlabeled", "ignore")


def check(source, picture=None):
    """Looks at a data set -> lines of remarks. Raises DataError.

    Listings were checked whole when the set was opened; here CHECKED images of each part, evenly spread, go through
    TrainSet and ValSet. `picture`: a training sample and a test sample, image | labels, with their classes.
    One's own classes.txt is the order itself: only the picture can show that the masks follow another."""
    remarks, parts = [], {"training": source.train, "test": source.val}
    for (part, files), expected in zip(parts.items(), source.expected):
        if len(files) != expected:
            remarks.append(f"warning: {len(files)} {part} images, the benchmark has {expected}: figures do not compare")
    if named := [name for name in source.classes if name.lower() in NO_THING]:
        remarks.append(f"warning: {named[0]!r} is a class, but no thing that CLIP could know: the field makes it 255")

    samples = {}
    for part, files in parts.items():
        chosen = range(0, len(files), -(-len(files) // CHECKED))
        masks = [value_counts(files[i][2]) for i in chosen]
        check_values(source, part, masks)
        if part == "training":
            kind, wanted = "seen", source.seen
            samples[part] = check_view(source, chosen, masks)
        else:
            kind, wanted = "unseen", sorted(source.unseen)
            view = ValSet(source)
            for i in chosen:  # all are read, the last one is shown
                *samples[part], _ = view[i]
        found = {k for value, k in source.values.items() if sum(masks)[value]}
        if absent := [source.classes[k] for k in wanted if k not in found]:
            names = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
            remarks.append(f"warning: {len(absent)} of {len(wanted)} {kind} classes are in none of the {len(masks)} "
                           f"{part} masks looked at (of {len(files)}): {names}")
    if picture:
        shown = {k for _, labels in samples.values() for k in labels.unique().tolist()}
        rows = [[image, pictures.coloured(labels)] for image, labels in samples.values()]
        pictures.sheet(rows, ("image", "labels (white: no class)"), shown, source).save(picture)
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


def check_view(source, chosen, masks):
    """Reads the chosen training images: does the view show what it must hide? -> the sample of most classes, its labels
    as indexes into all classes."""
    view, most = TrainSet(source, source.recipe), (False, -1)
    names = torch.full((256,), IGNORE)
    names[:len(source.seen)] = torch.tensor(source.seen)
    for i, pixels in zip(chosen, masks):
        image, labels = view[i, i]
        labels = names[labels.long()]
        held = {source.classes[k] for value, k in source.values.items() if pixels[value] and k not in source.unseen}
        given = {source.classes[k] for k in labels.unique().tolist() if k != IGNORE}
        if given - held:
            raise DataError(f"{source.train[i][2]}: the training view shows {min(given - held)!r}, which is unseen or "
                            "not in this mask: a fault of the program, please report it")
        worth = bool((labels == IGNORE).any()), len(given)  # the sample shows that something is hidden, if anything is
        if worth > most:
            most, sample = worth, (image, labels)
    return sample


# ---------------------------------------------------------------- command


def main(args):
    if args.download:
        if args.dataset != "voc":
            raise DataError(f"--download is for --dataset voc; --dataset {args.dataset} shows the tree to unpack")
        download_voc(Path(args.data_root or "data/voc"))
    source = open_dataset(args.dataset, args.data_root)
    print(f"{source.name}: {len(source.train)} training images, {len(source.val)} test images, "
          f"{len(source.seen)} seen classes, {len(source.unseen)} unseen", flush=True)
    for remark in check(source, args.picture):
        print(remark)
    print(f"no error in up to {CHECKED} training and {CHECKED} test images; look at {args.picture}: do the labels fit?")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--dataset", required=True, metavar="NAME",
          help=f"{', '.join(NAMES)}, or a folder in the README's layout")
    group("--data-root", metavar="FOLDER", help="where it lies (default: data/NAME, or the folder itself)")
    group("--download", action="store_true", help="voc: fetch VOC 2012 (2 GB) into the root first")
    group("--picture", default="data_check.png", metavar="FILE", help="gets a training and a test sample with their "
          "labels (default: %(default)s)")
    return parser.parse_args(argv)
