"""README's figures from a run on the toy data set: its predictions, what SGD selects, what the head says of words.

    python train.py && python -m experiments.figures    # assets/preview.png, selection.png, words.png; 10 s
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import clip
import losses
import model as models
from evaluate import load_run, open_run_dataset
from sources.files import read_pair
from support import pictures
from support.checkpoint import find_checkpoint
from support.command import run_command
from toy import world

ASSETS = Path(__file__).parent.parent / "assets"
SIDE, GAP, TEXT = 192, 8, 14  # pixels: of a picture, between two, of letters
RAMP = np.array([(247, 251, 255), (158, 202, 225), (33, 113, 181), (8, 48, 107)])  # pale to dark blue
EDGE = (230, 85, 13)  # around what is selected
IMAGES = (0, 4, 9)  # of the training list, whose selection is shown
WORDS = {"dog": "dog (seen)", "train": "train (unseen)", "octopus": "octopus (no class)"}
WORDS_SEED = 118  # a scene that has room for the three; chosen before any prediction was seen
TOP = 0.8  # cosine with a word that is darkest


def heat(values, low, high):
    """(h, w) -> a Pillow image, SIDE pixels a side: RAMP from `low` to `high`, a square a position."""
    place = ((values - low) / (high - low)).clamp(0, 1).numpy() * (len(RAMP) - 1)
    colours = np.stack([np.interp(place, range(len(RAMP)), RAMP[:, i]) for i in range(3)], -1).astype(np.uint8)
    return Image.fromarray(colours).resize((SIDE, SIDE), Image.NEAREST)


def outline(image, chosen):
    """Draws EDGE along the inside of the chosen positions, bool (h, w)."""
    chosen = F.interpolate(chosen[None, None].float(), (SIDE, SIDE))
    edge = chosen + F.max_pool2d(-F.pad(chosen, (2, 2, 2, 2)), 5, 1)  # without what is 2 pixels inside
    image.paste(EDGE, mask=Image.fromarray((255 * edge[0, 0]).byte().numpy()))


def grid(rows, titles):
    """Rows of Pillow images, a title above each column."""
    canvas = Image.new("RGB", ((SIDE + GAP) * len(titles) - GAP, 24 + (SIDE + GAP) * len(rows) - GAP), "white")
    for j, title in enumerate(titles):
        pictures.write(ImageDraw.Draw(canvas), (j * (SIDE + GAP), 3), title, TEXT)
        for i, row in enumerate(rows):
            canvas.paste(row[j].resize((SIDE, SIDE), Image.NEAREST), (j * (SIDE + GAP), 24 + i * (SIDE + GAP)))
    return canvas


@torch.no_grad()
def selection(teacher, files, table, size, steps, k_end):
    """Training images, a row each: image, truth, and the teacher's a with its k(t) positions outlined at the first, the
    middle and the last step. table: DataSource's; size (h, w): the student's positions."""
    rows, inside = [], torch.ones(1, *size, dtype=torch.bool)  # no padding in a whole image
    ks = {step: losses.k_at(step, steps, inside, k_end) for step in (0, steps // 2, steps - 1)}  # each (1,)
    for file in files:
        _, image, labels = read_pair(file, table, len(table))
        c, d = (F.normalize(x, dim=-1) for x in teacher.visual.cls_and_patches(image[None] / 255))
        a = losses.at_positions(losses.teacher_similarity(c, d), inside)  # (1, N)
        row = [pictures.as_image(image), pictures.as_image(pictures.coloured(labels))]
        for k in ks.values():
            row.append(heat(a.view(size), a.min(), a.max()))
            outline(row[-1], losses.select(a, k, inside).view(size) > 0)
        rows.append(row)
    return grid(rows, ["training image", "truth",
                       *(f"step {step}: {int(k)} of {inside.numel()}" for step, k in ks.items())])


@torch.no_grad()
def words(model, image, titles, templates):
    """image uint8 (3, H, W) and {word: title} -> the image and the cosine of its dense features with each word."""
    t = models.text_embeddings(model.clip[0], list(titles), templates)
    cosines = torch.einsum("bdhw,kd->kbhw", model.eval()(image[None] / 255), t)[:, 0]
    row = [pictures.as_image(image), *(heat(cosine, 0, TOP) for cosine in cosines)]
    return grid([row], ["image", *titles.values()])


def scene(seed, *nouns):
    """-> uint8 (3, 64, 64), a scene of these emoji"""
    return torch.from_numpy(world.draw(np.random.RandomState(seed), nouns=nouns)[0]).permute(2, 0, 1)


def main(args):
    run = args.run or find_checkpoint().parent
    model, config = load_run(run / "last.pt", torch.device("cpu"))
    source, teacher = open_run_dataset(config), clip.load(config["clip"])
    size = model(torch.zeros(1, 3, config["crop"], config["crop"])).shape[2:]
    files, table = [source.train[i] for i in IMAGES], source.table(training=False)
    pictures.save(selection(teacher, files, table, size, config["steps"], config["k_end"]), ASSETS / "selection.png")
    pictures.save(words(model, scene(WORDS_SEED, *WORDS), WORDS, config["templates"]), ASSETS / "words.png")
    shutil.copy(run / "preview.png", ASSETS / "preview.png")
    print(f"wrote preview.png, selection.png and words.png into {ASSETS}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, metavar="FOLDER", help="(default: the newest)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
