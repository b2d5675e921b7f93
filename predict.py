"""Labels images with any words: every pixel gets the class whose words are nearest to it.

    python predict.py                                               # an image and words of the run's data set
    python predict.py photo.jpg holiday/ --classes "cat, sofa|couch, potted plant" --other

For each image: NAME.overlay.png (colours, names and shares over it), NAME.mask.png (class indexes in a palette, 255:
none) and NAME.json (shares of the classes). Files that are not images are reported and skipped (exit status 1).

    from predict import segment
    labels, names = segment("photo.jpg", "cat, sofa|couch, potted plant")   # uint8 (H, W), 255: none; 3 names
"""
import argparse
import itertools
import math
import os
import re
import sys
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as TF

from evaluate import UNSEEN_ALONE, load_run, open_run_dataset, trained_on
from losses import IGNORE
from model import prompts
from sources import INVALID, DataError
from sources.files import read_image, rgb
from support import UserError, pictures, processes, windows
from support.checkpoint import find_checkpoint, read_checkpoint, write_json
from support.command import run_command

OTHER = "other, background, something else"  # OURS: the words that --other sets against the classes
KINDS = ("overlay.png", "mask.png", "json")  # of what is written for a picture
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # of images in a folder
EXPECTED = f"expected files that end in {', '.join(SUFFIXES)}"


def segment(image, classes=None, run=None, other=False, threshold=-1.0, gamma=0.0, device=None, clip_file=None,
            short_side=None, precision=None):
    """A picture -> uint8 labels (H, W), 255 where no class is, and the K class names.

    image       path, PIL image, RGB array (H, W, 3) or (H, W) of uint8, or tensor (3, H, W) of uint8
    classes     "cat, sofa|couch" or a list; synonyms are separated by |; the run's own list by default. Every pixel
                gets one of them, with one class, all pixels get it: see `other` and `threshold`
    run         run folder or checkpoint; the newest under runs/ by default. It stays loaded for the next call
    other       adds OTHER as one more class; its pixels become 255
    threshold   pixels whose cosine with their class is lower become 255
    gamma       taken off the logits of classes that the run trained on
    clip_file   where the run's CLIP lies now; by default where it lay in training
    short_side  pixels, to which the image is resized; as in the run's test by default
    precision   bf16, fp16 or fp32; by default bf16 where it is faster
    Raises UserError: DataError, ModelError, CLIPError, CheckpointError."""
    if not -1 <= threshold <= 1 or not abs(gamma) <= UNSEEN_ALONE:  # NaN neither
        raise UserError(f"threshold {threshold}, gamma {gamma}: expected a cosine from -1 to 1, and a number up to 1e9")
    picture = as_tensor(image)
    device = processes.start(device)
    classes = None if classes is None else tuple(split(classes))
    checkpoint = find_checkpoint(run)
    written_at = checkpoint.stat().st_mtime if checkpoint.is_file() else None  # so that a newer one is not passed over
    model, names, seen, config = load(checkpoint, written_at, classes, other, device, clip_file)
    test, least = config["test"], -math.inf if threshold == -1 else threshold / model.tau
    short_side = test["short_side"] if short_side is None else short_side
    with processes.autocast(device, precision or processes.fast_precision(device)):
        labels = windows.label(model.logits, [picture], short_side, test["window"], test["stride"],
                               gamma * seen[None], least)[0][0]
    return labels.masked_fill(labels == len(names), IGNORE).cpu(), names  # the last class is OTHER


def as_tensor(image):
    """What `segment` takes -> uint8 (3, H, W). Raises DataError."""
    if isinstance(image, (str, os.PathLike)):
        return read_image(image, upright=True)
    shape, kind = tuple(getattr(image, "shape", ())), str(getattr(image, "dtype", ""))
    if isinstance(image, np.ndarray) and kind == "uint8" and all(shape) and (len(shape) == 2 or shape[2:] == (3,)):
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        return TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image)))
    if isinstance(image, torch.Tensor) and kind == "torch.uint8" and len(shape) == 3 == shape[0] and all(shape):
        return image
    raise DataError(f"found {type(image).__name__} {kind} {shape or ''}".rstrip() + ": expected a path, a PIL image, a "
                    "uint8 array (H, W, 3) or (H, W), or a uint8 tensor (3, H, W), with values from 0 to 255")


def split(classes):
    """"cat, sofa|couch" or ["cat", "sofa|couch"] -> ["cat", "sofa,couch"], as classes.txt writes them."""
    parts = re.split("[,，、]", classes) if isinstance(classes, str) else classes
    words = [[" ".join(word.split()) for word in re.split("[|｜]", part) if word.strip(" ,_")] for part in parts]
    names = [",".join(some) for some in words if some]
    once = [{word.lower() for word in prompts(name, ["{}"])} for name in names]  # as CLIP reads them
    total, different = sum(map(len, once)), len(set().union(*once))
    if not 0 < len(names) < INVALID or different < total:
        raise UserError(f"{len(names)} classes with {total} names, {different} different ones: expected 1 to "
                        f'{INVALID - 1} classes, each name once, such as "cat, sofa|couch"')
    return names


@lru_cache(1)
def loaded_run(checkpoint, written_at, device, clip_file):
    return load_run(checkpoint, device, clip_file)


