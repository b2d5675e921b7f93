"""The data check: `python data.py` reads every file once; train.py takes a quick look at some of them before it starts.

    python data.py --dataset voc --download   # fetches what is missing, then checks it
    python data.py --dataset my_data          # the check alone: files, counts, mask values, a picture
"""
import argparse
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

import clip
from model import prompts
from sources import IGNORE, INVALID, NAMES, DataError, download_dataset, open_dataset
from sources.files import read_pair, read_raw
from support import pictures, processes
from support.progress import Progress

QUICK = 100  # images of each part that a quick look reads, evenly spread
NO_THING = ("background", "void", "other", "unlabelled", "unlabeled", "ignore")


def check(source, full=False):
    """Looks at a data set, at all of its files if `full` -> remarks, a line each, and a picture. Raises DataError.

    The picture (Pillow) has a training sample, with labels as the losses see them, and a test sample. Only it can show
    that the masks of own data follow another order than classes.txt."""
    check_table(source)
    check_prompts(source)
    remarks, faults, samples = [], [], []
    if named := [name for name in source.classes if name.lower() in NO_THING]:
        remarks.append(f"warning: {named[0]!r} is a class, but CLIP cannot know what it means: label it 255")
    if both := {file.image for file in source.train} & {file.image for file in source.val}:
        remarks.append(f"warning: {len(both)} test images are training images too, such as {min(both).name}")
    found = len(source.train), len(source.val)
    if source.expected and found != source.expected:
        remarks.append("warning: {} training and {} test images, the benchmark has {} and {}: scores not "
                       "comparable".format(*found, *source.expected))
    for part, files, kind, wanted in (("training", source.train, "seen", source.seen),
                                      ("test", source.val, "unseen", source.unseen)):
        looked = files if full else files[::-(-len(files) // QUICK)]
        read, broken = look_at(looked, part)
        pixels = sum((counts for _, counts in read), np.zeros(256, int))
        absent = [source.classes[k] for value, k in source.values.items() if k in wanted and not pixels[value]]
        if part == "training" and len(absent) >= len(wanted) - 1 and len(looked) < len(files):
            return check(source, full=True)  # nothing to tell apart, or too rare for a quick look
        if absent:
            names = ", ".join(absent[:5]) + " …" * (len(absent) > 5)
            remarks.append(f"warning: {len(absent)} of {len(wanted)} {kind} classes are in none of the {len(read)} "
                           f"{part} masks looked at (of {len(files)}): {names}")
        faults += filter(None, [check_values(source, part, read, pixels), *broken])
        if faults and not full:
            raise DataError(faults[0])
        if not faults:
            samples.append(sample(source, part, read))
    if faults:
        print(*remarks, *faults, sep="\n", flush=True)
        raise DataError(f"{source.name}: {len(faults)} kinds of faults, each named above")
    if not full and max(len(source.train), len(source.val)) > QUICK:
        remarks.append(f"looked at up to {QUICK} images of each part: `python data.py --dataset {source.name}` (and "
                       "--data-root, if you gave it) reads all")
    shown = {k for _, labels in samples for k in labels.unique().tolist()}
    names = {k: name[:24] + " *" * (k in source.unseen) for k, name in enumerate(source.classes) if k in shown}
    rows = [[image, pictures.coloured(labels)] for image, labels in samples]
    return remarks, pictures.sheet(rows, ("image", "labels (white: no class)"), names)


def check_table(source):
    """Proves for all 256 mask values, and so for every mask, that the losses cannot see an unseen class."""
    for value, label in enumerate(source.table(training=True).tolist()):
        k = source.values.get(value)
        right = (source.seen.index(k),) if k in source.seen else (IGNORE, INVALID)
        if label not in right:
            raise DataError(f"the mask value {value} of {source.name} would be trained as label {label}: this is a "
                            "bug, please report it")


def check_prompts(source):
    """Raises DataError if CLIP cannot read all of a class's text, unseen ones too, which are first used at the test."""
    try:
        for name in source.classes:
            clip.tokenize(prompts(name, source.templates))
    except clip.CLIPError as error:
        raise DataError(f"a class of {source.name} is too long for CLIP: {error}") from None


def look_at(files, part):
    """-> [(file, pixels of each raw value)] of what can be read, and a line for each kind of fault in the rest."""
    read, kinds, progress = [], {}, Progress(f"{part} images", len(files), "read")
    with ThreadPoolExecutor(min(processes.cores(), 8)) as pool:  # Pillow unpacks outside Python's lock
        for done, (file, counts, fault) in enumerate(pool.map(look, files), 1):
            if fault:
                kind = re.sub(r"\d+", "", fault.replace(str(file.image), "").replace(str(file.mask), ""))
                kinds.setdefault(kind, (fault, []))[1].append(file.name)
            else:
                read.append((file, counts))
            progress.say(done)
    return read, [f"{fault} (in {len(names)} of {len(files)} files: {', '.join(names[:3])}{', …' * (len(names) > 3)})"
                  for fault, names in kinds.values()]


def look(file):
    """-> the file, pixels of each raw value of its mask, int (256,), and what is wrong with it, if anything."""
    try:
        return file, np.bincount(read_raw(file)[1].ravel(), minlength=256), ""
    except DataError as error:
        return file, None, str(error)


def check_values(source, part, read, pixels):
    """Are the raw values shifted, converted, or of another class list? -> what is wrong, in words, or None."""
    these = f"{part} masks of {source.name}"
    held = [v for v in np.flatnonzero(pixels).tolist() if v != IGNORE]
    if 0 in source.void and (pixels[IGNORE] > pixels[0] or len(read) >= 10 and not pixels[0]):  # VOC, Context
        return (f"the {these} hold 0 (background) {pixels[0]:,} times, 255 (void) {pixels[IGNORE]:,} times: shifted "
                "by one? Use the files as they come")
    if unknown := [v for v in held if v not in source.values and v not in source.void]:
        bad = [file.mask.name for file, counts in read if counts[unknown].any()]
        some = f"{len(bad)} of {len(read)} {these}, such as {min(bad)}, hold {', '.join(map(str, unknown[:5]))}"
        if source.expected:
            return f"{some}, which is no class: shifted by one or converted? Use the files as they come"
        values = ", ".join(map(str, held[:8])) + " …" * (len(held) > 8)
        last = len(source.classes) - 1
        return (f"{some}, but the lines of classes.txt are 0 {source.classes[0]} … {last} {source.classes[last]}: "
                "write each class as the number of its line, counted from 0, and 255 where no class or background is "
                f"(values here: {values})")
    if part == "training" and held == [0] and pixels[IGNORE]:
        return f"the {these} hold 0 and 255 alone, and 255 means no class: write 1 for the object, if 255 is the object"
    if part == "training" and read and not any(source.values.get(v) in source.seen for v in held):
        return (f"no training mask of {source.name} has a pixel of a seen class: are the masks empty, or is every "
                "class in them named as unseen?")


def sample(source, part, read):
    """The image with most raw values, and its labels as indexes into all classes."""
    training, indexes = part == "training", torch.arange(256)
    if training:
        indexes[:len(source.seen)] = torch.tensor(source.seen)
    file, _ = max(read, key=lambda item: np.count_nonzero(item[1]))
    _, image, labels = read_pair(file, source.table(training), len(source.classes))
    return image, indexes[labels.long()]


def main(args):
    if args.download:
        download_dataset(args.dataset, args.data_root)
    source = open_dataset(args.dataset, args.data_root)
    print(f"{source.name}: {len(source.train)} training images, {len(source.val)} test images, "
          f"{len(source.seen)} seen classes, {len(source.unseen)} unseen", flush=True)
    remarks, picture = check(source, full=True)
    pictures.save(picture, args.picture)
    print(*remarks, f"no error in any file; are the labels in {args.picture} right?", sep="\n")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    group = parser.add_argument_group("data").add_argument
    group("--dataset", required=True, metavar="NAME", help=f"{', '.join(NAMES)}, or a folder (docs/data.md)")
    group("--data-root", metavar="FOLDER", help="where it lies (default: data/NAME, or the folder itself)")
    group("--download", action="store_true", help="voc, coco-stuff: first fetch what is missing")
    group("--picture", default="data_check.png", metavar="FILE", help="gets a training and a test sample with their "
          "labels (default: %(default)s)")
    return parser.parse_args(argv)
