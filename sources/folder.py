"""Own data: a folder of images and masks.

    root/images/NAME.jpg|png    root/masks/NAME.png (index into classes.txt, 255 = no class)
    root/train.txt  root/val.txt (a NAME a line)    root/classes.txt  root/unseen.txt (class names a line)
"""
from sources.dataset import PROTOCOL, DataSource, Recipe
from sources.files import IMAGES, INVALID, MASKS, DataError, list_files, pair_up, plain_spaces, read_lines, short

FOLDER = Recipe(steps=20000)  # OURS: as VOC
TEMPLATES = tuple(PROTOCOL["coco-stuff"]["templates"])


def open_folder(root, name, templates=TEMPLATES, recipe=FOLDER):
    classes = read_lines(root / "classes.txt", classes=True)
    if len(classes) > INVALID:
        raise DataError(f"{root}/classes.txt has {len(classes)} lines, expected one for each class, {INVALID} at most "
                        "(masks have 8 bits)")
    unseen = [*map(plain_spaces, read_lines(root / "unseen.txt"))] if (root / "unseen.txt").exists() else []
    if unknown := [c for c in unseen if c not in classes]:
        raise DataError(f"{root}/unseen.txt names {short(unknown[0])}, which is not a line of classes.txt: copy the "
                        "whole line from there, synonyms included")
    images, masks = list_files(root / "images", IMAGES), list_files(root / "masks", MASKS)
    lists = root / "train.txt", root / "val.txt"
    splits = [pair_up(read_lines(path), images, masks, path, own=True) for path in lists]
    return DataSource(name, classes, {classes.index(c) for c in unseen},
                      {k: k for k in range(len(classes))}, *splits, templates, recipe)
