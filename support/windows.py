"""Labels whole pictures. A function images -> logits sees them window by window, each as large as a training crop.

    picture (3, H, W) -> resized for the test (3, h, w) -> windows -> logits of each window, on a coarse grid
    -> bilinear to the window's pixels -> their mean where windows overlap -> bilinear to (H, W) -> the best class

Symbols: K classes, G label maps of one picture, H×W its pixels, h×w its pixels at the size of the test.
"""
import torch
import torch.nn.functional as F

from support import UserError

IGNORE = 255  # no class
ENLARGED = 8  # times at most: limits the memory that a very thin picture needs
WINDOWS = {"cpu": 2, "cuda": 16}  # that the function sees at a time. A GPU is faster with many, a CPU is not
HELD = {"cpu": 2**17, "cuda": 2**26}  # logits of pixels in memory at a time: all K of a large picture may not fit


@torch.inference_mode()
def label(logits, pictures, short_side, window, stride, lower_by, least=-torch.inf):
    """Pictures, uint8 (3, H, W) of any sizes -> their label maps, uint8 (G, H, W) each, IGNORE where no class is.

    logits      function: (B, 3, h, w) in [0, 1] -> (B, K, h', w'), on the device of `lower_by`
    short_side  pixels, to which the pictures are resized. window, stride: pixels of that size
    lower_by    (G, K), what is taken off the classes' logits; each of the G rows gives one label map
    least       pixels whose best class has a lower logit (nothing taken off) get no class
    Raises UserError."""
    if short_side < 1 or not 0 < stride <= window:
        raise UserError(f"a short side of {short_side} pixels, windows of {window} every {stride}: expected 1 or more, "
                        "and 0 < stride ≤ window")
    if lower_by.is_cuda:  # on MPS the CPU resizes: there the antialiased resize is missing before torch 2.7
        pictures = [picture.to(lower_by.device, non_blocking=True) for picture in pictures]
    resized = [resize(picture, short_side) for picture in pictures]
    places = [cover(*small.shape[1:], window, stride) for small in resized]  # the windows of each picture
    crops = [small[:, rows, columns] for small, windows in zip(resized, places) for rows, columns in windows]
    grids = iter(in_batches(logits, crops, lower_by.device))  # in the order of the crops
    maps = []
    for picture, small, windows in zip(pictures, resized, places):
        of_picture = [next(grids) for _ in windows]
        maps.append(torch.stack([best_class(of_picture, windows, small.shape[1:], picture.shape[1:], off, least)
                                 for off in lower_by]))
    return maps


def resize(picture, short_side):
    """uint8 (3, H, W) -> float (3, h, w) in [0, 1], where the picture lies."""
    H, W = picture.shape[1:]
    factor = min(short_side / min(H, W), ENLARGED)
    size = max(round(H * factor), 1), max(round(W * factor), 1)
    picture = picture[None].float().div_(255)
    return F.interpolate(picture, size, mode="bilinear", antialias=True)[0] if factor != 1 else picture[0]


def cover(h, w, window, stride):
    """The windows that cover h×w pixels, as [(slice of the rows, slice of the columns)]; the last is pushed inside."""
    tops, lefts = ([*range(0, size - window, stride), max(size - window, 0)] for size in (h, w))
    return [(slice(top, top + window), slice(left, left + window)) for top in tops for left in lefts]


def in_batches(logits, crops, device):
    """The logits of each crop (K, h', w'). Crops of one size are seen together, of several pictures too."""
    most, found = WINDOWS.get(device.type, WINDOWS["cpu"]), [None] * len(crops)
    for size in {crop.shape for crop in crops}:
        same = [i for i, crop in enumerate(crops) if crop.shape == size]
        for first in range(0, len(same), most):
            batch = same[first:first + most]
            for i, grid in zip(batch, logits(torch.stack([crops[i] for i in batch]).to(device))):
                found[i] = grid
    return found


def best_class(grids, places, size, out, off, least):
    """Logits (K, h', w') of the windows at these places of (h, w) = `size` pixels -> labels (H, W) = `out`. off (K,)

    As many classes at a time as HELD allows, of which the best is kept: logits (K, H, W) are never held in full."""
    device, at_once = off.device, max(HELD.get(off.device.type, HELD["cpu"]) // max(size.numel(), out.numel()), 1)
    best, labels = torch.full(out, -torch.inf, device=device), torch.zeros(out, dtype=torch.uint8, device=device)
    count = torch.zeros(size, device=device)  # of the windows that see a pixel
    for place in places:
        count[place] += 1
    for first in range(0, len(off), at_once):
        some = slice(first, first + at_once)
        mean = blend([grid[some] - off[some, None, None] for grid in grids], places, count)
        if size != out:
            mean = F.interpolate(mean[None], out, mode="bilinear")[0]  # (classes at once, H, W)
        top, k = mean.max(0) if len(mean) > 1 else (mean[0], 0)  # the same for one class, but faster
        labels = torch.where(top > best, first + k, labels)
        best = torch.maximum(best, top)
    if least > -torch.inf:
        labels = torch.where(best + off[labels.long()] < least, IGNORE, labels)
    return labels.byte()


def blend(grids, places, count):
    """Values (k, h', w') of windows -> their mean at each pixel, (k, h, w). count (h, w): windows that see a pixel."""
    total = torch.zeros(len(grids[0]), *count.shape, device=count.device)
    for grid, place in zip(grids, places):
        total[:, *place] += F.interpolate(grid[None], count[place].shape, mode="bilinear")[0]
    return total / count
