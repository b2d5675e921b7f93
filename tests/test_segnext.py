"""SegNeXt: shapes, published sizes, the attention and the factorisation against plain loops, strict loading."""
import re

import pytest
import torch
import torch.nn.functional as F

from bodies import segnext
from bodies.segnext import MSCA, NMF, SegNeXt, SegNeXtError, load_mscan

PUBLISHED = {"t": 4.3, "s": 13.9, "b": 27.6, "l": 48.9}  # million parameters, with ADE20K's classifier


@pytest.fixture(scope="module")
def body():
    torch.manual_seed(0)
    return SegNeXt("t").eval()


def test_stages_and_dense_features(body):
    stages = body.backbone(torch.randn(2, 3, 65, 104))
    for stage, C, stride in zip(stages, (32, 64, 160, 256), (4, 8, 16, 32)):
        assert stage.shape == (2, C, -(-65 // stride), -(-104 // stride))
        assert stage.mean(1).abs().max() < 1e-5  # every stage ends in a LayerNorm over its channels
        assert torch.allclose(stage.var(1, correction=0), torch.ones(()), atol=1e-2)
    second = body.backbone.block2(body.backbone.patch_embed2(stages[0])).movedim(1, -1)  # a stage feeds the next one
    assert torch.allclose(body.backbone.norm2(second).movedim(-1, 1), stages[1], atol=1e-5)
    images, coarse = torch.randn(1, 3, 65, 104), SegNeXt("t", 16).eval()
    coarse.load_state_dict(body.state_dict())
    x, y = body(images), coarse(images)
    stages = body.backbone(images)
    grids = [F.interpolate(s, (9, 13), mode="bilinear") for s in stages[1:]]
    squeezed, ham = body.decoder.squeeze(torch.cat(grids, 1)).relu(), body.decoder
    view = ham.ham_out(ham.ham(ham.ham_in(squeezed).relu()))  # low rank
    assert torch.allclose(x, ham.align((squeezed + view).relu()).relu(), atol=1e-5)
    assert x.shape == (1, body.out_channels, 9, 13) and x.min() >= 0 and y.shape[2:] == (5, 7)
    assert torch.allclose(y[..., :4, :6], F.avg_pool2d(x, 2), atol=1e-6)  # the same features, in pairs


@pytest.mark.parametrize("size", PUBLISHED)
def test_parameters_are_the_published_ones(size):
    body = SegNeXt(size)
    count = sum(p.numel() for p in body.parameters()) + 150 * body.out_channels + 150
    assert round(count / 1e6, 1) == PUBLISHED[size]
    assert body.decoder.ham.start.shape == (1, body.out_channels, 16 if size in "ts" else 64)
    assert re.fullmatch(rf"https://.*/mscan_{size}_\d+-[0-9a-f]{{8}}.pth", segnext.WEIGHTS[size])


def test_attention_sums_square_kernels():
    """A strip and its transpose are one k×k depthwise kernel, their outer product; the sum gates the input."""
    msca, x = MSCA(3), torch.randn(2, 3, 30, 26)
    for name, p in msca.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(p)
    near = F.conv2d(x, msca.conv0.weight, padding=2, groups=3)
    seen = near.clone()
    for i, k in enumerate((7, 11, 21)):
        row, column = msca.get_submodule(f"conv{i}_1").weight, msca.get_submodule(f"conv{i}_2").weight
        assert row.shape == (3, 1, 1, k) and column.shape == (3, 1, k, 1)
        seen += F.conv2d(near, column * row, padding=k // 2, groups=3)
    want = torch.einsum("oc,bchw->bohw", msca.conv3.weight[..., 0, 0], seen) * x
    assert torch.allclose(msca(x), want, atol=1e-5)


def test_block_branches_are_scaled_and_the_attention_keeps_its_input():
    block, x = SegNeXt("t").eval().backbone.block2[0], torch.randn(1, 64, 8, 8)
    assert torch.equal(block.layer_scale_1, torch.full((64,), 1e-2))
    with torch.no_grad():
        moved = block(x) - x
        block.layer_scale_2.zero_()
        block.attn.proj_2.weight.zero_()  # of the attention only its own shortcut is left
        assert torch.allclose(block(x), x + 0.01 * block.norm1(x), atol=1e-6)
        block.layer_scale_1.zero_()
        assert torch.equal(block(x), x) and moved.abs().max() > 0


def test_drop_path_drops_whole_images_and_keeps_the_mean(body):
    torch.manual_seed(0)
    x = torch.ones(4000, 2, 1, 1)
    dropped = segnext.drop_path(x, 0.3, training=True)
    assert segnext.drop_path(x, 0.3, training=False) is x and abs(dropped.mean() - 1) < 0.03
    assert torch.equal(dropped[:, 0], dropped[:, 1]) and dropped.unique().tolist() == pytest.approx([0, 1 / 0.7])
    rates = [b.drop_rate for i in (1, 2, 3, 4) for b in body.backbone.get_submodule(f"block{i}")]
    assert rates == pytest.approx([0.1 * i / 12 for i in range(13)])


def factorise(x, bases, steps):
    """The NMF of one image, written from Lee & Seung's updates. x (C, N), bases (C, R), float64."""
    coef = torch.stack([torch.stack([(position * basis).sum() for basis in bases.T]).exp() for position in x.T])
    coef = coef / coef.sum(1, keepdim=True)  # (N, R), softmax over the bases at each position
    for step in range(steps + 1):
        up, down = torch.einsum("cn,cr->nr", x, bases), torch.einsum("nq,cq,cr->nr", coef, bases, bases)
        coef = coef * up / (down + 1e-6)
        if step < steps:
            up, down = torch.einsum("cn,nr->cr", x, coef), torch.einsum("cq,nq,nr->cr", bases, coef, coef)
            bases = bases * up / (down + 1e-6)
    return torch.einsum("cr,nr->cn", bases, coef)


@pytest.mark.parametrize("training", [True, False])
def test_nmf_and_its_gradient_are_those_of_plain_loops(training):
    nmf = NMF(channels=6, bases=4).train(training)
    x, weight = torch.rand(2, 6, 3, 5, requires_grad=True), torch.randn(2, 6, 3, 5)
    torch.manual_seed(3)  # training draws its bases from the global generator
    y = nmf(x)
    (y * weight).sum().backward()
    torch.manual_seed(3)
    start = torch.rand(2, 6, 4) if training else torch.rand(1, 6, 4, generator=torch.Generator().manual_seed(0))
    start = (start / start.pow(2).sum(1, keepdim=True).sqrt()).double().expand(2, 6, 4)
    x64 = x.detach().double().requires_grad_()
    want = torch.stack([factorise(image.flatten(1), bases, 6 if training else 7) for image, bases in zip(x64, start)])
    (want.view_as(x) * weight).sum().backward()
    assert torch.allclose(y.double(), want.view_as(x), atol=1e-5)
    assert torch.allclose(x.grad.double(), x64.grad, rtol=1e-3, atol=1e-4)  # through every update


def test_nmf_in_evaluation_is_one_function_of_the_image_in_fp32():
    x, nmf, state = torch.rand(3, 32, 6, 8), NMF(32, 16).eval(), torch.get_rng_state()
    assert torch.allclose(nmf(x)[2:], NMF(32, 16).eval()(x[2:]), atol=1e-5) and nmf(0 * x).eq(0).all()
    assert torch.equal(torch.get_rng_state(), state) and not nmf.state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        low = nmf(x.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.equal(low, nmf(x.bfloat16().float()).bfloat16())


def official(body):
    """The body's encoder as the authors' own file: their names, a wrapper, a classifier."""
    state = {key.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv."): tensor + 1
             for key, tensor in body.backbone.state_dict().items()}
    return {"state_dict": {**state, "head.weight": torch.zeros(1000, 256), "head.bias": torch.zeros(1000)}, "epoch": 3}


def test_published_files_load_strictly(body):
    wrapped, other = official(body), SegNeXt("t")
    assert {"patch_embed1.proj.4.running_var", "patch_embed2.norm.weight", "block3.4.layer_scale_2", "norm1.weight",
            "block1.0.attn.spatial_gating_unit.conv2_1.weight", "block1.0.mlp.dwconv.dwconv.weight",
            "block4.1.mlp.fc2.bias"} <= wrapped["state_dict"].keys()
    load_mscan(other, wrapped)
    for key, tensor in other.backbone.state_dict().items():
        assert torch.equal(tensor, body.backbone.state_dict()[key] + 1), key
    bare = {k: t for k, t in body.backbone.state_dict().items() if not k.endswith("num_batches_tracked")}
    load_mscan(other, bare)  # WEIGHTS' own names, without a wrapper; counters may be missing
    before = body.backbone.norm2.bias.clone()
    assert torch.equal(other.backbone.norm2.bias, before)
    for change, words in (
            (lambda s: s.pop("block3.2.attn.proj_1.bias"), "1 tensors differ.*block3.2.attn.proj_1.bias, is missing"),
            (lambda s: s.update(extra=torch.zeros(1)), "1 tensors differ.*extra, is unexpected"),
            (lambda s: s.update({"norm1.bias": torch.zeros(7)}), r"norm1.bias has shape \(7,\), expected \(32,\)")):
        checkpoint = official(body)
        change(checkpoint["state_dict"])
        with pytest.raises(SegNeXtError, match=words):
            load_mscan(other, checkpoint)
        assert torch.equal(other.backbone.norm2.bias, before)
