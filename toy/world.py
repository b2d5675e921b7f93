"""The embedded default's world: scenes of coloured shapes on textured grounds, with names that compose.

20 things (colour × shape) and 6 stuff classes (tone × material); 8 things and 1 stuff class are unseen, of two kinds:
new pairs of known words ("red" and "cross" are seen, "red cross" is not), and all things of one colour, a word that no
mask explains.
Scenes are drawn from a seed with numpy's frozen RandomState, so the world is the same on every machine.

    python -m toy.world                              # writes data/toy (train.py does it by itself)
    python -m toy.world --root data/other --seed 1   # other scenes, another choice of unseen classes
"""
import argparse
import math
import os
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from support import pictures

COLOURS = {"red": (0.85, 0.15, 0.15), "green": (0.15, 0.70, 0.20), "blue": (0.15, 0.30, 0.90),
           "yellow": (0.90, 0.85, 0.15), "purple": (0.60, 0.20, 0.75)}
SHAPES = ("circle", "square", "cross", "ring")
TONES = {"light": 0.72, "dark": 0.28}
MATERIALS = {"sand": (0.09, 0.02, -0.10), "grass": (-0.07, 0.07, -0.07), "water": (-0.09, 0.00, 0.10)}  # tints
TEMPLATES = ("a photo of {}", "a picture of {}", "{}")  # the captions of pretrain.py start the same ways

THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
STUFF = [f"{tone} {material}" for tone in TONES for material in MATERIALS]
CLASSES = THINGS + STUFF
SIZE = 64  # pixels a side
ROOT = Path("data/toy")  # of seed 0, drawn where it is missing
TRAIN, VAL = 4000, 500  # scenes


def unseen_kinds(seed=0):
    """What is new: all things of one colour; one of each other colour (no shape twice); one ground. By the seed."""
    rng = np.random.RandomState(seed)
    *others, hidden = rng.permutation(list(COLOURS))
    return {"new word": [f"{hidden} {shape}" for shape in SHAPES],
            "new pair": [f"{colour} {shape}" for colour, shape in zip(others, rng.permutation(SHAPES))],
            "new ground": [STUFF[seed % len(STUFF)]]}


def unseen(seed=0):
    """Unseen classes of all kinds, in the order of CLASSES."""
    return sorted(sum(unseen_kinds(seed).values(), []), key=CLASSES.index)


def _inside(shape, u, v):
    """Which points (u, v), in units of the object's radius, lie inside the shape."""
    if shape == "circle":
        return u * u + v * v < 0.9
    if shape == "square":
        return np.maximum(abs(u), abs(v)) < 0.85
    if shape == "cross":
        return (np.minimum(abs(u), abs(v)) < 0.3) & (np.maximum(abs(u), abs(v)) < 1)
    return (u * u + v * v < 1) & (u * u + v * v > 0.3)  # ring


def _ground(rng, tone, material, x, y):
    """Tinted texture of two near shades at a random angle and period: dotted sand, striped grass, checked water."""
    angle, period = rng.uniform(0, math.pi), rng.uniform(5, 9)
    u = (x * math.cos(angle) + y * math.sin(angle)) / period
    v = (y * math.cos(angle) - x * math.sin(angle)) / period
    if material == "grass":
        high = u % 1 < 0.5
    elif material == "sand":
        high = (u % 1 - 0.5) ** 2 + (v % 1 - 0.5) ** 2 < 0.09
    else:
        high = (u % 1 < 0.5) ^ (v % 1 < 0.5)
    grey = TONES[tone] + rng.uniform(-0.08, 0.08) + np.where(high, 0.09, -0.09)
    return grey[..., None] + MATERIALS[material] + rng.uniform(-0.03, 0.03, 3)


