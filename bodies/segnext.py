"""SegNeXt (Guo et al., arXiv 2209.08575): the MSCAN encoder and the LightHam decoder, without the classifier.

Written from the paper and the published configurations; parameter names are those of the encoder's published files.
Symbols: B images, C channels, N = h·w positions, R bases of the matrix decomposition.
"""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision.ops import StochasticDepth

SIZES = {  # size: (widths of the four stages, blocks in each, decoder's width C, R, drop path rate of the last block)
    "t": ((32, 64, 160, 256), (3, 3, 5, 2), 256, 16, 0.1),
    "s": ((64, 128, 320, 512), (2, 2, 4, 2), 256, 16, 0.1),
    "b": ((64, 128, 320, 512), (3, 3, 12, 3), 512, 64, 0.1),
    "l": ((64, 128, 320, 512), (3, 5, 27, 3), 1024, 64, 0.3),
}
MLP_RATIOS = (8, 8, 4, 4)
LAYER_SCALE = 1e-2  # the weight at which every branch starts
NMF_STEPS, NMF_EVAL_STEPS, NMF_EPS = 6, 7, 1e-6
NMF_EVAL_SEED = 0  # OURS, see NMF

_URL = "https://download.openmmlab.com/mmsegmentation/v0.5/pretrain/segnext/"
WEIGHTS = {size: _URL + file for size, file in {  # ImageNet-1k; a name ends in its sha256's first 8 digits
    "t": "mscan_t_20230227-119e8c9f.pth", "s": "mscan_s_20230227-f33ccdf2.pth",
    "b": "mscan_b_20230227-3ab7d230.pth", "l": "mscan_l_20230227-cef260d4.pth"}.items()}


def named(**layers):
    """nn.Sequential with names."""
    return nn.Sequential(OrderedDict(layers))


