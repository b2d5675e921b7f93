"""The segmenter: a trainable body, a head into CLIP's joint space, and frozen text embeddings as the classifier.

    images (B, 3, H, W) in [0, 1] -> body (B, C, h, w) -> head z (B, D, h, w); logits = z · t / τ

Any body whose forward maps normalised images to (B, C, h, w), with `out_channels` = C, will do.
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
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

import clip
import segnext
from clip_head import CSH, LinearHead
from losses import pixel_text_logits

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
STRIDE = 16  # OURS: CLIP ViT-B/16's own grid. At 8 the head's frozen block costs six times as much
RANDOM_HEAD_SEED = 0  # the random-weights control is not saved: it is drawn again from this seed


class ModelError(ValueError):
    """A body, head or checkpoint that cannot be used; the message says what to do."""


# ---------------------------------------------------------------- bodies


def norm(channels):
    """GroupNorm of 8 groups: no batch statistics, so one image a batch and any number of processes are the same."""
    return nn.GroupNorm(8, channels)


class Residual(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels), nn.GELU(),
                                    nn.Conv2d(channels, channels, 3, padding=1, bias=False), norm(channels))

    def forward(self, x):
        return F.gelu(x + self.layers(x))


class SmallBody(nn.Module):
    """Body of the embedded default: strides 4, 8 and 16, fused at stride 4. 1.5 M parameters, no pretraining (OURS)."""

    def __init__(self, width=64):
        super().__init__()

        def down(channels, out):
            return nn.Sequential(nn.Conv2d(channels, out, 3, stride=2, padding=1, bias=False), norm(out), nn.GELU())

        self.out_channels = 2 * width
        self.fine = nn.Sequential(down(3, width // 2), down(width // 2, width), Residual(width))  # stride 4
        self.middle = nn.Sequential(down(width, 2 * width), Residual(2 * width), Residual(2 * width))  # stride 8
        self.coarse = nn.Sequential(down(2 * width, 2 * width), Residual(2 * width), Residual(2 * width))  # stride 16
        self.fuse = nn.Sequential(nn.Conv2d(5 * width, 2 * width, 1, bias=False), norm(2 * width), nn.GELU())

    def forward(self, x):
        """(B, 3, H, W) -> (B, 128, ⌈H/4⌉, ⌈W/4⌉)"""
        fine = self.fine(x)
        middle = self.middle(fine)
        stages = [fine] + [F.interpolate(s, fine.shape[-2:], mode="bilinear", align_corners=False)
                           for s in (middle, self.coarse(middle))]
        return self.fuse(torch.cat(stages, dim=1))


_RESNET, _FEATURES = ("layer1", "layer2", "layer3", "layer4"), ("features.1", "features.3", "features.5", "features.7")
TORCHVISION = {  # --body: (constructor, its ImageNet weights, nodes at strides 4, 8, 16, 32)
    "resnet50": (models.resnet50, models.ResNet50_Weights.DEFAULT, _RESNET),
    "resnet101": (models.resnet101, models.ResNet101_Weights.DEFAULT, _RESNET),
    "convnext-t": (models.convnext_tiny, models.ConvNeXt_Tiny_Weights.DEFAULT, _FEATURES),
    "convnext-b": (models.convnext_base, models.ConvNeXt_Base_Weights.DEFAULT, _FEATURES),
    "swin-t": (models.swin_t, models.Swin_T_Weights.DEFAULT, _FEATURES),
    "swin-b": (models.swin_b, models.Swin_B_Weights.DEFAULT, _FEATURES),
    "mobilenet-v2": (models.mobilenet_v2, models.MobileNet_V2_Weights.DEFAULT,
                     ("features.3", "features.6", "features.13", "features.18")),
}
SEGNEXT = {f"segnext-{size}": size for size in segnext.SIZES}
BODIES = ("small", *SEGNEXT, *TORCHVISION)


class TorchvisionBody(nn.Module):
    """A torchvision backbone's four stages, fused at stride 8 or 16 by a light decoder (SegFormer's MLP head, OURS)."""

    def __init__(self, name, stride=16, width=256):
        super().__init__()
        constructor, _, nodes = TORCHVISION[name]
        self.out_channels, self.level = width, (8, 16).index(stride) + 1
        self.channels_last = name.startswith("swin")  # whose stages are (B, h, w, C)
        nodes = {node: str(i) for i, node in enumerate(nodes)}
        self.backbone = create_feature_extractor(constructor(weights=None), nodes)
        with torch.no_grad():
            channels = [f.shape[1] for f in self.stages(torch.zeros(1, 3, 64, 64))]
        self.lateral = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Sequential(nn.Conv2d(4 * width, width, 1, bias=False), norm(width), nn.GELU())

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
    body = segnext.SegNeXt(SEGNEXT[name], stride) if name in SEGNEXT else TorchvisionBody(name, stride)
    if weights == "none":
        return body
    url = segnext.WEIGHTS[SEGNEXT[name]][0] if name in SEGNEXT else TORCHVISION[name][1].url
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    try:
        if weights == "default":
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        if name in SEGNEXT:
            segnext.load_mscan(body, state)
        else:  # strictly, and into the whole network: the stages share its tensors' names
            TORCHVISION[name][0](weights=None).load_state_dict(state)
            body.backbone.load_state_dict({key: state[key] for key in body.backbone.state_dict()})
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise ModelError(f"no ImageNet weights for {name} ({type(error).__name__}: {reason}): put {url} at {file}, or "
                         "give --body-weights FILE or none") from None
    return body


# ---------------------------------------------------------------- segmenter


@torch.no_grad()
def text_embeddings(clip_model, names, templates):
    """Class names -> t (K, D), unit length. Each template's embedding is normalised, their mean normalised again.

    Synonyms in a name are separated by commas; they are averaged like templates (FIELD). Kept in clip.CACHE under the
    hash of all that they are made of: 171 classes in 15 templates take ViT-B/16's text tower half a minute on a CPU."""
    texts = [[template.format(word.strip()) for word in name.split(",") for template in templates] for name in names]
    content = hashlib.sha256(repr(texts).encode())
    for name, p in clip_model.named_parameters():
        if not name.startswith("visual."):
            content.update(p.cpu().numpy().tobytes())
    path = clip.CACHE / f"text-{content.hexdigest()[:32]}.pt"
    try:
        return torch.load(path, weights_only=True)
    except Exception:  # not there yet, or damaged
        t = [F.normalize(clip_model.encode_text(clip.tokenize(rows)).float(), dim=-1).mean(0) for rows in texts]
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
        wanted = self.trained_state()
        if differ := sorted(wanted.keys() ^ state.keys()):
            raise ModelError(f"the checkpoint is of another body or head: {len(differ)} tensors differ, such as "
                             f"{differ[0]}")
        for name, tensor in state.items():
            if tensor.shape != wanted[name].shape:
                raise ModelError(f"the checkpoint's {name} has shape {tuple(tensor.shape)}, this model's is "
                                 f"{tuple(wanted[name].shape)}")
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
