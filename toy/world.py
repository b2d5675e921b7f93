"""The toy data set: scenes of emoji on one or two grounds (grass, sky, …), a small PASCAL VOC.

The classes are VOC's twenty ("dining plate" stands for its dining table). All else is 255 in the masks, as VOC's
background is ignored: the grounds, and one emoji in seven, which is something else. Five classes are unseen. A *world*
is one set of scenes with its choice of these five: world 0 has VOC's usual ones, each other world (`--seed`) its own.
`demo` is a scene of things that are no class of any world.
Each noun has three drawings, the same in training, at test and in the training of toy/clip.pt: a test scene is a new
arrangement of known drawings. They are drawn with numpy's frozen RandomState: a world is the same on every machine.

    python -m toy.world                              # writes data/toy (train.py does it by itself)
    python -m toy.world --root data/other --seed 1   # other scenes, another choice of unseen classes
"""
import argparse
import functools
import math
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from support import pictures

SHEET = Path(__file__).with_name("sprites.png")  # where the emoji are from, and their licences: THIRD_PARTY.md
SIDE, STYLES = 48, 3  # pixels a side of a cell; neighbouring cells a noun: Noto's, Twemoji's, Fluent's drawing
# sprites.txt has an emoji and its noun a line, in the order of the sheet
NOUNS = [line.split(" ", 1)[1] for line in SHEET.with_suffix(".txt").read_text(encoding="utf-8").splitlines()]
CLASSES = ["aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "dining plate", "dog",
           "horse", "motorbike", "person", "potted plant", "sheep", "sofa", "train", "tv monitor"]
VOC_UNSEEN = ("potted plant", "sheep", "sofa", "train", "tv monitor")
GROUNDS = {  # two colours, of which `_pattern` makes a texture
    "grass": ((0.18, 0.42, 0.12), (0.47, 0.74, 0.27)), "sand": ((0.78, 0.66, 0.43), (0.95, 0.87, 0.66)),
    "water": ((0.08, 0.32, 0.58), (0.37, 0.66, 0.84)), "sky": ((0.45, 0.70, 0.96), (1.00, 1.00, 1.00)),
    "snow": ((0.82, 0.86, 0.93), (0.98, 0.99, 1.00)), "brick wall": ((0.56, 0.22, 0.16), (0.80, 0.76, 0.72)),
    "wooden floor": ((0.38, 0.24, 0.13), (0.76, 0.55, 0.33)), "night sky": ((0.03, 0.04, 0.16), (0.90, 0.90, 0.85))}
OTHERS = [noun for noun in NOUNS if noun not in CLASSES]  # 268: void
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")  # the captions of pretrain.py start the same ways
VOID = 255
SIZE = 64  # pixels a side
ROOT = Path("data/toy")  # of seed 0, drawn where it is missing
TRAIN, VAL = 4000, 500  # scenes
DEMO, DEMO_SEED = ("octopus", "pizza", "rocket"), 172  # a seed that leaves room for all three


def unseen(seed=0):
    """The five unseen classes, drawn from the seed, in the order of CLASSES. Seed 0 has VOC's usual ones."""
    drawn = np.random.RandomState(seed).choice(CLASSES, 5, replace=False) if seed else VOC_UNSEEN
    return sorted(map(str, drawn), key=CLASSES.index)


@functools.cache
def _spread(size, n):
    """(size, n): takes n values to `size` pixels, smoothly."""
    at = (np.arange(size) + 0.5) / size * n - 0.5
    return np.maximum(1 - abs(at[:, None].clip(0, n - 1) - np.arange(n)), 0)


def _noise(rng, size, rows, columns):
    """Values in [0, 1], (size, size); the fewer rows, the smoother from top to bottom, and so for columns."""
    return _spread(size, rows) @ rng.rand(rows, columns) @ _spread(size, columns).T


