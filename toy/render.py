"""Makes toy/sprites.png from toy/sprites.txt: draws the SVG files in Iconify's npm packages.

Only this file needs npm and resvg-py.

    npm pack @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 @iconify-json/fluent-emoji-flat@1.2.6
    pip install resvg-py==0.5.0
    python -m toy.render .         # the folder of the three .tgz files
"""
import argparse
import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

from toy.world import SHEET, SIDE, read_nouns

STYLES = {  # npm package: sha256 of its .tgz
    "noto-1.2.9": "3e918d88fc945c0bb3d468dbace6f88caef67f01c9f0e7bcae0915a042e8f1ad",  # Google, Apache-2.0
    "twemoji-1.2.5": "19046dff7d8707ce96212ec86468b36ac5f8e60409629dd13f809265c6d0ebb7",  # Twitter, CC-BY-4.0
    "fluent-emoji-flat-1.2.6": "7d064769dee690815f823bc5bcc511d957198caf9f5edd8dd9c1aa48a6aeb175"}  # Microsoft, MIT
COLUMNS = 12  # nouns a row
FINER = 4  # drawn this many times larger and averaged


def open_package(path, sha256):
    """.tgz of an Iconify package -> (icon names by code points, its icons.json)."""
    if hashlib.sha256(path.read_bytes()).hexdigest() != sha256:
        raise SystemExit(f"error: {path} is not the package that toy/sprites.png was made of (its sha256 differs)")
    with tarfile.open(path) as package:
        return [json.load(package.extractfile(f"package/{name}.json")) for name in ("chars", "icons")]


def render(icons, name):
    """An icon of the package -> float premultiplied RGBA (SIDE, SIDE, 4) in [0, 1]."""
    icon, side = icons["icons"][name], SIDE * FINER
    box = [{"width": 16, "height": 16, **icons, **icon}.get(key, 0) for key in ("left", "top", "width", "height")]
    svg = ('<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
           f'width="{side}" height="{side}" viewBox="{" ".join(map(str, box))}">{icon["body"]}</svg>')
    image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA")
    pixels = np.asarray(image, np.float64) / 255
    pixels = np.concatenate([pixels[..., :3] * pixels[..., 3:], pixels[..., 3:]], axis=-1)
    return pixels.reshape(SIDE, FINER, SIDE, FINER, 4).mean((1, 3))


def main(args):
    packages = [open_package(args.folder / f"iconify-json-{style}.tgz", sha256) for style, sha256 in STYLES.items()]
    cells = []
    for noun, emoji in read_nouns().items():
        codes = ["-".join(f"{ord(c):x}" for c in emoji if c not in without) for without in ("", "\ufe0f")]
        for style, (names, icons) in zip(STYLES, packages):
            name = next((names[code] for code in codes if code in names), None)
            if name is None:
                raise SystemExit(f"error: {style} has no {emoji} {noun}")
            cells.append(render(icons, name))
    cells = np.stack(cells)
    alpha = np.round(cells[..., 3:] * 17) / 17  # few levels of colour and opacity: half the file, no visible loss
    colour = np.round((cells[..., :3] / cells[..., 3:].clip(1e-6)).clip(0, 1) * 51) / 51
    cells = np.uint8(np.round(255 * np.concatenate([colour * (alpha > 0), alpha], axis=-1)))
    rows = cells.reshape(-1, COLUMNS * len(STYLES), SIDE, SIDE, 4).swapaxes(1, 2)
    Image.fromarray(rows.reshape(-1, COLUMNS * len(STYLES) * SIDE, 4)).save(SHEET, optimize=True)
    print(f"wrote {SHEET}: {len(cells)} cells, sha256 {hashlib.sha256(SHEET.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the three .tgz files")
    main(parser.parse_args())
