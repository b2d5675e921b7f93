"""What training and test see of a data set: reading, transforms, loaders, the data check.

    python data.py --dataset voc --download             # fetches VOC 2012, and says what is still missing
    python data.py --dataset voc --data-root data/voc   # the data check: counts, a picture, what is wrong

Images leave as uint8 (3, H, W), labels as uint8 (H, W). Which files and classes there are is in sources.py.
"""
import argparse
import math
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as TF

import pictures
from sources import IGNORE, INVALID, NAMES, DataError, download_voc, open_dataset

PAD_COLOUR = [124, 116, 104]  # ImageNet's mean, where a crop is larger than the image
MAX_ONE_CLASS = 0.75  # FIELD: crops with more of one class are drawn again, ten times at most
CHECKED = 100  # images of each part that the data check decodes
FORMATS = ("JPEG", "PNG", "WEBP", "TIFF", "BMP", "GIF")  # for some others Pillow would start programs
NO_THING = ("background", "void", "other", "unlabelled", "unlabeled", "ignore")


# ---------------------------------------------------------------- reading and transforms


def read_image(path, upright=False):
    """File -> uint8 RGB (3, H, W). `upright`: turned as the camera noted in EXIF, which masks do not follow."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return tv_tensors.Image(TF.pil_to_tensor(rgb(ImageOps.exif_transpose(image) if upright else image)))
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


def read_mask(path, table, classes):
    """File and look-up table -> uint8 labels (H, W)."""
    raw = read_values(path)
    labels = table.numpy()[raw]
    if (labels == INVALID).any():
        known = ", ".join(str(a) if a == b else f"{a} to {b}" for a, b in runs((table != INVALID).nonzero()[:, 0]))
        raise DataError(f"the mask {path} holds the value {raw[labels == INVALID][0]}, which none of the {classes} "
                        f"classes has: expected {known}")
    return tv_tensors.Mask(torch.from_numpy(labels))


def read_pair(file, table, classes):
    """(name, image path, mask path) -> name, uint8 image (3, H, W), uint8 labels (H, W), of one size."""
    name, path, mask = file
    image, labels = read_image(path), read_mask(mask, table, classes)
    if image.shape[1:] != labels.shape:
        raise DataError(f"the image {path} is {tuple(image.shape[1:])} pixels, its mask {mask} is "
                        f"{tuple(labels.shape)}: expected one size")
    return name, image, labels


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
        image = TF.crop(image, top, left, h, w)
        if self.jitter:  # before the resize: mostly fewer pixels, never more than were decoded
            image = distort(image)
        image = TF.resize(image, size, antialias=True)
        labels = TF.resized_crop(labels, top, left, h, w, size)  # nearest, since it is a Mask
        if torch.rand(()) < 0.5:
            image, labels = TF.horizontal_flip(image), TF.horizontal_flip(labels)
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
        _, image, labels = read_pair(self.files[i], self.table, self.classes)
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * 1_000_003 + position)  # torch.manual_seed asks all devices
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
        name, image, labels = read_pair(self.files[i], self.table, self.classes)
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
        rows = [[image, pictures.coloured(labels)] for image, labels in rows]
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


if __name__ == "__main__":
    try:
        main(parse())
    except DataError as error:
        sys.exit(f"error: {error}")
