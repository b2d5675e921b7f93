"""Data sets by name. One file per data set says where it is, what its mask values mean and how it is fetched.

    toy.py  folder.py (own data)  voc.py  coco_stuff.py  context.py
    dataset.py    what all of them are: Recipe, DataSource
    files.py      lists, images and masks as people have them
    download.py   archives; matlab.py: SBD's masks
    check.py      the command python data.py
"""
from pathlib import Path

from losses import IGNORE
from sources import coco_stuff, context, voc
from sources.dataset import DataSource, Recipe, places, plain, without_unseen
from sources.download import workshop
from sources.files import INVALID, DataError
from sources.folder import open_folder
from sources.toy import open_toy

__all__ = ["IGNORE", "INVALID", "NAMES", "DataError", "DataSource", "Recipe", "download_dataset", "open_dataset",
           "plain", "without_unseen"]
OPENED = {"toy": open_toy, "voc": voc.open_voc, "coco-stuff": coco_stuff.open_coco_stuff,
          **dict.fromkeys(context.SPLITS, context.open_context)}
FETCHED = {"voc": voc, "coco-stuff": coco_stuff}
NAMES = tuple(OPENED)


def open_dataset(name, root=None):
    """One of NAMES, or the path of a folder of own data -> DataSource. Raises DataError.

    root: by default data/NAME; toy's default alone is drawn where it is missing. context has ZS3Net's ten unseen
    classes, context-cascade-clip Cascade-CLIP's."""
    root = Path(root or default_root(name))
    if name not in OPENED and not root.is_dir():
        raise DataError(f"{name} is no data set, and there is no folder {root}: expected {', '.join(NAMES)}, or a "
                        "folder of own data (docs/data.md)")
    return OPENED.get(name, open_folder)(root, str(name))


def default_root(name):
    if name in context.SPLITS:
        return Path("data/context")
    return Path("data", name) if name in NAMES else Path(name)


def download_dataset(name, root=None):
    """Brings what is missing of a benchmark's files. Raises DataError."""
    if name not in FETCHED:
        raise DataError(f"--download is for {' and '.join(FETCHED)}, not for {name}: see docs/data.md")
    root, module = Path(root or default_root(name)), FETCHED[name]
    whole = all(place.exists() for place in places(root, module.INSIDE, module.TREE).values())
    if whole and not (root / ".download").exists():  # of a killed call
        print(f"{name}: {root} has all its files, nothing to fetch", flush=True)
    else:
        with workshop(root) as folder:
            module.download(root, folder)