def depthwise(channels, height, width):
    return nn.Conv2d(channels, channels, (height, width), padding=(height // 2, width // 2), groups=channels)


class MSCA(nn.Module):
    """Multi-scale convolutional attention: what a 5×5 and three pairs of strips see around a position gates it."""

    def __init__(self, channels):
        super().__init__()
        self.conv0 = depthwise(channels, 5, 5)
        self.conv0_1, self.conv0_2 = depthwise(channels, 1, 7), depthwise(channels, 7, 1)
        self.conv1_1, self.conv1_2 = depthwise(channels, 1, 11), depthwise(channels, 11, 1)
        self.conv2_1, self.conv2_2 = depthwise(channels, 1, 21), depthwise(channels, 21, 1)
        self.conv3 = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        near = self.conv0(x)
        far = [self.conv0_2(self.conv0_1(near)), self.conv1_2(self.conv1_1(near)), self.conv2_2(self.conv2_1(near))]
        return x * self.conv3(near + far[0] + far[1] + far[2])  # (B, C, h, w)


class Block(nn.Module):
    def __init__(self, channels, mlp_ratio, drop_rate):
        super().__init__()
        self.drop_path = StochasticDepth(drop_rate, "row")  # in training a share of the images goes without a branch
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(channels)
        self.attn = named(proj_1=nn.Conv2d(channels, channels, 1), gelu=nn.GELU(),
                          spatial_gating_unit=MSCA(channels), proj_2=nn.Conv2d(channels, channels, 1))
        hidden = mlp_ratio * channels
        self.mlp = named(fc1=nn.Conv2d(channels, hidden, 1), dwconv=depthwise(hidden, 3, 3), gelu=nn.GELU(),
                         fc2=nn.Conv2d(hidden, channels, 1))
        self.layer_scale_1 = nn.Parameter(torch.full((channels,), LAYER_SCALE))
        self.layer_scale_2 = nn.Parameter(torch.full((channels,), LAYER_SCALE))

    def forward(self, x):
        y = self.norm1(x)
        y = self.layer_scale_1[:, None, None] * (y + self.attn(y))  # the attention has a shortcut of its own
        x = x + self.drop_path(y)
        y = self.layer_scale_2[:, None, None] * self.mlp(self.norm2(x))
        return x + self.drop_path(y)


class MSCAN(nn.Module):
    """(B, 3, H, W) -> four stages (B, widths[i], h, w) at strides 4, 8, 16, 32."""

    def __init__(self, widths, depths, last_rate):
        super().__init__()
        half, rates = widths[0] // 2, iter(torch.linspace(0, last_rate, sum(depths)).tolist())
        stem = nn.Sequential(nn.Conv2d(3, half, 3, stride=2, padding=1), nn.BatchNorm2d(half), nn.GELU(),
                             nn.Conv2d(half, widths[0], 3, stride=2, padding=1), nn.BatchNorm2d(widths[0]))
        for i, (width, depth, ratio) in enumerate(zip(widths, depths, MLP_RATIOS)):
            embed = named(proj=stem) if i == 0 else named(
                proj=nn.Conv2d(widths[i - 1], width, 3, stride=2, padding=1), norm=nn.BatchNorm2d(width))
            self.add_module(f"patch_embed{i + 1}", embed)
            self.add_module(f"block{i + 1}", nn.Sequential(*[Block(width, ratio, next(rates)) for _ in range(depth)]))
            self.add_module(f"norm{i + 1}", nn.LayerNorm(width))

    def forward(self, x):
        stages = []
        for i in (1, 2, 3, 4):
            embed, blocks, norm = (self.get_submodule(f"{part}{i}") for part in ("patch_embed", "block", "norm"))
            x = norm(blocks(embed(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2).contiguous()  # norm over channels
            stages.append(x)
        return stages


class NMF(nn.Module):
    """Non-negative matrix factorisation X ≈ bases · coefᵀ by multiplicative updates (Hamburger, arXiv 2109.04553).

    The bases start at random, unit length over C. As in SegNeXt's code they are drawn anew for every image in training,
    and gradients pass through all updates. OURS: in evaluation every image starts from one draw of a fixed seed, for
    the same result in any batch; published code draws anew there too. OURS: always in fp32, as the updates divide small
    sums by each other."""

    def __init__(self, channels, bases):
        super().__init__()
        start = torch.rand(1, channels, bases, generator=torch.Generator().manual_seed(NMF_EVAL_SEED))
        self.register_buffer("start", F.normalize(start, dim=1), persistent=False)

    def forward(self, x):
        """(B, C, h, w), all ≥ 0 -> its reconstruction from R bases, (B, C, h, w)"""
        with torch.autocast(x.device.type, enabled=False):
            X = x.flatten(2).float()  # (B, C, N)
            bases = self.start.float().expand(len(X), -1, -1)  # (B, C, R)
            if self.training:
                bases = F.normalize(torch.rand(bases.shape, device=X.device), dim=1)
            coef = (X.mT @ bases).softmax(dim=-1)  # (B, N, R)
            steps = NMF_STEPS if self.training else NMF_EVAL_STEPS
            for step in range(steps + 1):
                coef = coef * (X.mT @ bases) / (coef @ (bases.mT @ bases) + NMF_EPS)
                if step < steps:
                    bases = bases * (X @ coef) / (bases @ (coef.mT @ coef) + NMF_EPS)
            return (bases @ coef.mT).view_as(x).to(x.dtype)


def conv_norm(in_channels, channels):
    return nn.Sequential(nn.Conv2d(in_channels, channels, 1, bias=False), nn.GroupNorm(32, channels))


class LightHam(nn.Module):
    """Stages 2, 3, 4 on stage 2's grid, squeezed to C channels, plus a low-rank view of the whole image."""

    def __init__(self, widths, channels, bases):
        super().__init__()
        self.squeeze = conv_norm(sum(widths[1:]), channels)
        self.ham_in, self.ham = nn.Conv2d(channels, channels, 1), NMF(channels, bases)
        self.ham_out, self.align = conv_norm(channels, channels), conv_norm(channels, channels)

    def forward(self, stages):
        size = stages[1].shape[-2:]  # stride 8
        x = torch.cat([F.interpolate(s, size, mode="bilinear", align_corners=False) for s in stages[1:]], dim=1)
        x = F.relu(self.squeeze(x))  # (B, C, h, w)
        x = F.relu(x + self.ham_out(self.ham(F.relu(self.ham_in(x)))))
        return F.relu(self.align(x))


class SegNeXt(nn.Module):
    """ImageNet-normalised images (B, 3, H, W) -> dense features (B, C, ⌈H/16⌉, ⌈W/16⌉), all ≥ 0; C is `out_channels`.

    OURS: the published features, of stride 8, are averaged in pairs of rows and columns."""

    def __init__(self, size="t"):
        super().__init__()
        widths, depths, self.out_channels, bases, last_rate = SIZES[size]
        self.backbone = MSCAN(widths, depths, last_rate)
        self.decoder = LightHam(widths, self.out_channels, bases)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):  # as published: He et al.'s, by the fan-out
                nn.init.normal_(module.weight, std=(2 * module.groups / module.weight[:, 0].numel()) ** 0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        return F.avg_pool2d(self.decoder(self.backbone(x)), 2, ceil_mode=True)


def mscan_names(tensors):
    """{name: tensor} of an MSCAN ImageNet checkpoint -> those of the encoder in our names. The authors' own files wrap
    them and name one layer otherwise. The ImageNet classifier, `head.*`, is left out."""
    state = {key.removeprefix("state_dict.").replace(".dwconv.dwconv.", ".dwconv."): x for key, x in tensors.items()}
    return {key: x for key, x in state.items() if not key.startswith("head.")}
