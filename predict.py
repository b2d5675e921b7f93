"""Labels images with any words: every pixel gets the class whose words are nearest to it.

    python predict.py                                               # an image and words of the run's data set
    python predict.py photo.jpg holiday/ --classes "cat, sofa|couch, potted plant" --other

For each image: NAME.overlay.png (colours, names and shares over it), NAME.mask.png (class indexes in a palette, 255:
none) and NAME.json (shares of the classes). Files that are not images are reported and skipped (exit status 1).

    from predict import segment
    labels, names = segment("photo.jpg", "cat, sofa|couch, potted plant")   # uint8 (H, W), 255: none; 3 names
"""
import argparse
import json
import sys
from functools import lru_cache
from pathlib import Path

import torch

from evaluate import open_run_dataset, trained_on, unfinished
from losses import IGNORE
from model import load_run
from sources import INVALID, DataError
from sources.files import read_image
from support import pictures, processes
from support.checkpoint import atomic, newest_run, read_checkpoint
from support.command import run_command

OTHER = "other, background, something else"  # OURS: the words that --other sets against the classes
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif")  # of images in a folder


def segment(image, classes=None, run=None, other=False, threshold=-1.0, gamma=0.0, device=None, clip_file=None,
            short_side=None, precision=None):
    """Path or uint8 tensor (3, H, W) -> uint8 labels (H, W), 255 where no class is, and the K class names.

    classes     "cat, sofa|couch" or a list; synonyms are separated by |; the run's own list by default
    run         run folder or checkpoint; the newest under runs/ by default. It stays loaded for the next call
    other       adds OTHER as one more class; its pixels become 255
    threshold   pixels whose cosine with their class is lower become 255
    gamma       taken off the logits of classes that the run trained on
    clip_file   where the run's CLIP lies now; by default where it lay in training
    short_side  pixels, to which the image is resized; as in the run's test by default
    precision   bf16 or fp32; by default bf16 where it is faster
    Raises DataError, ModelError, CLIPError, CheckpointError."""
    device = processes.start(device)
    model, names, seen, config = load(*written(run), classes if classes is None else tuple(split(classes)), other,
                                      device, clip_file)
    if not isinstance(image, torch.Tensor):
        image = read_image(image, upright=True)
    test = config["test"]
    labels = model.label(image, short_side or test["short_side"], test["window"], test["stride"], gamma * seen[None],
                         threshold, precision or processes.fast_precision(device))[0]
    return labels.masked_fill(labels == len(names), IGNORE).cpu(), names  # the last class is OTHER


def split(classes):
    """"cat, sofa|couch" or ["cat", "sofa|couch"] -> ["cat", "sofa,couch"], as classes.txt writes them."""
    parts = classes.split(",") if isinstance(classes, str) else classes
    names = [",".join(word.strip() for word in part.split("|") if word.strip()) for part in parts]
    names = [name for name in names if name]
    firsts = [name.split(",")[0] for name in names]
    if not 0 < len(set(firsts)) == len(names) < INVALID:
        raise DataError(f"{len(names)} classes, {len(set(firsts))} different ones: expected 1 to {INVALID - 1}, each "
                        'once, such as "cat, sofa|couch"')
    return names


def written(run):
    """Run folder, checkpoint or None -> checkpoint and when it was written, so that a newer one is not passed over."""
    path = Path(run) if run else newest_run()
    path = path / "last.pt" if path.is_dir() else path
    return path, path.stat().st_mtime if path.is_file() else None


@lru_cache(1)
def loaded_run(checkpoint, _, device, clip_file):
    model, config = load_run(checkpoint, device, clip_file)
    if remark := unfinished(config):
        print(remark, file=sys.stderr, flush=True)
    return model, config


@lru_cache(1)
def load(checkpoint, written_at, classes, other, device, clip_file):
    """-> model that tells the classes apart, their names, bool (K,) which the run trained on, the run's config."""
    model, config = loaded_run(checkpoint, written_at, device, clip_file)
    classes = list(classes or config["classes"])
    model.set_classes(classes + [OTHER] * other, config["templates"])
    seen = trained_on(config, classes) + [False] * other
    return model, [name.split(",")[0].strip() for name in classes], torch.tensor(seen, device=device), config


