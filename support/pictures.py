"""Drawing for all commands: label maps in colours, sheets of samples, a prediction over its picture, a run's curves.

Pictures are uint8 (3, H, W) tensors, labels uint8 (H, W) with 255 for no class. What is drawn is a Pillow image. Class
k has the same colour everywhere.
"""
import json
import math
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from support.checkpoint import atomic

MARK = "labelled by Chimera-Seg"  # in the files of predict.py, and in evaluate.py's label maps
SHORTEST, LONGEST = 640, 1600  # pixels of an overlay's longer side: text can be read, files stay small
PAINT = 0.5  # of the class's colour over the picture
LINES = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189))  # of the curves
PANELS = (("loss", "seg", "sgd", "sam"), ("hIoU", "mIoU_seen", "mIoU_unseen"), ("lr",), ("k",), ("norm",),
          ("clipped",))
PANEL = (560, 300)  # pixels


def palette():
    """255 colours, neither dark nor glaring, each as far as can be from all before it; then white."""
    level = np.linspace(40, 235, 9)
    free = np.stack(np.meshgrid(level, level, level), -1).reshape(-1, 3)
    free = free[(free.max(1) > 140) & (free.min(1) < 140) & (free.sum(1) < 540)]
    chosen, gap = [np.array((210, 55, 55))], np.inf
    while len(chosen) < 255:
        gap = np.minimum(gap, (free - chosen[-1]) ** 2 @ (2, 4, 3))  # the eye's weights of red, green and blue
        chosen.append(free[gap.argmax()])
    return np.array([*chosen, (255, 255, 255)]).round().astype(np.uint8)


COLOURS = palette()  # (256, 3); 255 is white


def coloured(labels):
    """Class indexes (H, W) -> picture (3, H, W)."""
    return torch.from_numpy(COLOURS)[labels.long()].permute(2, 0, 1)


def as_image(picture):
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def save(image, path, mark=""):
    info = PngInfo()
    if mark:
        info.add_text("Software", mark)
    atomic(path, lambda partial: image.save(partial, "PNG", pnginfo=info))


def ours(path):
    """Has this file the MARK? Only such files are replaced by label maps, and predict.py labels none of them."""
    return path.is_file() and MARK.encode() in path.open("rb").read(2000)


def foreign(path):
    return path.exists() and not ours(path)


def save_mask(mask, path, mark=""):
    """uint8 class indexes (H, W), tensor or array -> a PNG that holds them, with the colours as its palette."""
    image = Image.fromarray(np.asarray(mask))
    image.putpalette(COLOURS.tobytes())
    save(image, path, mark)


def percent(share):
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


# ---------------------------------------------------------------- text


def texts(names):
    """{class: name} -> the same in ASCII, all that Pillow's own font has: accents fall off."""
    return {k: unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().strip() or f"class {k}"
            for k, name in names.items()}


def write(pen, place, text, size, fill="black", anchor=None):
    pen.text(place, text, fill, ImageFont.load_default(size), anchor)


def length(text, size):
    return math.ceil(ImageFont.load_default(size).getlength(text))


