"""What people see: label maps in colours, sheets of samples, a prediction over its picture, the curves of a run.

Pictures are uint8 (3, H, W) tensors, labels uint8 (H, W) with 255 for no class; what is drawn leaves as a Pillow image,
and its caller writes it. Class k has the same colour everywhere.
"""
import json
import math
import unicodedata

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

IGNORE = 255
LONGEST, SHORTEST = 1600, 640  # pixels of an overlay's long side: text stays legible, files stay small
PAINT = 0.5  # of the class's colour over the picture
LINES = ((214, 39, 40), (31, 119, 180), (44, 160, 44), (148, 103, 189))  # of the curves
PANELS = (("loss", "loss_seg", "loss_sgd", "loss_sam"), ("hIoU", "mIoU_seen", "mIoU_unseen"), ("lr",), ("k",))


def palette():
    """255 RGB triples, neither dark nor glaring; each is as far as can be from all before it."""
    level = np.linspace(40, 235, 9)
    free = np.stack(np.meshgrid(level, level, level), -1).reshape(-1, 3)
    free = free[(free.max(1) > 140) & (free.min(1) < 140) & (free.sum(1) < 540)]
    chosen, gap = [np.array((210, 55, 55))], np.inf
    while len(chosen) < IGNORE:
        gap = np.minimum(gap, (free - chosen[-1]) ** 2 @ (2, 4, 3))  # the eye's weights of red, green and blue
        chosen.append(free[gap.argmax()])
    return [tuple(colour) for colour in np.round(chosen).astype(int).tolist()]


COLOURS = palette() + [(255, 255, 255)]  # of class k; 255 is white


def coloured(labels):
    """Class indexes (H, W) -> picture (3, H, W)."""
    return torch.tensor(COLOURS, dtype=torch.uint8)[labels.long()].permute(2, 0, 1)


def save_mask(mask, path):
    """uint8 (H, W) array of class indexes -> palette PNG."""
    image = Image.fromarray(mask)
    image.putpalette([channel for colour in COLOURS for channel in colour])
    image.save(path, "PNG")


# ---------------------------------------------------------------- text


def write(pen, place, text, size, **how):
    """Pillow's own font has ASCII alone: accents fall off, a name without any of it becomes a ?."""
    pen.text(place, drawable(text), font=ImageFont.load_default(size), **how)


def drawable(text):
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip() or "?"


def length(text, size):
    return math.ceil(ImageFont.load_default(size).getlength(drawable(text)))


