"""The README's figures, made from a run on the toy data set: results, what SGD selects, what the head says.

    python train.py                     # saves at step 500 and at the end
    python -m experiments.figures       # runs/toy -> assets/preview.png, selection.png and words.png
"""
import argparse
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import clip
import data
import losses
import model as models
from evaluate import open_run_dataset
from sources.files import read_image
from support import pictures
from support.checkpoint import read_checkpoint
from support.command import run_command
from toy import world
from train import start_adapter

ASSETS = Path(__file__).parent.parent / "assets"
SIDE, GAP, TEXT = 192, 8, 14  # pixels: of a picture, between two, of letters
RAMP = np.array([(247, 251, 255), (158, 202, 225), (33, 113, 181), (8, 48, 107)])  # pale to dark blue
EDGE = (230, 85, 13)  # around what is selected
IMAGES = (0, 4, 9)  # of the training list, whose selection is shown
WORDS = {"dog": "dog (seen)", "train": "train (unseen)", "octopus": "octopus (no class)"}
WORDS_SEED = 118  # a scene that has room for the three; chosen before any prediction was seen
TOP = 0.8  # cosine that is darkest


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


def students(run):
    """-> [(step, model)] at the start, at the save before the last one and at the end; config, teacher, data set."""
    last, former = (read_checkpoint(run / name) for name in ("last.pt", "former.pt"))
    config, teacher, stages = last["config"], clip.load(last["config"]["clip"]), []
    source = open_run_dataset(config)
    trainset = data.TrainSet(source, source.recipe.at_crop(config["crop"]), teacher.visual.input_size, config["seed"])
    for step, saved in ((0, None), (former["step"], former), (last["step"], last)):
        torch.manual_seed(config["seed"])
        model = models.build(teacher, **{name: config[name] for name in models.SETTINGS}).eval()
        if saved:
            model.load_trained_state(saved["model"])
        else:
            start_adapter(model.head.adapter, teacher, trainset, config["frozen_blocks"], torch.device("cpu"))
        stages.append((step, model))
    return stages, config, teacher, source


@torch.no_grad()
def selection(stages, config, teacher, source):
    """Three training images × (image, start, middle, end): a_i = z_i · c, the k selected positions outlined."""
    rows, titles = [], ["training image"]
    for i in IMAGES:
        image = read_image(source.train[i][1])[None]
        c = F.normalize(teacher.encode_image(image / 255), dim=1)
        row = [pictures.as_image(image[0])]
        for step, model in stages:
            a = torch.einsum("bdhw,bd->bhw", model(image / 255), c)
            inside = torch.ones(1, a[0].numel(), dtype=torch.bool)
            k = losses.k_at(min(step, config["steps"] - 1), config["steps"], inside, config["k_end"])
            row.append(heat(a[0], 0, TOP))
            outline(row[-1], losses.select(a.flatten(1), k, inside).view_as(a)[0] > 0)
            if not rows:
                titles.append(f"step {step}: {int(k)} of {inside.shape[1]}")
        rows.append(row)
    return grid(rows, titles)


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
    stages, config, teacher, source = students(args.run)
    pictures.save(selection(stages, config, teacher, source), ASSETS / "selection.png")
    pictures.save(words(stages[-1][1], scene(WORDS_SEED, *WORDS), WORDS, config["templates"]), ASSETS / "words.png")
    shutil.copy(args.run / "preview.png", ASSETS / "preview.png")
    print(f"wrote preview.png, selection.png and words.png into {ASSETS}")


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.figures", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/toy"), metavar="FOLDER", help="(default: runs/toy)")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