@lru_cache(1)
def load(checkpoint, written_at, classes, other, device, clip_file):
    """-> model that tells the classes apart, their names, bool (K,) which the run trained on, the run's config."""
    model, config = loaded_run(checkpoint, written_at, device, clip_file)
    classes = list(classes or config["classes"])
    model.set_classes(classes + [OTHER] * other, config["templates"])
    seen = trained_on(config, classes) + [False] * other
    return model, [name.split(",")[0].strip() for name in classes], torch.tensor(seen, device=device), config


def find(paths):
    """Files and folders -> the files, and the image files of the folders; what else is in a folder is told."""
    files = []
    for path in paths:
        if not path.is_dir():
            files.append(path)
            continue
        inside = sorted(file for file in path.iterdir() if file.name[0] != "." and not pictures.ours(file))
        images = [file for file in inside if file.suffix.lower() in SUFFIXES and file.is_file()]
        files += images
        if others := sorted({file.name for file in inside} - {file.name for file in images}):
            print(f"left out of {path}: {', '.join(others[:3])}{' …' * (len(others) > 3)}; {EXPECTED}",
                  file=sys.stderr, flush=True)
    if paths and not files:
        raise DataError(f"no image in {', '.join(map(str, paths[:3]))}: {EXPECTED}")
    return list(dict.fromkeys(files))  # each once


def free_stem(out, stem, taken):
    """NAME, or NAME-2, …: one of which no file is there but those that an earlier call of this command wrote."""
    for name in itertools.chain([stem], (f"{stem}-{n}" for n in itertools.count(2))):
        if name.casefold() not in taken and not any(pictures.foreign(out / f"{name}.{kind}") for kind in KINDS):
            return name


def write(image, labels, names, out, stem, about):
    """The three files of one image -> {class: share of the pixels}, "(no class)" for the rest."""
    pixels = torch.bincount(labels.flatten().long(), minlength=256).tolist()
    share = {name: pixels[k] / labels.numel() for k, name in enumerate(names)}
    none = pixels[IGNORE] / labels.numel()
    about = {"software": pictures.MARK, **about, "width": labels.shape[1], "height": labels.shape[0], "classes": share,
             "none": none}
    pictures.save(pictures.overlay(image, labels, names), out / f"{stem}.overlay.png", pictures.MARK)
    pictures.save_mask(labels, out / f"{stem}.mask.png", pictures.MARK)
    write_json(out / f"{stem}.json", about)
    return share | {"(no class)": none}


def main(args):
    checkpoint = find_checkpoint(args.run)
    out = args.out_dir or checkpoint.parent / "predictions"
    files = find(args.images)
    if not files:
        source = open_run_dataset(read_checkpoint(checkpoint)["config"])
        image, words = source.demo if source.demo and source.demo[0].is_file() else (source.val[0][1], None)
        files, args.classes = [Path(image)], args.classes or words
        print(f"no image given: using one of {source.name}")
    out.mkdir(parents=True, exist_ok=True)
    skipped, taken = 0, set()
    for file in files:
        try:
            if pictures.ours(file):
                raise DataError(f"{file} was written by predict.py or evaluate.py: expected a picture")
            image = as_tensor(file)
            labels, names = segment(image, args.classes, checkpoint, args.other, args.threshold, args.gamma,
                                    args.device, args.clip, args.short_side, args.precision)
            if len(names) == 1 and not (args.other or taken) and args.threshold == -1:
                print(f"every pixel gets one of the classes, here {names[0]}, as no other is named: --other adds one",
                      file=sys.stderr, flush=True)
            stem = free_stem(out, file.stem, taken)
            taken.add(stem.casefold())
            share = write(image, labels, names, out, stem, {"picture": str(file), "checkpoint": str(checkpoint)})
        except (DataError, OSError) as error:  # a wrong run or wrong classes are no DataError
            reason = error if isinstance(error, DataError) else f"{file}: {error.strerror}"
            print(f"skipped: {reason}", file=sys.stderr, flush=True)
            skipped += 1
        else:
            most = sorted((name for name in share if share[name]), key=share.get, reverse=True)
            text = ", ".join(f"{name} {pictures.percent(share[name])}" for name in most[:5]) + ", …" * (len(most) > 5)
            print(f"{file}: {text}\n    wrote {out}/{stem}.overlay.png, {stem}.mask.png and {stem}.json", flush=True)
    if skipped:
        raise DataError(f"{skipped} of {len(files)} images skipped")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("images", nargs="*", type=Path, metavar="IMAGE|FOLDER", help="by default an image of the run's data set; for "
        "toy, emoji that are no class and the words for them")
    add("--classes", metavar='"A, B|C"', help="names separated by commas, synonyms by | (default: the run's own)")
    add("--other", action="store_true", help=f'add "{OTHER}" as one more class; its pixels get no class')
    add("--threshold", type=float, default=-1.0, metavar="COSINE", help="pixels with a lower cosine than this get no "
        "class, -1 to 1; try 0.3 (default: -1, every pixel gets a class)")
    add("--gamma", type=float, default=0.0, help="subtracted from the logits of classes that the run trained on, if "
        "they win too often (default: 0)")
    add("--run", type=Path, metavar="FOLDER|FILE", help="run folder or checkpoint (default: the newest under runs/)")
    add("--clip", metavar="FILE", help="path of the run's CLIP now (default: as in training)")
    add("--short-side", type=int, metavar="PIXELS", help="images are resized to it (default: as in the run's test)")
    add("--out-dir", type=Path, metavar="FOLDER", help="of what is written (default: predictions/ in the run folder)")
    add("--device", choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one, else cpu)")
    add("--precision", choices=("bf16", "fp16", "fp32"), help="(default: bf16 where it is faster)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
