"""TorchvisionBody: torchvision's backbones, whose ImageNet weights are downloaded, behind one light decoder."""
import torch
import torch.nn as nn
import torch.nn.functional as F
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from bodies.small import conv

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


class TorchvisionBody(nn.Module):
    """A torchvision backbone's four stages, fused at stride 16 by a light decoder (SegFormer's MLP head, OURS)."""

    def __init__(self, name, width=256):
        super().__init__()
        network, nodes = TORCHVISION[name]
        self.out_channels = width
        self.channels_last = name.startswith("swin")  # whose stages are (B, h, w, C)
        self.backbone = create_feature_extractor(models.get_model(network), list(nodes))
        self.backbone.eval()  # a look at the channels must not move batch norm's statistics
        with torch.no_grad():
            channels = [f.shape[1] for f in self.stages(torch.zeros(1, 3, 64, 64))]
        self.backbone.train()
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = conv(4 * width, width, 1)

    def stages(self, x):
        """(B, 3, H, W) -> four stages (B, C_i, h_i, w_i) at strides 4, 8, 16, 32."""
        stages = self.backbone(x).values()
        return [s.permute(0, 3, 1, 2) for s in stages] if self.channels_last else list(stages)

    def forward(self, x):
        """(B, 3, H, W) -> (B, 256, h, w), about H/16 × W/16 (rounded down or up, as the network does)"""
        stages = [lateral(s) for lateral, s in zip(self.lateral, self.stages(x))]
        size = stages[2].shape[-2:]  # stride 16
        return self.fuse(torch.cat([F.interpolate(s, size, mode="bilinear", align_corners=False) for s in stages], 1))
