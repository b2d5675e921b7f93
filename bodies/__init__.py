"""Bodies: trainable networks that give dense features, from images to (B, C, h, w) with `out_channels` = C.

The embedded default's own, torchvision's, and SegNeXt (segnext.py).
Symbols: B images, C body channels, h×w the dense grid.
"""
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from bodies import segnext

STRIDE = 16  # OURS: CLIP ViT-B/16's own grid. At 8 the head's frozen block costs six times as much


class ModelError(ValueError):
    """A body, head or checkpoint that cannot be used; the message says what to do."""


def norm(channels):
    """GroupNorm of 8 groups: no batch statistics, so one image a batch and any number of processes are the same."""
    return nn.GroupNorm(8, channels)


def conv(channels, out, size, stride=1):
    return nn.Sequential(nn.Conv2d(channels, out, size, stride, size // 2, bias=False), norm(out), nn.GELU())


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(*conv(channels, channels, 3),
                                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels))

    def forward(self, x):
        return F.gelu(x + self.layers(x))


class SmallBody(nn.Module):
    """Body of the embedded default: strides 4, 8 and 16, fused at stride 4. 1.5 M parameters, no pretraining (OURS)."""

    def __init__(self, width=64):
        super().__init__()
        down = partial(conv, size=3, stride=2)
        self.out_channels = 2 * width
        self.fine = nn.Sequential(down(3, width // 2), down(width // 2, width), Residual(width))  # stride 4
        self.middle = nn.Sequential(down(width, 2 * width), Residual(2 * width), Residual(2 * width))  # stride 8
        self.coarse = nn.Sequential(down(2 * width, 2 * width), Residual(2 * width), Residual(2 * width))  # stride 16
        self.fuse = conv(5 * width, 2 * width, 1)

    def forward(self, x):
        """(B, 3, H, W) -> (B, 128, ⌈H/4⌉, ⌈W/4⌉)"""
        fine = self.fine(x)
        middle = self.middle(fine)
        stages = [fine] + [F.interpolate(s, fine.shape[-2:], mode="bilinear", align_corners=False)
                           for s in (middle, self.coarse(middle))]
        return self.fuse(torch.cat(stages, dim=1))


_RESNET, _FEATURES = ("layer1", "layer2", "layer3", "layer4"), ("features.1", "features.3", "features.5", "features.7")
TORCHVISION = {  # --body: (torchvision's name, nodes at strides 4, 8, 16, 32)
    "resnet50": ("resnet50", _RESNET),
    "resnet101": ("resnet101", _RESNET),
    "convnext-t": ("convnext_tiny", _FEATURES),
    "convnext-b": ("convnext_base", _FEATURES),
    "swin-t": ("swin_t", _FEATURES),
    "swin-b": ("swin_b", _FEATURES),
    "mobilenet-v2": ("mobilenet_v2", ("features.3", "features.6", "features.13", "features.18")),
}
SEGNEXT = {f"segnext-{size}": size for size in segnext.SIZES}
BODIES = ("small", *SEGNEXT, *TORCHVISION)


class TorchvisionBody(nn.Module):
    """A torchvision backbone's four stages, fused at stride 8 or 16 by a light decoder (SegFormer's MLP head, OURS)."""

    def __init__(self, name, stride=16, width=256):
        super().__init__()
        network, nodes = TORCHVISION[name]
        self.out_channels, self.level = width, (8, 16).index(stride) + 1
        self.channels_last = name.startswith("swin")  # whose stages are (B, h, w, C)
        self.backbone = create_feature_extractor(models.get_model(network), list(nodes))
        with torch.no_grad():
            channels = [f.shape[1] for f in self.stages(torch.zeros(1, 3, 64, 64))]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = conv(4 * width, width, 1)

    def stages(self, x):
        """(B, 3, H, W) -> four stages (B, C_i, h_i, w_i) at strides 4, 8, 16, 32."""
        stages = self.backbone(x).values()
        return [s.permute(0, 3, 1, 2) for s in stages] if self.channels_last else list(stages)

    def forward(self, x):
        """(B, 3, H, W) -> (B, 256, ⌈H/stride⌉, ⌈W/stride⌉)"""
        stages = [lateral(s) for lateral, s in zip(self.lateral, self.stages(x))]
        size = stages[self.level].shape[-2:]
        return self.fuse(torch.cat([F.interpolate(s, size, mode="bilinear", align_corners=False) for s in stages], 1))


def build_body(name, weights="default", stride=None):
    """A name of BODIES -> the body. weights: "default" (ImageNet's, downloaded once), "none", or a file.

    The file is in the publisher's own format: torchvision's, or MSCAN's for SegNeXt. Raises ModelError."""
    if name not in BODIES:
        raise ModelError(f"no body {name!r}: choose one of {', '.join(BODIES)}")
    if name == "small":
        if stride:
            raise ModelError("the output stride of small is fixed: leave --stride away")
        return SmallBody()
    if (stride := stride or STRIDE) not in (8, 16):
        raise ModelError(f"no output stride {stride}: choose 8 or 16")
    if name in SEGNEXT:
        body, url = segnext.SegNeXt(SEGNEXT[name], stride), segnext.WEIGHTS[SEGNEXT[name]]
    else:
        body, url = TorchvisionBody(name, stride), models.get_model_weights(TORCHVISION[name][0]).DEFAULT.url
    if weights == "none":
        return body
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    try:
        if weights == "default":
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        if name in SEGNEXT:
            segnext.load_mscan(body, state)
        else:  # strictly, and into the whole network: the stages share its tensors' names
            models.get_model(TORCHVISION[name][0]).load_state_dict(state)
            body.backbone.load_state_dict({key: state[key] for key in body.backbone.state_dict()})
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ModelError(f"no ImageNet weights for {name} ({type(error).__name__}: {reason}): put {url} at {file}, or "
                         "give --body-weights FILE or none") from None
    return body
