"""The segmenter: a trainable body, a head into CLIP's joint space, and frozen text embeddings as the classifier.

    images (B, 3, H, W) in [0, 1] -> body (B, C, h, w) -> head z (B, D, h, w);  logits = z · t / τ

Symbols: B images, C body channels, D joint width, K classes, h×w the dense grid.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
from bodies import ModelError, build_body
from clip_head import CSH, LinearHead, RandomHead
from losses import IGNORE, pixel_text_logits
from support.archive import misfit
from support.checkpoint import read_checkpoint
from support.processes import autocast, from_first

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENLARGED = 8  # times, at most, before the test: otherwise a very thin image needs unbounded memory


def bands(logits, size):
    (H, W), (B, K) = size, logits.shape[:2]
    height = max(2**21 // (B * K * W), 1)
    return [slice(y, min(y + height, H)) for y in range(0, H, height)]


@torch.no_grad()
def text_embeddings(clip_model, names, templates):
    """Class names -> t (K, D), unit length. Each template's embedding is normalised, their mean normalised again. FIELD

    Synonyms in a name are separated by commas and averaged as templates are; underscores are read as spaces."""
    t = []
    for name in names:
        words = [" ".join(word.replace("_", " ").split()) for word in name.split(",") if word.strip()]
        tokens = clip.tokenize([template.replace("{}", word) for word in words for template in templates],
                               clip_model.context_length)  # (P, 77)
        each = clip_model.encode_text(tokens.to(clip_model.text_projection.device)).float()  # (P, D)
        t.append(F.normalize(F.normalize(each, dim=-1).mean(0), dim=-1))
    return torch.stack(t)


class ChimeraSeg(nn.Module):
    """body + head + text embeddings `t` (K, D), a buffer that `set_classes` fills and may fill again at any time."""

    def __init__(self, body, head, clip_model, tau):
        super().__init__()
        self.body, self.head, self.tau = body, head, tau
        self.clip = [clip_model]  # in a list it is no submodule: not trained, not saved
        self.register_buffer("t", torch.empty(0), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def set_classes(self, names, templates):
        """The classes that `logits` tells apart from now on: K names, each put into every template."""
        self.t = text_embeddings(self.clip[0], names, templates).to(self.mean.device)

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> dense features z (B, D, h, w), unit length over D."""
        return self.head(self.body((images - self.mean) / self.std))

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, K, h, w) at the dense grid: cosine / τ. In fp32, also under autocast."""
        z = self(images)
        with torch.autocast(z.device.type, enabled=False):
            return pixel_text_logits(z, self.t, self.tau)

    @torch.inference_mode()
    def label(self, image, short_side, window, stride, lowered=None, threshold=-1.0, precision="fp32"):
        """Labels a whole image: sliding windows, logits averaged where they overlap, argmax at its own size.

        image       uint8 (3, H, W); resized to `short_side` for the test. window, stride: pixels of that size
        lowered     (G, K), what is subtracted from the logits: one label map for each of the G rows; default 0
        threshold   pixels whose best cosine is lower get no label
        precision   bf16 or fp32, of body and head; everything after them is fp32
        -> uint8 (G, H, W), IGNORE = no label; (K, H, W) logits are never stored in full
        """
        if lowered is None:
            lowered = torch.zeros(1, len(self.t), device=self.t.device)
        H, W = image.shape[1:]
        factor = min(short_side / min(H, W), ENLARGED)
        h, w = max(round(H * factor), 1), max(round(W * factor), 1)
        image = image.to(self.mean.device)[None].float() / 255
        if factor != 1:
            image = F.interpolate(image, (h, w), mode="bilinear", align_corners=False, antialias=True)
        strips = []
        for top in starts(h, window, stride):
            crops = [image[..., top:top + window, left:left + window] for left in starts(w, window, stride)]
            with autocast(image.device, precision):
                strips.append(torch.cat(list(self.logits(torch.cat(crops))), dim=2))  # (K, h', number of windows · w')
        grids = torch.cat(strips, dim=1)  # (K, Σh', Σw'): the windows' grids side by side
        down = axis_weights(h, window, stride, grids.shape[1], H).to(grids)  # (H, Σh')
        across = axis_weights(w, window, stride, grids.shape[2], W).to(grids)  # (W, Σw')
        labels = torch.empty(len(lowered), H, W, dtype=torch.uint8, device=image.device)
        for rows in bands(grids[None], (H, W)):
            reach = down[rows].any(0)  # the few grid rows that these pixels depend on
            logits = torch.einsum("yi,kij->ykj", down[rows][:, reach], grids[:, reach]) @ across.T  # (rows, K, W)
            for g, off in enumerate(lowered):
                winner = (logits - off[:, None]).argmax(1, keepdim=True)
                if threshold > -1:
                    winner = winner.masked_fill(logits.gather(1, winner) < threshold / self.tau, IGNORE)
                labels[g, rows] = winner[:, 0].byte()
        return labels

    def trained_state(self):
        """State dict without the head's frozen tail, which comes from CLIP's own file (or from a seed)."""
        frozen = {name for name, p in self.named_parameters() if name.startswith("head.tail.") and not p.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state):
        if wrong := misfit(state, self.trained_state()):
            raise ModelError(f"the checkpoint is of another body or head: {wrong}")
        self.load_state_dict(state, strict=False)


def starts(size, window, stride):
    """Where the windows begin that cover `size` pixels; the last one is pushed back inside."""
    return [0] if size <= window else [*range(0, size - window, stride), size - window]


def axis_weights(size, window, stride, cells, out):
    """Matrix (out, cells): maps one axis of all windows' grids, concatenated to `cells` values, to `out` pixels.

    Bilinear in each window of an image of `size` pixels, their mean where they overlap, bilinear to `out`."""
    weights, begins = torch.zeros(size, cells), starts(size, window, stride)
    cells = cells // len(begins)  # of one window
    for start, part in zip(begins, weights.split(cells, dim=1)):
        part[start:start + window] = F.interpolate(torch.eye(cells)[None], min(window, size), mode="linear")[0].T
    weights /= weights.sum(1, keepdim=True)
    return F.interpolate(weights.T[None], out, mode="linear")[0].T


def build(clip_model, *, body="small", body_weights="default", head="csh", head_attention="clip", frozen_blocks=1):
    """The segmenter from plain values.

    body            a name of bodies.BODIES, or any nn.Module: ImageNet-normalised (B, 3, H, W) -> (B, C, h, w), with
                    out_channels = C
    head            csh, linear (no weights of CLIP) or random (CSH's shape, random frozen weights)
    head_attention  of the frozen blocks: clip (CLIP's own) or values (each position keeps its own value)
    `clip_model` is not changed: the head copies what it needs, then its image tower may be deleted. Before training,
    the adapter should start at CLIP's own tokens: train.start_adapter.
    Raises ModelError, CLIPError."""
    if not isinstance(body, nn.Module):
        body = build_body(body, body_weights)
    visual, values = clip_model.visual, head_attention == "values"
    heads = {"csh": lambda: CSH(visual, body.out_channels, frozen_blocks, values),
             "linear": lambda: LinearHead(visual, body.out_channels),
             "random": lambda: RandomHead(visual, body.out_channels, frozen_blocks, values)}
    if head not in heads or head_attention not in ("clip", "values"):
        raise ModelError(f"no head {head!r} with attention {head_attention!r}: choose {', '.join(heads)}; clip, values")
    return ChimeraSeg(body, heads[head](), clip_model, tau=1 / clip_model.logit_scale.exp().item())


def load_run(checkpoint, device, clip_file=None):
    """last.pt of train.py -> (model in eval mode without CLIP's image tower, config with the checkpoint's step).

    clip_file: where the run's CLIP lies now, by default where it lay in training.
    Raises CheckpointError, ModelError, CLIPError."""
    saved = from_first(lambda: read_checkpoint(checkpoint))
    config = saved["config"] | {"step": saved["step"]}
    clip_model = clip.load(clip_file or config["clip"])
    if clip.fingerprint(clip_model) != config["clip_hash"]:
        raise ModelError(f"{clip_file or config['clip']} is not the CLIP that {checkpoint} was trained with: "
                         "give --clip")
    model = build(clip_model, **config["model"] | {"body_weights": "none"})
    del clip_model.visual  # what the head needs of it, it has copied
    model.load_trained_state(saved["model"])
    clip_model.to(device)  # the text tower
    return model.to(device).eval(), config
