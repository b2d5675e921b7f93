"""Every body against torchvision's own network, in the real training, and with weights from a file."""
import pytest
import torch
from conftest import run_inside
from torchvision.models import get_model
from torchvision.models.feature_extraction import create_feature_extractor
from trees import own_data

import bodies
import evaluate
import train
from bodies.segnext import SegNeXt

STAGES = {"resnet": ["layer1", "layer2", "layer3", "layer4"], "mobilenet": [f"features.{i}" for i in (3, 6, 13, 18)],
          "convnext": [f"features.{i}" for i in (1, 3, 5, 7)], "swin": [f"features.{i}" for i in (1, 3, 5, 7)]}
FULL_NAMES = {"convnext-t": "convnext_tiny", "convnext-b": "convnext_base"}


def marked(names, quick):
    return [pytest.param(name, marks=[] if name in quick else pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked(bodies.TORCHVISION, ("resnet50", "convnext-t", "swin-t", "mobilenet-v2")))
def test_stages_are_those_of_the_plain_network(name):
    plain = get_model(FULL_NAMES.get(name, name.replace("-", "_")), weights=None).eval()
    body, images = bodies.build_body(name, "none").eval(), torch.rand(1, 3, 64, 96)
    for key, tensor in body.backbone.state_dict().items():  # building the body has not moved batch norm
        if key.endswith(("running_mean", "running_var", "num_batches_tracked")):
            assert (tensor == key.endswith("var")).all(), key
    body.backbone.load_state_dict({key: plain.state_dict()[key] for key in body.backbone.state_dict()})
    nodes = next(nodes for family, nodes in STAGES.items() if name.startswith(family))
    with torch.no_grad():
        want, got = create_feature_extractor(plain, nodes)(images), body.stages(images)
    for node, stage in zip(nodes, got):
        expected = want[node].movedim(3, 1) if name.startswith("swin") else want[node]
        assert torch.allclose(stage, expected, atol=1e-4 * expected.abs().max().item()), node


@pytest.mark.parametrize("name", marked(bodies.BODIES, ("segnext-t", "swin-t", "mobilenet-v2")))
def test_every_body_trains_by_the_same_path(name, tiny_clip_file, tmp_path):
    """Two steps of train.py and its test; a gradient reaches all that is trained."""
    status, text, words = run_inside(
        train, "--dataset", own_data(tmp_path / "own"), "--clip", tiny_clip_file, "--body", name, "--body-weights",
        "none", "--steps", 2, "--batch-size", 2, "--crop", 64, "--workers", 0, "--device", "cpu", "--precision", "fp32",
        "--out-dir", tmp_path / "out")
    assert status == 0 and "hIoU" in text, words
    model, _ = evaluate.load_run(tmp_path / "out/last.pt", torch.device("cpu"))
    moments = torch.load(tmp_path / "out/last.pt", weights_only=True)["optimizer"]["state"].values()
    assert len(moments) == sum(p.requires_grad for p in model.parameters()) and all(m["exp_avg"].any() for m in moments)
    z = model(torch.rand(1, 3, 72, 88))  # one picture, sides that are no multiples of the stride
    wanted = {"small": (18, 22), "convnext-t": (4, 5), "convnext-b": (4, 5)}  # ConvNeXt rounds down
    assert z.shape == (1, 128, *wanted.get(name, (5, 6)))


@pytest.mark.parametrize("name", ["mobilenet-v2", "swin-t", "segnext-t"])
def test_weights_load_from_a_file_or_say_why(name, tmp_path):
    """In the publisher's layout; older files are bare pickles and lack BatchNorm's counters."""
    plain = SegNeXt("t").backbone if name == "segnext-t" else get_model(name.replace("-", "_"))
    state = {key: x + 0.5 if x.is_floating_point() else x for key, x in plain.state_dict().items()}
    old = {key: x.half() if x.is_floating_point() else x for key, x in state.items() if "num_batches" not in key}
    path, key = tmp_path / "w.pth", next(key for key, x in state.items() if x.ndim == 4)
    for content, zipped in ((state, True), (old, False)):
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        loaded = bodies.build_body(name, path).backbone.state_dict()
        assert all(torch.equal(x, content[key].float()) for key, x in loaded.items() if x.is_floating_point())
    for content, words in (
            ({k: x for k, x in state.items() if k != key}, f"1 tensors differ, .*{key}', is missing"),
            (state | {key: state[key] * torch.nan}, "not finite"), (state | {key: state[key][1:]}, "has shape")):
        torch.save(content, path)
        with pytest.raises(bodies.ModelError, match=rf"\A[^\n]*w.pth.*{words}[^\n]{{,90}} Published: https://[^\n]*\Z"):
            bodies.build_body(name, path)
