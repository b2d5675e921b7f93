"""SmallBody: the body for the toy data set. toy/body.pt has weights for it that know scenes of emoji."""
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

norm = partial(nn.GroupNorm, 8)  # no batch statistics: one image a batch and any number of processes are the same


def conv(channels, out, size, stride=1):
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, size // 2, bias=False), norm(out), nn.GELU())


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(*conv(channels, channels, 3),
                                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels))

    def forward(self, x):
        return F.gelu(x + self.layers(x))


class Backbone(nn.Module):
    """(B, 3, H, W) -> three stages (B, C_i, h_i, w_i) at strides 4, 8 and 16."""

    def __init__(self, width):
        super().__init__()
        down = partial(conv, size=3, stride=2)
        self.fine = nn.Sequential(down(3, width // 2), down(width // 2, width), Residual(width))
        self.middle = nn.Sequential(down(width, 2 * width), Residual(2 * width), Residual(2 * width))
        self.coarse = nn.Sequential(down(2 * width, 2 * width), Residual(2 * width), Residual(2 * width))

    def forward(self, x):
        fine = self.fine(x)
        middle = self.middle(fine)
        return fine, middle, self.coarse(middle)


class SmallBody(nn.Module):
    """Body for the toy data set: strides 4, 8 and 16, fused at stride 4. 1.5 M parameters (OURS)."""

    def __init__(self, width=64):
        super().__init__()
        self.out_channels = 2 * width
        self.backbone = Backbone(width)
        self.fuse = conv(5 * width, 2 * width, 1)

    def forward(self, x):
        """(B, 3, H, W) -> (B, 128, ⌈H/4⌉, ⌈W/4⌉)"""
        fine, *rest = self.backbone(x)
        rest = [s.contiguous(memory_format=torch.channels_last) for s in rest]  # else GPUs upsample small grids slowly
        rest = [F.interpolate(s, fine.shape[-2:], mode="bilinear", align_corners=False) for s in rest]
        return self.fuse(torch.cat([fine, *rest], dim=1))
