"""The emoji of the toy data set: 288 nouns in three styles with free licences, made by toy/render.py.

toy/sprites.txt has an emoji and its noun per line. The sheet toy/sprites.png has 12 nouns a row in the order of the
list, each in three neighbouring cells of 48 pixels, one a style.
"""
from pathlib import Path

import numpy as np
from PIL import Image

SIDE, STYLES = 48, 3  # pixels a side of a cell, cells of a noun
HERE = Path(__file__).parent
SHEET = HERE / "sprites.png"


def read_nouns():
    """-> {noun: emoji}, in the order of the sheet."""
    lines = (HERE / "sprites.txt").read_text(encoding="utf-8").splitlines()
    return {noun: emoji for emoji, noun in (line.split(" ", 1) for line in lines)}


def read_sheet():
    """-> {noun: uint8 RGBA (3 styles, SIDE, SIDE, 4)}"""
    sheet = np.asarray(Image.open(SHEET).convert("RGBA"))
    cells = sheet.reshape(len(sheet) // SIDE, SIDE, -1, SIDE, 4).swapaxes(1, 2)  # (rows, columns, SIDE, SIDE, 4)
    return dict(zip(read_nouns(), cells.reshape(-1, STYLES, SIDE, SIDE, 4)))