def with_legend(canvas, entries, size):
    """Picture and {class: text} -> the picture, below it colours and texts in as many columns as fit its width."""
    column = max((length(text, size) for text in entries.values()), default=0) + 3 * size
    columns, line = max(canvas.width // column, 1), round(1.5 * size)
    rows = -(-len(entries) // columns)
    whole = Image.new("RGB", (max(canvas.width, column), canvas.height + rows * line + size), "white")
    whole.paste(canvas)
    pen = ImageDraw.Draw(whole)
    for i, (k, text) in enumerate(entries.items()):
        x, y = i // rows * column + size // 2, canvas.height + i % rows * line + size // 2
        pen.rectangle((x, y, x + size, y + size), fill=tuple(COLOURS[k]), outline="black")
        write(pen, (x + round(1.5 * size), y), text, size)
    return whole


# ---------------------------------------------------------------- samples and predictions


def sheet(rows, titles, names, side=192, gap=6):
    """Rows of pictures, `side` pixels wide, under one title per column; below them the colours of {index: name}."""
    sized = [[as_image(p).resize((side, min(max(round(side * p.shape[1] / p.shape[2]), 1), 3 * side)), Image.NEAREST)
              for p in row] for row in rows]
    heights = [max(image.height for image in row) + gap for row in sized]
    canvas, y = Image.new("RGB", ((side + gap) * len(titles) - gap, 20 + sum(heights)), "white"), 20
    for i, title in enumerate(titles):
        write(ImageDraw.Draw(canvas), (i * (side + gap) + 2, 3), title, 12)
    for row, height in zip(sized, heights):
        for i, image in enumerate(row):
            canvas.paste(image, (i * (side + gap), y))
        y += height
    return with_legend(canvas, {k: text[:26] for k, text in texts(names).items()}, 12)


def overlay(picture, labels, names):
    """The classes' colours over the picture, the name of each class where most of it is, shares in the legend.

    names: a text a class. Pixels of 255 keep the picture's own colours."""
    scale = min(max(*labels.shape, SHORTEST), LONGEST) / max(labels.shape)
    w, h = (max(round(side * scale), 1) for side in reversed(labels.shape))
    index = np.array(Image.fromarray(labels.numpy()).resize((w, h), Image.NEAREST))
    paint = Image.fromarray(np.uint8(255 * PAINT * (index != 255)))
    canvas = Image.composite(Image.fromarray(COLOURS[index]), as_image(picture).resize((w, h), Image.BICUBIC), paint)
    size = max(round(math.sqrt(h * w) / 38), 14)  # of the text, pixels
    share = torch.bincount(labels.flatten(), minlength=256) / labels.numel()
    found = sorted((k for k in range(len(names)) if share[k]), key=lambda k: -share[k])
    shown = texts({k: names[k] for k in found})
    for k, x, y in places(index, {k: (length(text, size) + size, 1.5 * size) for k, text in shown.items()}):
        dx, dy, light = (length(shown[k], size) + size) / 2, 0.75 * size, COLOURS[k] @ (0.3, 0.59, 0.11) > 120
        pen = ImageDraw.Draw(canvas)
        pen.rounded_rectangle((x - dx, y - dy, x + dx, y + dy), size // 3, fill=tuple(COLOURS[k]), outline="white")
        write(pen, (x, y), shown[k], size, fill="black" if light else "white", anchor="mm")
    if share[255]:
        found, shown = [*found, 255], {**shown, 255: "none of these"}
    return with_legend(canvas, {k: f"{shown[k]}  {percent(share[k])}" for k in found}, size)


def places(index, boxes):
    """Labels (h, w), {class: (width, height) of its name} -> [(class, x, y of the name's middle)], none overlapping.

    A name goes where its class fills most of its box, and is left out if no box is filled to 60 %."""
    step = -(-max(index.shape) // 160)  # pixels a cell of the grid on which this is done
    grid, found = torch.from_numpy(index[::step, ::step].copy()), []
    taken = torch.zeros(grid.shape, dtype=torch.bool)
    for k, (width, height) in boxes.items():
        rx, ry = math.ceil(width / 2 / step), math.ceil(height / 2 / step)
        own = F.pad((grid == k).float().masked_fill(taken, -1e3), (rx, rx, ry, ry), value=-1e3)
        share = F.avg_pool2d(own[None], (2 * ry + 1, 2 * rx + 1), 1)[0]  # of the class in a box around each cell
        if share.max() > 0.6:
            best = (share > share.max() - 1e-3).nonzero()  # (n, 2), of which the middle one is taken
            y, x = best[(best - best.float().mean(0)).square().sum(1).argmin()].tolist()
            taken[max(y - ry, 0):y + ry + 1, max(x - rx, 0):x + rx + 1] = True
            found.append((k, (x + 0.5) * step, (y + 0.5) * step))
    return found


# ---------------------------------------------------------------- a run


def curves(log):
    """log.jsonl -> losses (log scale), scores, learning rate and k over the steps, one panel each."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    # without zeros: a loss that is switched off is 0 throughout
    series = {key: [(line["step"], line[key]) for line in lines if line.get(key)] for keys in PANELS for key in keys}
    panels = [{key: series[key] for key in keys if series[key]} for keys in PANELS if any(map(series.get, keys))]
    last = max(line["step"] for line in lines) or 1
    canvas = Image.new("RGB", (2 * PANEL[0], PANEL[1] * -(-len(panels) // 2)), "white")
    for i, series in enumerate(panels):
        panel(canvas, i % 2 * PANEL[0], i // 2 * PANEL[1], series, last, log_scale="loss" in series)
    return canvas


def panel(canvas, left, top, series, last, log_scale):
    """One diagram of {name: [(step, value)]}; above it each name with its last value."""
    pen, f = ImageDraw.Draw(canvas), math.log10 if log_scale else float
    x0, y0, x1, y1 = left + 64, top + 40, left + PANEL[0] - 20, top + PANEL[1] - 36
    values = [value for points in series.values() for _, value in points]
    ticks = ([10.0 ** d for d in range(math.floor(f(min(values))), math.ceil(f(max(values)) + 1e-9) + 1)] if log_scale
             else round_steps(max(values)))
    low, high = f(ticks[0]), f(ticks[-1])

    def at(step, value):
        return x0 + (x1 - x0) * step / last, y1 - (y1 - y0) * (f(value) - low) / (high - low)

    for value in ticks:
        y = at(0, value)[1]
        pen.line((x0, y, x1, y), fill="lightgrey")
        write(pen, (x0 - 6, y), f"{value:g}", 13, anchor="rm")
    for step in round_steps(last):
        if step <= last:
            x = at(step, ticks[0])[0]
            pen.line((x, y1, x, y1 + 4), fill="black")
            write(pen, (x, y1 + 6), f"{step:g}", 13, anchor="mt")
    x = x0
    for colour, (name, points) in zip(LINES, series.items()):
        pen.line([at(*point) for point in points], fill=colour, width=2)
        end, y = at(*points[-1])
        pen.ellipse((end - 3, y - 3, end + 3, y + 3), fill=colour)
        text = f"{name} {points[-1][1]:.3g}"
        write(pen, (x, top + 14), text, 13, fill=colour)
        x += length(text, 13) + 18


def round_steps(high):
    """0 to about `high` in at most six equal steps of 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(high / 2))
    step = next(m * power for m in (1, 2, 5, 10) if high / (m * power) <= 6)
    return [round(i * step, 12) for i in range(math.ceil(high / step) + 1)]