def draw(rng, max_things=3):
    """One scene -> image uint8 (SIZE, SIZE, 3), mask uint8 (SIZE, SIZE) of indexes into CLASSES, class names in it.

    Painted back to front at twice the size and averaged, so edges are smooth; later things hide earlier ones."""
    y, x = (np.mgrid[:2 * SIZE, :2 * SIZE] + 0.5) / 2
    names = [STUFF[rng.randint(len(STUFF))]]
    image = _ground(rng, *names[0].split(), x, y)
    mask = np.full(x.shape, CLASSES.index(names[0]), np.uint8)
    if rng.rand() < 0.5:  # a second ground behind a straight edge
        names.append(STUFF[rng.randint(len(STUFF))])
        angle = rng.uniform(0, 2 * math.pi)
        side = (x - SIZE / 2) * math.cos(angle) + (y - SIZE / 2) * math.sin(angle) > rng.uniform(-SIZE / 4, SIZE / 4)
        image[side] = _ground(rng, *names[1].split(), x, y)[side]
        mask[side] = CLASSES.index(names[1])
    placed = []
    for _ in range(rng.randint(1, max_things + 1)):
        for _ in range(10):  # a place where it hides others in part at most, else no further thing
            radius, angle = rng.uniform(9, 18), rng.uniform(-0.3, 0.3)  # pixels, radians: nearly upright
            cx, cy = rng.uniform(0.8 * radius, SIZE - 0.8 * radius, 2)
            if all(math.hypot(cx - ox, cy - oy) > 0.8 * (radius + other) for ox, oy, other in placed):
                break
        else:
            break
        placed.append((cx, cy, radius))
        names.append(THINGS[rng.randint(len(THINGS))])
        colour, shape = names[-1].split()
        paint = np.array(COLOURS[colour]) + rng.uniform(-0.1, 0.1, 3)
        reach = radius * 1.21  # only the box that can hold the object: a square reaches 1.2 radii
        box = (slice(max(int(2 * (cy - reach)), 0), int(2 * (cy + reach)) + 1),
               slice(max(int(2 * (cx - reach)), 0), int(2 * (cx + reach)) + 1))
        dx, dy = x[box] - cx, y[box] - cy
        u = (dx * math.cos(angle) + dy * math.sin(angle)) / radius
        v = (dy * math.cos(angle) - dx * math.sin(angle)) / radius
        inside = _inside(shape, u, v)
        image[box][inside] = (paint * (1 + 0.2 * u[..., None]))[inside]  # lit from one side
        mask[box][inside] = CLASSES.index(names[-1])
    image = (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2]) / 4 * rng.uniform(0.75, 1.2)
    image = image * 255 + rng.randint(-20, 21, image.shape)  # sensor noise
    visible = set(np.unique(mask[::2, ::2]))
    names = list(dict.fromkeys(n for n in names if CLASSES.index(n) in visible))
    return image.clip(0, 255).astype(np.uint8), mask[::2, ::2].copy(), names


def write(root, seed=0, train=TRAIN, val=VAL):
    """Writes the world under `root` in the layout of one's own data (see docs/data.md); the whole folder or nothing.

    Raises FileExistsError where something is there before it starts."""
    root = Path(root)
    if root.exists():
        raise FileExistsError(f"{root} is there already: take it away, or give another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    partial = root.with_name(f"{root.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "images").mkdir(parents=True)
    (partial / "masks").mkdir()
    rng = np.random.RandomState(seed)
    for split, count in (("train", train), ("val", val)):
        names = [f"{split}_{i:05d}" for i in range(count)]
        for name in names:
            image, mask, _ = draw(rng)
            Image.fromarray(image).save(partial / "images" / f"{name}.png", compress_level=1)
            pictures.save_mask(mask, partial / "masks" / f"{name}.png")
        (partial / f"{split}.txt").write_text("\n".join(names) + "\n")
    (partial / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    (partial / "unseen.txt").write_text("\n".join(unseen(seed)) + "\n")
    try:
        partial.rename(root)
    except OSError:  # another process was first: its world is the same
        shutil.rmtree(partial)


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
