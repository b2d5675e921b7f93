"""Bodies: trainable networks that give dense features, by name.

A body is any nn.Module from ImageNet-normalised images (B, 3, H, W) to (B, C, h, w) with `out_channels` = C. To add a
name: its module in a file here, its name in BODIES, two lines in `build_body` below those of `small`. Or give the
module itself to model.build.

    small          for the toy data set, stride 4
    segnext-t … l  SegNeXt, the nearest to the authors' earlier papers, stride 16
    resnet50 …     torchvision's, with a light decoder, stride 16

OURS: stride 16 is CLIP ViT-B/16's own grid. At 8 the head's frozen block costs six times as much.
"""
from pathlib import Path

import torch
from torchvision import models

from bodies.pretrained import TORCHVISION, TorchvisionBody
from bodies.segnext import SIZES, WEIGHTS, SegNeXt, mscan_names
from bodies.small import SmallBody
from support import UserError
from support.archive import ArchiveError, check_tensors, fetch, misfit, read_tensors
from support.processes import first_on_machine

SEGNEXT = {f"segnext-{size}": size for size in SIZES}
BODIES = ("small", *SEGNEXT, *TORCHVISION)
LEARNING_RATES = dict.fromkeys(SEGNEXT, 6e-4)  # --lr of the publisher's own recipe, which is like ours (docs/data.md)
# GB of GPU memory and images/s in training, 16 crops of 512 pixels in bf16 on an H200 (docs/results.md)
MEASURED = {"mobilenet-v2": (5.2, 249), "resnet50": (5.8, 222), "segnext-b": (14.9, 71)}
SMALL = Path(__file__).parent.parent / "toy" / "body.pt"  # made by python -m toy.pretrain


class ModelError(UserError):
    """A body or head that cannot be used; the message says what to do."""


def build_body(name, weights="default"):
    """A name of BODIES -> the body. weights: "default" (ImageNet's, downloaded once), "none", or a file.

    The file is in the publisher's own format: torchvision's, or MSCAN's for SegNeXt. The default of `small` lies in
    this repository and knows scenes of the toy data set. Raises ModelError."""
    if name not in BODIES:
        raise ModelError(f"no body {name[:60]!r}: choose one of {', '.join(BODIES)}")
    if name == "small":
        body, url = SmallBody(), "toy/body.pt of this repository"
    elif name in SEGNEXT:
        body, url = SegNeXt(SEGNEXT[name]), WEIGHTS[SEGNEXT[name]]
    else:
        body, url = TorchvisionBody(name), models.get_model_weights(TORCHVISION[name][0]).DEFAULT.url
    if name not in SEGNEXT:  # dense convolutions are faster so, on CPU and CUDA; its depthwise ones are not
        body = body.to(memory_format=torch.channels_last)
    if weights == "none":
        return body
    file = SMALL if name == "small" else Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    try:
        if weights == "default" and name != "small":
            with first_on_machine():
                fetch(file, [url], sha256=file.stem.rpartition("-")[2])  # its first digits
        load_weights(body if name == "small" else body.backbone, name, file if weights == "default" else Path(weights))
    except ArchiveError as error:
        raise ModelError(f"no weights for {name}: {error}. Published: {url}; --body-weights also takes a "
                         "FILE or none") from None
    return body


def load_weights(part, name, path):
    """Fills a body's backbone (`small`: all of it). The file must hold the network's tensors, no others."""
    state, own = read_tensors(path), part.state_dict()
    wanted = own
    if name in SEGNEXT:
        state = mscan_names(state)
    elif name in TORCHVISION:  # the classifier too; the stages share the whole network's names
        with torch.device("meta"):
            wanted = models.get_model(TORCHVISION[name][0]).state_dict()
    check_tensors(state, path)
    if wrong := misfit(state, wanted):
        raise ArchiveError(f"{path} holds another network, or more than this one: {wrong}")
    own |= {key: state[key] for key in own if own[key].is_floating_point()}  # not counters and Swin's tables of indices
    part.load_state_dict(own)
