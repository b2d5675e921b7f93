"""SegNeXt: shapes, published sizes, the attention and the factorisation against plain loops, strict loading."""
import pytest
import torch
import torch.nn.functional as F

import bodies
from bodies.segnext import MSCA, NMF, Block, SegNeXt


@pytest.fixture(scope="module")
def body():
    torch.manual_seed(0)
    return SegNeXt("t").eval()


def test_stages_and_dense_features(body):
    images, ham = torch.randn(2, 3, 65, 104), body.decoder
    stages, x = body.backbone(images), images
    for i, (stage, C, stride) in enumerate(zip(stages, (32, 64, 160, 256), (4, 8, 16, 32)), 1):
        embed, blocks = (body.backbone.get_submodule(f"{part}{i}") for part in ("patch_embed", "block"))
        x = F.layer_norm(blocks(embed(x)).movedim(1, -1), (C,)).movedim(-1, 1)  # and so into the next stage
        assert stage.shape == (2, C, -(-65 // stride), -(-104 // stride)) and torch.allclose(stage, x, atol=1e-4)
    squeezed = ham.squeeze(torch.cat([F.interpolate(s, (9, 13), mode="bilinear") for s in stages[1:]], 1)).relu()
    low_rank = ham.ham_out(ham.ham(ham.ham_in(squeezed).relu()))
    x = ham.align((squeezed + low_rank).relu()).relu()
    assert torch.allclose(ham(stages), x, atol=1e-5) and x.shape == (2, body.out_channels, 9, 13)
    y = body(images)
    assert y.shape[2:] == (5, 7) and torch.allclose(y[..., :4, :6], F.avg_pool2d(x, 2), atol=1e-5)


@pytest.mark.parametrize("size, millions, bases", [("t", 4.3, 16), ("s", 13.9, 16), ("b", 27.6, 64), ("l", 48.9, 64)])
def test_parameters_are_the_published_ones(size, millions, bases):
    body = SegNeXt(size)
    count = sum(p.numel() for p in body.parameters()) + 150 * body.out_channels + 150  # with ADE20K's classifier
    assert round(count / 1e6, 1) == millions and body.decoder.ham.start.shape == (1, body.out_channels, bases)


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
    with torch.no_grad():
        y = x + 0.01 * (block.norm1(x) + block.attn(block.norm1(x)))
        assert torch.allclose(block(x), y + 0.01 * block.mlp(block.norm2(y)), atol=1e-6)


def test_drop_path_drops_whole_images_and_keeps_the_mean(body):
    rates = [b.drop_path.p for i in (1, 2, 3, 4) for b in body.backbone.get_submodule(f"block{i}")]
    assert rates == pytest.approx([0.1 * i / 12 for i in range(13)])
    block, x = Block(8, 4, 0.3), torch.randn(1, 8, 4, 4).expand(2000, -1, -1, -1)
    kept = (block(x) != x).flatten(1)  # of two branches
    assert torch.equal(kept.all(1), kept.any(1)) and abs(kept.float().mean() - (1 - 0.3 ** 2)) < 0.03


def factorise(x, bases, steps):
    """The NMF of one image by Lee & Seung's updates. x (C, N), bases (C, R), float64."""
    coef = torch.stack([torch.stack([position @ basis for basis in bases.T]).softmax(0) for position in x.T])  # (N, R)
    for step in range(steps + 1):
        coef = coef * (x.T @ bases) / (coef @ bases.T @ bases + 1e-6)
        if step < steps:
            bases = bases * (x @ coef) / (bases @ coef.T @ coef + 1e-6)
    return bases @ coef.T


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
    assert torch.allclose(nmf(x)[2:], nmf(x[2:]), atol=1e-5) and nmf(0 * x).eq(0).all()
    assert torch.equal(torch.get_rng_state(), state) and not nmf.state_dict()
    with torch.autocast("cpu", torch.bfloat16):
        low = nmf(x.bfloat16())
    assert low.dtype == torch.bfloat16 and torch.equal(low, nmf(x.bfloat16().float()).bfloat16())


def test_names_are_those_of_the_published_files(body, tmp_path):
    """The authors' own file has a wrapper, a classifier and one layer under another name."""
    ours = {key: x for key, x in body.backbone.state_dict().items() if x.is_floating_point()}
    theirs = {key.replace(".mlp.dwconv.", ".mlp.dwconv.dwconv."): x + 1 for key, x in ours.items()}
    assert {"patch_embed1.proj.4.running_var", "patch_embed2.norm.weight", "block3.4.layer_scale_2", "norm1.weight",
            "block1.0.attn.spatial_gating_unit.conv2_1.weight", "block1.0.mlp.dwconv.dwconv.weight",
            "block4.1.mlp.fc2.bias"} <= theirs.keys()
    torch.save({"state_dict": theirs | {"head.weight": torch.zeros(1000, 256)}, "epoch": 3}, tmp_path / "w.pth")
    loaded = bodies.build_body("segnext-t", tmp_path / "w.pth").backbone.state_dict()
    assert all(torch.equal(loaded[key], x + 1) for key, x in ours.items())
