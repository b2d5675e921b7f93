"""The segmenter: a trainable body, a head into CLIP's joint space, and frozen text embeddings as the classifier.

    images (B, 3, H, W) in [0, 1] -> body (B, C, h, w) -> head z (B, D, h, w); logits = z · t / τ

Any body whose forward maps normalised images to (B, C, h, w), with `out_channels` = C, will do (bodies.py).
Symbols: B images, C body channels, D joint width, K classes, h×w the dense grid.
"""
import contextlib
import hashlib
import os
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
from support.archive import misfit
from bodies import ModelError, build_body
from clip_head import CSH, LinearHead
from losses import pixel_text_logits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RANDOM_HEAD_SEED = 0  # the random-weights control is not saved: it is drawn again from this seed


@torch.no_grad()
def text_embeddings(clip_model, names, templates):
    """Class names -> t (K, D), unit length. Each template's embedding is normalised, their mean normalised again.

    Synonyms in a name are separated by commas; they are averaged like templates (FIELD). Kept in clip.CACHE under the
    hash of all that they are made of: 171 classes in 15 templates take ViT-B/16's text tower half a minute on a CPU."""
    words = [[word.strip() for word in name.split(",")] for name in names]
    texts = [[template.replace("{}", word) for word in synonyms for template in templates] for synonyms in words]
    tower = clip.fingerprint(clip_model, text_tower_only=True)
    content = hashlib.sha256(repr((texts, tower)).encode() + Path(clip.__file__).read_bytes())
    path = clip.CACHE / f"text-{content.hexdigest()[:32]}.pt"
    try:
        t = torch.load(path, weights_only=True)
        assert t.shape == (len(names), clip_model.text_projection.shape[1])
        return t
    except Exception:  # not there yet, damaged, or something else
        tokens = [clip.tokenize(rows, clip_model.context_length) for rows in texts]
        t = [F.normalize(clip_model.encode_text(rows).float(), dim=-1).mean(0) for rows in tokens]
        t = F.normalize(torch.stack(t), dim=-1).cpu()
    with contextlib.suppress(OSError, RuntimeError):  # a folder that cannot be written is no cache
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(t, unfinished)
        unfinished.replace(path)
    return t


class ChimeraSeg(nn.Module):
    """body + head + text embeddings `t` (K, D), a buffer that `set_classes` fills and may refill at any time."""

    def __init__(self, body, head, clip_model, tau):
        super().__init__()
        self.body, self.head, self.tau = body, head, tau
        self.embed = partial(text_embeddings, clip_model)  # so CLIP is no submodule: not trained, not saved, not moved
        self.register_buffer("t", torch.empty(0), persistent=False)
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def set_classes(self, names, templates):
        """The classes that `logits` tells apart from now on: K names, each put into every template."""
        self.t = self.embed(names, templates).to(self.mean.device)

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> dense features z (B, D, h, w), unit length over D."""
        return self.head(self.body((images - self.mean) / self.std))

    def logits(self, images):
        """(B, 3, H, W) in [0, 1] -> (B, K, h, w) at the dense grid: cosine / τ."""
        return pixel_text_logits(self(images), self.t, self.tau)

    def trained_state(self):
        """State dict without the frozen tensors: CLIP's part of the head comes from CLIP's own file."""
        frozen = {name for name, p in self.named_parameters() if not p.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state):
        if wrong := misfit(state, self.trained_state()):
            raise ModelError(f"the checkpoint is of another body or head: {wrong}")
        self.load_state_dict(state, strict=False)


def build(clip_model, /, *, body="small", body_weights="default", stride=None, head="csh", frozen_blocks=1,
          attention="qk", positional=False, temperature=None, **_):
    """The segmenter from plain values; other keys are passed over, so that a run's whole config may be given.

    head: csh, linear (no CLIP in it) or random (CSH with random frozen weights). `clip_model` is only read: the head
    copies its part, and the image tower may then be dropped. temperature: τ, CLIP's own when None. Raises ModelError,
    CLIPError."""
    visual = clip_model.visual
    body = build_body(body, body_weights, stride)
    if head == "random":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(RANDOM_HEAD_SEED)
            visual = clip.VisionTransformer(visual.input_size, visual.patch_size, visual.width,
                                            len(visual.transformer.resblocks), visual.output_dim)
    if head == "linear":
        head = LinearHead(body.out_channels, visual.width, visual.output_dim)
    elif head in ("csh", "random"):
        head = CSH(visual, body.out_channels, frozen_blocks, attention, positional)
    else:
        raise ModelError(f"no head {head!r}: choose csh, linear or random")
    body = body.to(memory_format=torch.channels_last)  # convolutions are faster so, on CPU and CUDA
    return ChimeraSeg(body, head, clip_model, temperature or 1 / clip_model.logit_scale.exp().item())