def find(paths):
    """Files and folders -> the files, and the image files of the folders."""
    files = []
    for path in paths:
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise DataError(f"no image in {path}: expected files that end in {', '.join(SUFFIXES)}")
        files += inside
    return files


def write(image, labels, names, out, stem, about):
    """The three files of one image -> {class: share of the pixels}, "none" for those without a class."""
    pixels = torch.bincount(labels.flatten().long(), minlength=256).tolist()
    share = {name: pixels[k] / labels.numel() for k, name in enumerate(names)}
    none = pixels[IGNORE] / labels.numel()
    about |= {"width": labels.shape[1], "height": labels.shape[0], "classes": share, "none": none}
    pictures.save(pictures.overlay(image, labels, names), out / f"{stem}.overlay.png")
    pictures.save_mask(labels, out / f"{stem}.mask.png")
    atomic(out / f"{stem}.json", lambda path: path.write_text(json.dumps(about, indent=1) + "\n"))
    return share | {"none": none}


def main(args):
    checkpoint, _ = written(args.run)
    out = args.out_dir or checkpoint.parent / "predictions"
    files = find(args.images)
    if not files:
        source = open_run_dataset(read_checkpoint(checkpoint)["config"])
        image, words = source.demo if source.demo and source.demo[0].is_file() else (source.val[0][1], None)
        files, args.classes = [Path(image)], args.classes or words
        print(f"no image given: using one of {source.name}")
    skipped, stems = 0, set()
    for file in files:
        try:
            image = read_image(file, upright=True)
        except DataError as error:
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            skipped += 1
            continue
        labels, names = segment(image, args.classes, checkpoint, args.other, args.threshold, args.gamma, args.device,
                                args.clip, args.short_side, args.precision)
        stem, n = file.stem, 1
        while stem in stems:  # a.jpg and a.png, or a.jpg of two folders
            stem, n = f"{file.stem}-{n + 1}", n + 1
        stems.add(stem)
        share = write(image, labels, names, out, stem, {"picture": str(file), "checkpoint": str(checkpoint)})
        most = sorted((name for name in share if share[name]), key=share.get, reverse=True)
        most = [f"{name} {pictures.percent(share[name])}" for name in most[:5]] + ["…"] * (len(most) > 5)
        print(f"{file}: {', '.join(most)}\n"
              f"    wrote {out}/{stem}.overlay.png, {stem}.mask.png and {stem}.json", flush=True)
    if skipped:
        raise DataError(f"{skipped} of {len(files)} images skipped")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="*", type=Path, metavar="IMAGE|FOLDER", help="by default an image of the "
                        "run's data set; for toy, emoji that are no class and the words for them")
    group = parser.add_argument_group("classes").add_argument
    group("--classes", metavar='"A, B|C"', help="names separated by commas, synonyms by | (default: the run's own)")
    group("--other", action="store_true", help=f'add "{OTHER}" as one more class; its pixels get no class')
    group("--threshold", type=float, default=-1.0, metavar="COSINE", help="pixels with a lower cosine than this get no "
          "class, -1 to 1; try 0.3 (default: -1, every pixel gets a class)")
    group("--gamma", type=float, default=0.0, help="subtracted from the logits of classes that the run trained on, if "
          "they win too often (default: 0)")
    group = parser.add_argument_group("run").add_argument
    group("--run", type=Path, metavar="FOLDER|FILE", help="run folder or checkpoint (default: the newest under runs/)")
    group("--clip", metavar="FILE", help="path of the run's CLIP now (default: as in training)")
    group("--short-side", type=int, metavar="PIXELS", help="images are resized to it (default: as in the run's test)")
    group("--out-dir", type=Path, metavar="FOLDER", help="of what is written (default: predictions/ in the run folder)")
    group("--device", choices=("cpu", "cuda", "mps"), help="(default: cuda if there is one, else cpu)")
    group("--precision", choices=("bf16", "fp32"), help="(default: bf16 where it is faster)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
