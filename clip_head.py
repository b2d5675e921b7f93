"""CLIP Semantic Head (CSH): the last part of CLIP's frozen image encoder behind a light trainable adapter.

    body features (B, C, h, w) -> adapter (trained) -> last n blocks, ln_post, proj (CLIP's, frozen) -> z (B, D, h, w)

FACT (abstract of arXiv 2506.22032): a frozen subnetwork, fixed projection layers, light trainable parts.
OURS: the last n blocks, with CLIP's own attention; the adapter's form; no CLS token among the head's tokens, no
position embeddings added to them.
Symbols: B images, C body channels, W CLIP's width, D joint width, N = h·w dense positions.
"""
import copy

import torch
import torch.nn as nn
import torch.nn.functional as F

from clip import VisionTransformer

RANDOM_HEAD_SEED = 0  # the weights of the random control are not saved, but drawn again from this seed


class Adapter(nn.Module):
    """1×1 convolution C -> W and LayerNorm over W: body features become tokens. Trained."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.project = nn.Linear(in_channels, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        return self.norm(self.project(x))  # (B, N, W)

    @torch.no_grad()
    def start_like(self, tokens):
        """Before training: the LayerNorm's gain and bias become standard deviation and mean, channel by channel, of
        these tokens (B, N, W), CLIP's own. OURS: a CLIP block adds to its input. Where its input is much larger than
        CLIP's own tokens, what it adds is lost, and the head is no more than ln_post and proj."""
        tokens = tokens.flatten(0, 1)
        self.norm.weight.copy_(tokens.std(0))
        self.norm.bias.copy_(tokens.mean(0))


class Tail(nn.Module):
    """Frozen copy of the end of CLIP's image tower: its last `blocks` blocks, ln_post, proj, under CLIP's own names.

    values: the blocks by the values path, without attention, as MaskCLIP uses the last one."""

    def __init__(self, visual, blocks, values=False):
        super().__init__()
        self.values = values
        self.resblocks = copy.deepcopy(visual.split(blocks)[1])
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = copy.deepcopy(visual.proj)  # (W, D)
        self.requires_grad_(False)

    def forward(self, x):
        for block in self.resblocks:
            x = block.values(x) if self.values else block(x)  # (B, N, W)
        return self.ln_post(x) @ self.proj  # (B, N, D)


@torch.no_grad()
def clip_tokens(visual, images, blocks):
    """CLIP's own patch tokens where its last `blocks` blocks begin: (B, 3, V, V) in [0, 1] -> (B, N, W)."""
    return visual.tokens_before(images, blocks)[:, 1:]


class Head(nn.Module):
    """(B, C, h, w) -> z (B, D, h, w), unit length over D, fp32. Gradients pass through `tail` to adapter and body."""

    def __init__(self, adapter, tail):
        super().__init__()
        self.adapter, self.tail = adapter, tail

    def forward(self, x):
        z = self.tail(self.adapter(x))  # (B, N, D)
        return F.normalize(z.float(), dim=-1).transpose(1, 2).unflatten(2, x.shape[-2:])


# Each builds the head of one --head. visual: CLIP's image tower, copied from and never changed. Raises CLIPError.


def CSH(visual, in_channels, frozen_blocks, values):
    """The head of the method."""
    return Head(Adapter(in_channels, visual.width), Tail(visual, frozen_blocks, values))


def LinearHead(visual, in_channels, *_):
    """Control without CLIP's weights: the same adapter, then one trained layer W -> D. Only the widths are CLIP's (and,
    in train.py, the statistics at which the adapter starts)."""
    return Head(Adapter(in_channels, visual.width), nn.Linear(visual.width, visual.output_dim, bias=False))


def RandomHead(visual, in_channels, frozen_blocks, values):
    """Control: CSH's shape with random frozen weights, always the same ones."""
    adapter = Adapter(in_channels, visual.width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(RANDOM_HEAD_SEED)
        return Head(adapter, Tail(VisionTransformer(**visual.config), frozen_blocks, values))


HEADS = {"csh": CSH, "linear": LinearHead, "random": RandomHead}
