"""CLIP Semantic Head (CSH): the last part of CLIP's frozen image encoder behind a light trainable adapter.

    body features (B, C, h, w) -> adapter (trained) -> last n blocks, ln_post, proj (CLIP's, frozen) -> z (B, D, h, w)

Paper: abstract of arXiv 2506.22032. FACT: frozen subnetwork + fixed projection layers + light trainable parts.
Which blocks, the adapter's form, attention, positions: OURS, each an argument.
Symbols: B images, C body channels, W CLIP's width, D joint width, N = h·w dense positions.
"""
import copy

import torch.nn as nn
import torch.nn.functional as F

from clip import CLIPError, resize_positions

# OURS. The adapter's LayerNorm starts at this gain. A CLIP block adds its attention and MLP outputs to the stream;
# at unit scale the tokens may drown in those outputs (row gain-1 of results/toy.md is at unit scale).
TOKEN_GAIN = 6.0


class Adapter(nn.Module):
    """1×1 convolution C -> W and LayerNorm over W: body features become tokens. Trained."""

    def __init__(self, in_channels, width):
        super().__init__()
        self.project = nn.Linear(in_channels, width)
        self.norm = nn.LayerNorm(width)
        nn.init.constant_(self.norm.weight, TOKEN_GAIN)

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)  # (B, N, C)
        return self.norm(self.project(x))  # (B, N, W)


class CSH(nn.Module):
    """Adapter, then a frozen copy of the image tower's last `frozen_blocks` blocks, ln_post and proj.

    visual         CLIP's image tower (clip.VisionTransformer); copied from, never changed
    frozen_blocks  n, 0 to the tower's depth
    attention      qk, vv or self (clip.Attention)
    positional     adds CLIP's positional table, resized to h×w, to the tokens
    No CLS token runs in the head: the one in CLIP carries an image summary that a dense head does not have (OURS).
    """

    def __init__(self, visual, in_channels, frozen_blocks=1, attention="qk", positional=False):
        super().__init__()
        depth = len(visual.transformer.resblocks)
        if not 0 <= frozen_blocks <= depth:
            raise CLIPError(f"{frozen_blocks} frozen blocks asked for: this CLIP has 0 to {depth}")
        self.attention = attention
        self.adapter = Adapter(in_channels, visual.width)
        self.clip = Tail(visual, frozen_blocks, positional).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.clip.eval()  # frozen: eval mode whatever the rest does
        return self

    def forward(self, x):
        """(B, C, h, w) -> z (B, D, h, w), unit length over D, fp32. Gradients pass through to adapter and body."""
        h, w = x.shape[-2:]
        z = self.clip(self.adapter(x), h, w, self.attention)  # (B, N, D)
        return F.normalize(z.float(), dim=-1).transpose(1, 2).unflatten(2, (h, w))


class Tail(nn.Module):
    """The frozen part of the head, copied from CLIP's image tower under its own names."""

    def __init__(self, visual, blocks, positional):
        super().__init__()
        depth = len(visual.transformer.resblocks)
        self.resblocks = copy.deepcopy(visual.transformer.resblocks[depth - blocks:])
        self.ln_post = copy.deepcopy(visual.ln_post)
        self.proj = copy.deepcopy(visual.proj)  # (W, D)
        self.positional_embedding = copy.deepcopy(visual.positional_embedding) if positional else None

    def forward(self, x, h, w, attention):
        if self.positional_embedding is not None:
            x = x + resize_positions(self.positional_embedding, h, w)
        for block in self.resblocks:
            x = block(x, attention)
        return self.ln_post(x) @ self.proj  # (B, N, D)


class LinearHead(nn.Module):
    """Control without CLIP: the same adapter, then a trained W -> D."""

    def __init__(self, in_channels, width, output_dim):
        super().__init__()
        self.adapter = Adapter(in_channels, width)
        self.proj = nn.Linear(width, output_dim, bias=False)

    def forward(self, x):
        h, w = x.shape[-2:]
        z = self.proj(self.adapter(x))  # (B, N, D)
        return F.normalize(z.float(), dim=-1).transpose(1, 2).unflatten(2, (h, w))