def _pattern(rng, name, size):
    """Texture of a ground: the share of its second colour, (size, size)."""
    y, x = np.mgrid[:size, :size]
    if name == "grass":  # blades
        return 1.6 * _noise(rng, size, size // 8, size) - 0.3
    if name == "sand":  # grains
        return 0.5 * rng.rand(size, size) + 0.5 * _noise(rng, size, 6, 6)
    if name == "water":  # waves
        bend = 0.5 * np.sin(2 * math.pi * x / rng.uniform(20, 40) + rng.uniform(0, 6))
        return 0.35 + 0.35 * np.sin(2 * math.pi * (y / rng.uniform(5, 9) + bend)) + 0.3 * _noise(rng, size, 7, 7)
    if name == "sky":  # clouds
        return 3 * (0.7 * _noise(rng, size, 5, 4) + 0.3 * _noise(rng, size, 12, 9)) - 1.4
    if name == "snow":
        return 0.3 * rng.rand(size, size) + 0.7 * _noise(rng, size, 5, 5)
    if name == "brick wall":
        height = rng.randint(6, 10)
        row, down = divmod(y + rng.randint(height), height)
        along = (x + rng.randint(height) + row % 2 * height) % (2 * height)
        return np.where((down == 0) | (along == 0), 1, 0.25 * rng.rand(size, size))
    if name == "wooden floor":
        height = rng.randint(8, 13)
        gap = (y + rng.randint(height)) % height == 0
        return np.where(gap, 0, 1.4 * _noise(rng, size, size, 6) - 0.1)
    return np.where(rng.rand(size, size) > 0.985, 1, 0.2 * _noise(rng, size, 4, 4))  # night sky


def _ground(rng, name, size):
    dark, light = np.array(GROUNDS[name])
    return dark + (light - dark) * _pattern(rng, name, size).clip(0, 1)[..., None]


@functools.cache
def read_sprites():
    """-> {noun: float32 (STYLES, SIDE + 2, SIDE + 2, 4)}, colours times opacity, with a transparent edge"""
    sheet = np.float32(Image.open(SHEET).convert("RGBA")) / 255
    cells = sheet.reshape(len(sheet) // SIDE, SIDE, -1, SIDE, 4).swapaxes(1, 2)  # (rows, columns, SIDE, SIDE, 4)
    cells[..., :3] *= cells[..., 3:]
    cells = np.pad(cells.reshape(-1, STYLES, SIDE, SIDE, 4), ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
    return dict(zip(NOUNS, cells))


def _emoji(rng, noun, x, y, cx, cy, side):
    """Points (x, y) -> colour times opacity, and opacity, of an emoji at (cx, cy): (..., 4). It is in one of three
    styles, turned a little, mirrored half of the time."""
    styles = read_sprites()[noun]
    sprite, angle, mirror = styles[rng.randint(len(styles))], rng.uniform(-0.2, 0.2), rng.choice([-1, 1])
    scale, last = SIDE / side, SIDE + 0.999
    u = mirror * scale * ((x - cx) * math.cos(angle) + (y - cy) * math.sin(angle)) + (SIDE + 1) / 2
    v = scale * ((y - cy) * math.cos(angle) - (x - cx) * math.sin(angle)) + (SIDE + 1) / 2
    u, v = u.clip(0, last), v.clip(0, last)  # cells' centres are whole numbers
    i, j = v.astype(int), u.astype(int)
    v, u = (v - i)[..., None], (u - j)[..., None]
    return (sprite[i, j] * (1 - v) * (1 - u) + sprite[i + 1, j] * v * (1 - u)
            + sprite[i, j + 1] * (1 - v) * u + sprite[i + 1, j + 1] * v * u)


def draw(rng, others=0.15, things=(1, 3), sides=(24, 44), size=SIZE, nouns=()):
    """One scene -> image uint8 (size, size, 3), mask uint8 (size, size) of indexes into CLASSES, what is visible.

    others  share of OTHERS among the emoji, else of CLASSES
    things  least and largest number of emoji; fewer where there is no room
    sides   of the emoji, least and largest, pixels
    nouns   what the emoji are, instead of chance"""
    grounds = list(GROUNDS)
    names = [grounds[rng.randint(len(grounds))]]
    image = _ground(rng, names[0], size)
    part = np.zeros((size, size), np.uint8)  # index into names
    y, x = np.mgrid[:size, :size] + 0.5
    if rng.rand() < 0.5:  # another ground below a tilted edge
        names.append(grounds[rng.randint(len(grounds))])
        below = y + rng.uniform(-0.3, 0.3) * (x - size / 2) > size * rng.uniform(0.25, 0.75)
        image[below] = _ground(rng, names[1], size)[below]
        part[below] = 1
    image *= rng.uniform(0.85, 1.08)
    placed = []
    for noun in nouns or [None] * rng.randint(things[0], things[1] + 1):
        for _ in range(10):  # a place where it hides no other emoji completely, else stop
            side = rng.uniform(*sides)
            cx, cy = rng.uniform(0.4 * side, size - 0.4 * side, 2)
            if all(math.hypot(cx - ox, cy - oy) > 0.4 * (side + other) for ox, oy, other in placed):
                break
        else:
            break
        placed.append((cx, cy, side))
        kind = OTHERS if rng.rand() < others else CLASSES
        names.append(noun or kind[rng.randint(len(kind))])
        reach = 0.6 * side  # only the box that can hold the emoji: its corners, turned
        box = (slice(max(int(cy - reach), 0), int(cy + reach) + 1), slice(max(int(cx - reach), 0), int(cx + reach) + 1))
        emoji = _emoji(rng, names[-1], x[box], y[box], cx, cy, side)
        image[box] = image[box] * (1 - emoji[..., 3:]) + rng.uniform(0.85, 1.15) * emoji[..., :3]
        part[box][emoji[..., 3] > 0.5] = len(names) - 1
    image = image * 255 + rng.randint(-8, 9, image.shape)  # sensor noise
    mask = np.array([CLASSES.index(name) if name in CLASSES else VOID for name in names], np.uint8)[part]
    visible = np.flatnonzero(np.bincount(part.ravel()) > 0.005 * size ** 2)
    return image.clip(0, 255).astype(np.uint8), mask, list(dict.fromkeys(names[i] for i in visible))


def demo():
    """A scene of things that are no class -> image uint8 (SIZE, SIZE, 3), names of all that is in it."""
    image, _, names = draw(np.random.RandomState(DEMO_SEED), nouns=DEMO)
    return image, names


def write(root, seed=0, train=TRAIN, val=VAL):
    """Writes the world under `root` in the layout of one's own data (see docs/data.md); the whole folder or nothing.

    Raises FileExistsError where something is there before it starts."""
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} exists already: delete it, or give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as folder:
        world = Path(folder, "world")
        fill(world, seed, train, val)
        try:
            world.rename(root)
        except OSError:
            if not root.exists():  # else another process was first: its world is the same
                raise


def fill(folder, seed, train, val):
    (folder / "images").mkdir(parents=True)
    (folder / "masks").mkdir()
    rng = np.random.RandomState(seed)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}_{i:05d}" for i in range(count)]
        for name in names:
            image, mask, _ = draw(rng)
            Image.fromarray(image).save(folder / f"images/{name}.png", compress_level=1)
            mask = Image.fromarray(mask)
            mask.putpalette(pictures.COLOURS.tobytes())
            mask.save(folder / f"masks/{name}.png", compress_level=1)
        (folder / f"{split}.txt").write_text("\n".join(names) + "\n")
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (folder / "unseen.txt").write_text("\n".join(unseen(seed)) + "\n")
    Image.fromarray(demo()[0]).save(folder / "demo.png")  # without the mark of what commands write: predict.py reads it


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", default=ROOT, metavar="FOLDER", help="must not exist (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of scenes and unseen classes (default: 0)")
    args = parser.parse_args()
    try:
        write(args.root, args.seed)
    except FileExistsError as error:
        parser.exit(1, f"error: {error}\n")
    print(f"wrote {args.root}: {TRAIN} + {VAL} scenes, {len(CLASSES)} classes, unseen: {', '.join(unseen(args.seed))}")
