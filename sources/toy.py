"""The toy data set: the scenes of emoji of toy/world.py, in the layout of own data."""
import contextlib

from sources.dataset import Recipe
from sources.files import DataError
from sources.folder import open_folder
from toy import world

TOY = Recipe(steps=300, batch_size=32, lr=3e-3, warmup=15, crop=world.SIZE, scale=(0.75, 1.5), jitter=False,
             body="small", clip="toy/clip.pt", short_side=world.SIZE, window=world.SIZE, stride=48)


def open_toy(root, name):
    if root == world.ROOT and not root.exists():
        print(f"drawing scenes of emoji into {root} …", flush=True)
        with contextlib.suppress(FileExistsError):  # another process was first: its world is the same
            world.write(root)
    source = open_folder(root, name, world.TEMPLATES, TOY)
    if source.classes != world.CLASSES:
        raise DataError(f"{root} was not drawn by this version: delete it, and `python -m toy.world --root {root} "
                        f"--seed N` draws world N again (data/toy is 0); to train on it as it is, use --dataset {root}")
    source.demo = (root / "demo.png", (*world.DEMO, *world.GROUNDS))
    return source
