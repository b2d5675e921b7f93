"""Bodies: trainable networks that give dense features, by name.

A body is any nn.Module from ImageNet-normalised images (B, 3, H, W) to (B, C, h, w) with `out_channels` = C. To add a
name: its module in a file here, its name in BODIES, and two lines in `build_body` below those of `small`. Or give the
module itself to model.build. `channels_last` makes most convolutions faster.

    small          for the toy data set, stride 4
    segnext-t … l  SegNeXt, the nearest to the authors' earlier papers, stride 16
    resnet50 …     torchvision's, with a light decoder, stride 16
"""
from pathlib import Path

import torch
from torchvision import models

from bodies.pretrained import TORCHVISION, TorchvisionBody
from bodies.segnext import SIZES, WEIGHTS, SegNeXt, load_mscan
from bodies.small import SmallBody
from support import UserError, first_line
from support.processes import first_on_machine

SEGNEXT = {f"segnext-{size}": size for size in SIZES}
BODIES = ("small", *SEGNEXT, *TORCHVISION)
LEARNING_RATES = {}
SMALL = Path(__file__).parent.parent / "toy" / "body.pt"  # made by python -m toy.pretrain
STRIDE = 16  # OURS: CLIP ViT-B/16's own grid. At 8 the head's frozen block costs six times as much


class ModelError(UserError):
    """A body or head that cannot be used; the message says what to do."""


def build_body(name, weights="default"):
    """A name of BODIES -> the body. weights: "default" (ImageNet's, downloaded once), "none", or a file.

    The file is in the publisher's own format: torchvision's, or MSCAN's for SegNeXt. The default of `small` lies in
    this repository and knows scenes of the toy data set. Raises ModelError."""
    if name not in BODIES:
        raise ModelError(f"no body {name!r}: choose one of {', '.join(BODIES)}")
    if name == "small":
        body = SmallBody()
        if weights != "none":
            body.load_state_dict(torch.load(SMALL if weights == "default" else weights, weights_only=True))
        return channels_last(body)
    if name in SEGNEXT:
        body, url = SegNeXt(SEGNEXT[name], STRIDE), WEIGHTS[SEGNEXT[name]]  # its depthwise convolutions: not faster
    else:
        body = channels_last(TorchvisionBody(name, STRIDE))
        url = models.get_model_weights(TORCHVISION[name][0]).DEFAULT.url
    if weights == "none":
        return body
    file = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    try:
        if weights == "default":
            with first_on_machine():
                state = torch.hub.load_state_dict_from_url(url, map_location="cpu", check_hash=True, weights_only=True)
        else:
            state = torch.load(weights, map_location="cpu", weights_only=True)
        if name in SEGNEXT:
            load_mscan(body, state)
        else:  # strictly, and into the whole network: the stages share its tensors' names
            models.get_model(TORCHVISION[name][0]).load_state_dict(state)
            body.backbone.load_state_dict({key: state[key] for key in body.backbone.state_dict()})
    except Exception as error:
        raise ModelError(f"no ImageNet weights for {name} ({type(error).__name__}: {first_line(error, 160)}): put "
                         f"{url} at {file}, or give --body-weights FILE or none") from None
    return body


def channels_last(body):
    """With weights (and so features) laid out (B, H, W, C): dense convolutions are faster so, on CPU and CUDA."""
    return body.to(memory_format=torch.channels_last)
