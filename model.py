"""The segmenter: a trainable body, a head into CLIP's joint space, and frozen text embeddings as the classifier.

    images (B, 3, H, W) in [0, 1] -> body (B, C, h, w) -> head z (B, D, h, w);  logits = z · t / τ

Symbols: B images, C body channels, D joint width, K classes, h×w the dense grid.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

import clip
from bodies import ModelError, build_body
from clip_head import HEADS
from losses import pixel_text_logits
from support.archive import misfit

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def prompts(name, templates):
    """A class's P texts. Synonyms in its name are separated by commas; underscores are read as spaces."""
    words = [" ".join(word.replace("_", " ").split()) for word in name.split(",") if word.strip()]
    return [template.replace("{}", word) for word in words for template in templates]


@torch.no_grad()
def text_embeddings(clip_model, names, templates):
    """Class names -> t (K, D), unit length. Each template's embedding is normalised, their mean normalised again. FIELD

    Synonyms are averaged as templates are."""
    t = []
    for name in names:
        tokens = clip.tokenize(prompts(name, templates), clip_model.context_length)  # (P, 77)
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
        """(B, 3, H, W) in [0, 1] -> (B, K, h, w) at the dense grid: cosine / τ. In fp32, also under autocast.

        Raises ModelError before `set_classes`."""
        if not len(self.t):
            raise ModelError("the model has no classes yet: call set_classes(names, templates) first")
        z = self(images)
        with torch.autocast(z.device.type, enabled=False):
            return pixel_text_logits(z, self.t, self.tau)

    def trained_state(self):
        """State dict without the head's frozen tail, which comes from CLIP's own file (or from a seed)."""
        frozen = {name for name, p in self.named_parameters() if name.startswith("head.tail.") and not p.requires_grad}
        return {name: tensor for name, tensor in self.state_dict().items() if name not in frozen}

    def load_trained_state(self, state):
        if wrong := misfit(state, self.trained_state()):
            raise ModelError(f"the checkpoint is of another body or head: {wrong}")
        self.load_state_dict(state, strict=False)


def build(clip_model, *, body="small", body_weights="default", head="csh", head_attention="clip", frozen_blocks=1):
    """The segmenter from plain values.

    body            a name of bodies.BODIES, or any nn.Module: ImageNet-normalised (B, 3, H, W) -> (B, C, h, w), with
                    out_channels = C
    head            a name of clip_head.HEADS
    head_attention  of the frozen blocks: clip (CLIP's own) or values (each position keeps its own value)
    `clip_model` is not changed: the head copies what it needs, then its image tower may be deleted. Before training,
    the adapter should start at CLIP's own tokens: train.start_adapter.
    Raises ModelError, CLIPError."""
    if not isinstance(body, nn.Module):
        body = build_body(body, body_weights)
    if head not in HEADS or head_attention not in ("clip", "values"):
        raise ModelError(f"no head {head!r} with attention {head_attention!r}: choose {', '.join(HEADS)}; clip, values")
    head = HEADS[head](clip_model.visual, body.out_channels, frozen_blocks, head_attention == "values")
    return ChimeraSeg(body, head, clip_model, tau=1 / clip_model.logit_scale.exp().item())