def with_legend(canvas, entries, size):
    """Picture and [(colour or None, text)] -> the picture with as many columns of them below as fit its width."""
    column = max([length(text, size) for _, text in entries], default=0) + 3 * size
    columns, line = max(canvas.width // column, 1), round(1.5 * size)
    rows = -(-len(entries) // columns)
    sheet = Image.new("RGB", (max(canvas.width, column), canvas.height + rows * line + size), "white")
    sheet.paste(canvas)
    pen = ImageDraw.Draw(sheet)
    for i, (colour, text) in enumerate(entries):
        x, y = i // rows * column + size // 2, canvas.height + i % rows * line + size // 2
        if colour:
            pen.rectangle((x, y + size // 6, x + size, y + size // 6 + size), fill=colour, outline="black")
        write(pen, (x + round(1.5 * size), y), text, size, fill="black")
    return sheet


# ---------------------------------------------------------------- samples and predictions


def sheet(rows, titles, shown, source, side=192):
    """Rows of pictures, one column a title -> a sheet with the `shown` classes' colours below; unseen ones have a *."""
    canvas = Image.new("RGB", (side * len(titles), 20), "white")
    for i, title in enumerate(titles):
        write(ImageDraw.Draw(canvas), (i * side + 4, 3), title, 12, fill="black")
    for row in rows:
        size = (side, max(round(side * row[0].shape[1] / row[0].shape[2]), 1))
        above, canvas = canvas, Image.new("RGB", (canvas.width, canvas.height + size[1] + 3), "white")
        canvas.paste(above)
        for i, tile in enumerate(row):
            canvas.paste(as_image(tile).resize(size, Image.NEAREST), (i * side, above.height))
    names = {k: name[:24] + " *" * (k in source.unseen) for k, name in enumerate(source.classes) if k in shown}
    return with_legend(canvas, [(COLOURS[k], name) for k, name in names.items()], 12)


def as_image(picture):
    return Image.fromarray(picture.permute(1, 2, 0).contiguous().numpy())


def overlay(picture, labels, names):
    """Picture and labels -> the classes' colours over the picture, names on the regions, shares in the legend.

    names   a text a class; pixels of 255 keep the picture's own colours"""
    scale = min(max(max(labels.shape), SHORTEST), LONGEST) / max(labels.shape)
    h, w = (max(round(side * scale), 1) for side in labels.shape)
    size = max(round(math.sqrt(h * w) / 38), 14)  # of the text, pixels
    paint = torch.from_numpy(np.array(as_image(picture).resize((w, h), Image.BICUBIC))).permute(2, 0, 1).float()
    index = F.interpolate(labels[None, None].float(), (h, w), mode="nearest-exact")  # (1, 1, h, w)
    reach = size // 14 * 2 + 1
    same = F.max_pool2d(index, reach, 1, reach // 2) == -F.max_pool2d(-index, reach, 1, reach // 2)
    share = torch.where(same, PAINT, 1.0)[0] * (index[0] != IGNORE)  # outlines are opaque
    index = index[0, 0].byte()
    paint += share * (coloured(index) - paint)
    canvas = as_image(paint.round().byte())
    pixels = torch.bincount(labels.flatten().long(), minlength=256).tolist()
    found = sorted((k for k in range(len(names)) if pixels[k]), key=lambda k: -pixels[k])
    for k, (x, y) in places(index, {k: (length(names[k], size) + size, round(1.5 * size)) for k in found}):
        chip(ImageDraw.Draw(canvas), x, y, names[k], size, COLOURS[k])
    entries = [(COLOURS[k], f"{names[k]}  {percent(pixels[k] / labels.numel())}") for k in found]
    if pixels[IGNORE]:
        entries.append((COLOURS[IGNORE], f"none of these  {percent(pixels[IGNORE] / labels.numel())}"))
    return with_legend(canvas, entries, size)


def percent(share):
    return f"{100 * share:.1f} %" if share >= 0.001 else "< 0.1 %"


def chip(pen, x, y, text, size, colour):
    """The text about the point (x, y), in black or white on a field of its class's colour."""
    dx, dy = (length(text, size) + size) / 2, 0.75 * size
    light = 0.3 * colour[0] + 0.59 * colour[1] + 0.11 * colour[2] > 120
    pen.rounded_rectangle((x - dx, y - dy, x + dx, y + dy), size // 3, fill=colour, outline="white")
    write(pen, (x, y), text, size, fill="black" if light else "white", anchor="mm")


def places(index, boxes):
    """Labels (h, w), {class: (width, height) of its name} -> [(class, (x, y) of the name's middle)], none overlapping.

    At most three names a class, each on a region of its own that fills most of the name's box, as far inside the
    region as can be."""
    step = -(-max(index.shape) // 160)  # pixels a cell of the grid that this is done on
    grid = Image.fromarray(index[::step, ::step].contiguous().numpy()).copy()  # a copy may be painted
    taken, found = torch.zeros(1, 1, grid.height, grid.width), []
    for k, (width, height) in boxes.items():
        rx, ry = math.ceil(width / 2 / step), math.ceil(height / 2 / step)

        def share(of, times=1, rx=rx, ry=ry):  # of a box about each cell
            rx, ry = times * rx, times * ry
            return F.avg_pool2d(F.avg_pool2d(of, (2 * ry + 1, 1), 1, (ry, 0)), (1, 2 * rx + 1), 1, (0, rx))

        free = (share(torch.ones_like(taken)) > 0.999)
        for _ in range(3):
            mask = torch.from_numpy(np.array(grid) == k).float()[None, None]
            fits = (share(mask) > 0.6) & free & (share(taken) < 1e-6)
            if not fits.any():
                break
            depth = torch.where(fits, share(mask) + share(mask, 2) + share(mask, 3), -1.0)[0, 0]
            best = (depth > depth.max() - 1e-3).nonzero()  # (n, 2)
            y, x = best[(best - best.float().mean(0)).square().sum(1).argmin()].tolist()
            found.append((k, ((x + 0.5) * step, (y + 0.5) * step)))
            taken[..., y - ry:y + ry + 1, x - rx:x + rx + 1] = 1
            inside = mask[0, 0].nonzero()  # (n, 2)
            near = inside[(inside - torch.tensor([y, x])).abs().sum(1).argmin()]
            ImageDraw.floodfill(grid, (int(near[1]), int(near[0])), IGNORE)  # this region has its name
    return found


# ---------------------------------------------------------------- a run


def curves(log):
    """log.jsonl -> losses (log scale), scores, learning rate and k over the steps, one panel each."""
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    panels = []
    for keys in PANELS:
        series = {key: [(line["step"], line[key]) for line in lines if line.get(key) and math.isfinite(line[key])]
                  for key in keys}  # a loss that is switched off is 0 throughout
        if series := {key: points for key, points in series.items() if points}:
            panels.append(series)
    last = max((line["step"] for line in lines), default=0) or 1
    canvas = Image.new("RGB", (2 * 560, 300 * -(-len(panels) // 2) or 1), "white")
    for i, series in enumerate(panels):
        panel(canvas, i % 2 * 560, i // 2 * 300, series, last, log_scale="loss" in series)
    return canvas


def panel(canvas, left, top, series, last, log_scale):
    """One diagram of 560 × 300 pixels: {name: [(step, value)]}; above it each name with its last value."""
    pen, size = ImageDraw.Draw(canvas), 13
    x0, y0, x1, y1 = left + 64, top + 40, left + 540, top + 264
    values = [value for points in series.values() for _, value in points]
    low, high = (min(values), max(values)) if log_scale else (0, max(values))
    ticks = scale(low, high, log_scale)
    f = math.log if log_scale else float
    low, high = f(min(ticks[0], low)), f(max(ticks[-1], high))

    def at(step, value):
        return x0 + (x1 - x0) * step / last, y1 - (y1 - y0) * (f(value) - low) / (high - low)

    for value in ticks:
        y = at(0, value)[1]
        pen.line((x0, y, x1, y), fill="lightgrey")
        write(pen, (x0 - 6, y), f"{value:g}", size, fill="black", anchor="rm")
    for step in scale(0, last, False):
        if step <= last:
            x = at(step, math.exp(low) if log_scale else low)[0]
            pen.line((x, y1, x, y1 + 4), fill="black")
            write(pen, (x, y1 + 6), f"{step:g}", size, fill="black", anchor="mt")
    x = x0
    for colour, (key, points) in zip(LINES, series.items()):
        places = [at(*point) for point in points]
        pen.line(places, fill=colour, width=2)
        if len(points) < 20:
            for px, py in places:
                pen.ellipse((px - 3, py - 3, px + 3, py + 3), fill=colour)
        text = f"{key} {points[-1][1]:.3g}"
        write(pen, (x, top + 14), text, size, fill=colour)
        x += length(text, size) + 18


def scale(low, high, log_scale):
    """Round values from low to about high: 1, 2, 5 times powers of ten, or equal steps of such a size."""
    if log_scale:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        every = [m * 10.0 ** d for d in decades for m in (1, 2, 5)]
        inside = [v for v in every if low <= v <= high]
        return inside if len(inside) > 1 else [max(v for v in every if v <= low), min(v for v in every if v > high)]
    step = 10.0 ** math.floor(math.log10((high - low) / 2 or 1))
    step *= next((m for m in (1, 2, 5) if (high - low) / (m * step) <= 6), 10)
    return [round(i * step, 12) for i in range(math.ceil((high - low) / step) + 1)]
