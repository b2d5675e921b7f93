"""A trained run labels whole pictures: the model from its checkpoint, sliding windows, argmax over all classes.

Test needs the body, the head and cached text embeddings; CLIP's image tower beyond the head's blocks is dropped.
Symbols: K classes, H×W pixels, h×w the dense grid.
"""
import os
from pathlib import Path

import torch
import torch.nn.functional as F

import bodies
import clip
import model as models
import sources
from support.checkpoint import from_first_process, read_checkpoint
from losses import linear_weights
from sources import IGNORE

ENLARGED = 8  # times, at most: a strip of a picture would else need any amount of memory
BLOCK = {"cpu": 64, "cuda": 512}  # pixels a side that are labelled at a time: in a cache, or in few launches


def load_run(checkpoint, device, clip_file=None):
    """last.pt -> (model in eval mode without CLIP's image tower, config, γ or None). Raises ModelError, CLIPError.

    clip_file: where the run's CLIP lies now, by default where it lay in training."""
    saved = from_first_process(lambda: read_checkpoint(checkpoint))
    config = saved["config"]
    clip_file = clip_file or config["clip"]
    clip_model = clip.load(clip_file)
    if clip.fingerprint(clip_model) != config["clip_hash"]:
        raise bodies.ModelError(f"{clip_file} is not the CLIP that {checkpoint} was trained with: give --clip")
    model = models.build(clip_model, **{**config, "body_weights": "none"})
    del clip_model.visual  # what the head needs of it, it has copied
    model.load_trained_state(saved["model"])
    return model.to(device).eval(), config, saved["gamma"]


def trained_on(config, classes):
    """[bool], the classes that the run had masks of; on another list than its own, those that share a word with one."""
    if list(classes) == config["classes"]:
        return [k not in config["unseen"] for k in range(len(classes))]
    words = {sources.plain(word) for k, name in enumerate(config["classes"]) if k not in config["unseen"]
             for word in name.split(",")}
    return [any(sources.plain(word) in words for word in name.split(",")) for name in classes]


def open_run_dataset(config, name=None, root=None):
    """The run's own data set, or another: with the sizes, prompts and unseen classes of the run's training.

    Raises DataError."""
    own = None if name else config["data_root"]
    if own and not root and not Path(own).is_dir():
        raise sources.DataError(f"the run's data set is no longer in {own}: give --data-root")
    source = sources.open_dataset(name or config["dataset"], root or own)
    source.recipe, source.templates = source.recipe.at_crop(config["crop"]), tuple(config["templates"])
    source.unseen = {k for k, trained in enumerate(trained_on(config, source.classes)) if not trained}
    return source


def pick_device(name=None):
    """cpu, or this process's GPU."""
    name = str(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    if name.split(":")[0] not in BLOCK:
        raise bodies.ModelError(f"--device {name}: expected cpu or cuda")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise bodies.ModelError("--device cuda, but PyTorch finds no GPU that it can use: leave --device away")
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", device.index or 0)))
        torch.cuda.set_device(device)
    return device


def windows(size, window, stride):
    """Starts of the windows that cover `size` pixels; the last one is pushed back inside."""
    if size <= window:
        return [0]
    return [*range(0, size - window, stride), size - window]


def axis_weights(size, window, stride, cells, out):
    """(out, n · cells): takes one axis of n windows' grids, end to end, to `out` pixels.

    Bilinear in each window of `size` pixels' n, their mean where they overlap, bilinear to `out`; rows ≥ 0, sum 1."""
    parts = []
    for start in windows(size, window, stride):
        part = torch.zeros(size, cells, dtype=torch.double)
        part[start:start + window] = linear_weights(cells, min(window, size))
        parts.append(part)
    weights = torch.cat(parts, dim=1)
    weights /= weights.sum(1, keepdim=True)
    return weights if out == size else F.interpolate(weights.T[None], out, mode="linear")[0].T


def side_at_test(image, sides):
    """Picture (3, H, W) -> the short side at which it is labelled: nearest its own between `sides`, the least and the
    largest that training has shown."""
    short, (low, high) = min(image.shape[1:]), sides
    return min(max(short, min(low, ENLARGED * short)), high)


@torch.inference_mode()
def predict(model, image, seen, gammas=(0.0,), short_side=None, window=512, stride=426, out_size=None,
            floor=-torch.inf):
    """uint8 image (3, H, W) -> {γ: int64 label map (H, W)}, argmax over all classes of logit − γ·[class is seen].

    seen    bool (K,), the classes that γ lowers (γ in logits)
    floor   where the winner's logit, γ not taken off, is lower, the label is IGNORE
    Windows' logits are averaged where they overlap; bilinear to `out_size`, the image's own size by default.

    All that is linear, and along each axis apart, so a score is a mean of grid logits with weights ≥ 0. In a block of
    pixels it lies between the least and the largest logit that reach the block; a class whose largest is below another
    one's least wins nowhere in it and is left out there. No approximation, and no (K, H, W) in memory."""
    H, W = out_size or image.shape[1:]
    image = image.float()[None] / 255
    if short_side and short_side != min(image.shape[2:]):
        factor = short_side / min(image.shape[2:])
        size = [round(side * factor) for side in image.shape[2:]]
        image = F.interpolate(image, size, mode="bilinear", align_corners=False, antialias=True)
    h, w = image.shape[2:]
    bands = []
    for top in windows(h, window, stride):
        band = image[:, :, top:top + window]
        band = model.logits(torch.cat([band[..., left:left + window] for left in windows(w, window, stride)])).float()
        bands.append(torch.cat(list(band), dim=2))
    logits = torch.cat(bands, dim=1)  # (K, Σh, Σw): the windows' grids side by side
    rows = axis_weights(h, window, stride, band.shape[2], H).to(logits)  # (H, Σh)
    columns = axis_weights(w, window, stride, band.shape[3], W).to(logits)  # (W, Σw)

    labels = {gamma: torch.empty(H, W, dtype=torch.long, device=logits.device) for gamma in gammas}
    side = BLOCK[logits.device.type]
    for y in range(0, H, side):
        r = rows[y:y + side]
        strip, r = logits[:, r.any(0)], r[:, r.any(0)]
        for x in range(0, W, side):
            c = columns[x:x + side]
            part, c = strip[:, :, c.any(0)], c[:, c.any(0)]  # (K, i, j): what reaches this block
            largest, least = part.amax((1, 2)), part.amin((1, 2))
            loses = torch.stack([largest - gamma * seen < (least - gamma * seen).max() for gamma in gammas])
            k = (~loses.all(0)).nonzero()[:, 0]  # (K',); all, where logits are not finite
            tall = r @ part[k]  # (K', y, j)
            scores = c @ tall.permute(1, 2, 0)  # (y, x, K')
            for gamma, label in labels.items():
                winner = (scores - gamma * seen[k]).argmax(2, keepdim=True)  # (y, x, 1)
                below = scores.gather(2, winner) < floor
                label[y:y + side, x:x + side] = k[winner].masked_fill(below, IGNORE)[..., 0]
    return labels
