"""The head and the segmenter: what is frozen, trained, saved; words to classes; the labels of whole pictures."""
import resource

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import finish, segmenter, start
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import normalize as standardise

import clip
import model as models
from bodies import ModelError
from clip_head import CSH


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_csh_is_the_tail_of_clip(tiny_clip, n):
    """CLIP's own tokens in place of the adapter's give CLIP's own dense embeddings, unit length, in their places."""
    visual, tokens = tiny_clip.visual, {}
    head = CSH(visual, visual.width, frozen_blocks=n).eval()
    part = visual.transformer.resblocks[4 - n] if n else visual.ln_post
    part.register_forward_pre_hook(lambda _, args: tokens.update(x=args[0]))
    want = normalize(visual(torch.rand(2, 3, 64, 64)), dim=-1)  # (B, 65, D); CLS stays in, as attention saw it
    head.adapter = nn.Sequential(nn.Flatten(2), nn.Module())
    head.adapter[1].forward = lambda x: x.transpose(1, 2)
    z = head(tokens["x"].transpose(1, 2).unflatten(2, (5, 13)))
    assert z.shape == (2, 128, 5, 13) and torch.allclose(z.flatten(2).transpose(1, 2), want, atol=1e-5)


@pytest.mark.parametrize("head", ["csh", "linear", "random"])
def test_training_moves_adapter_and_body_and_nothing_of_clip(tiny_clip, head):
    model = models.build(tiny_clip, head=head, frozen_blocks=2).train()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = {k: v.clone() for k, v in tiny_clip.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        z = model(torch.rand(2, 3, 32, 32))
        assert torch.allclose(z.norm(dim=1), torch.ones(2, 8, 8), atol=1e-5)
        z[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = {name for name in before if name.startswith("head.tail.") and head != "linear"}
    assert {name for name, value in model.state_dict().items() if torch.equal(value, before[name])} == frozen
    assert all(torch.equal(v, teacher[k]) for k, v in tiny_clip.state_dict().items())
    assert model.trained_state().keys() == before.keys() - frozen
    assert len(frozen) == (0 if head == "linear" else 27)  # of two blocks, ln_post and proj


def test_controls_differ_from_the_head_in_what_they_say_alone(tiny_clip):
    heads = []
    for seed, name in ((1, "csh"), (1, "random"), (1, "linear"), (2, "random")):
        torch.manual_seed(seed)
        heads.append(models.build(tiny_clip, head=name, frozen_blocks=2).head)
    csh, random, linear, again = heads
    for head in (random, linear):  # the same adapter, from the same weights
        assert all(torch.equal(*pair) for pair in zip(csh.adapter.parameters(), head.adapter.parameters()))
    assert not torch.equal(random.adapter.project.weight, again.adapter.project.weight)  # of another seed
    assert linear.tail.weight.shape == (128, 96) and linear.tail.bias is None
    ours, theirs = csh.tail.state_dict(), random.tail.state_dict()
    assert ours.keys() == theirs.keys() and {key.split(".")[0] for key in ours} == {"resblocks", "ln_post", "proj"}
    for key, tensor in theirs.items():  # weights as CLIP had them before its training, always the same ones
        assert tensor.shape == ours[key].shape and torch.equal(tensor, again.tail.state_dict()[key])
        assert "ln_" in key or "bias" in key or not torch.equal(tensor, ours[key]), key


def test_a_trained_state_round_trips_without_the_image_tower(tiny_clip, tiny_clip_file, tmp_path):
    model = models.build(tiny_clip).eval()
    torch.save(model.trained_state(), tmp_path / "state.pt")
    other = clip.load(tiny_clip_file)
    fresh = models.build(other).eval()
    del other.visual
    fresh.load_trained_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for m in (model, fresh):
        m.set_classes(["cat", "night sky"], ["a photo of {}"])
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.logits(images), fresh.logits(images))
    with pytest.raises(ModelError, match="another body or head"):
        models.build(tiny_clip, head="linear").load_trained_state(model.trained_state())


# ---------------------------------------------------------------- build


class Stripes(nn.Module):
    """The smallest body there is."""
    out_channels = 5

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 8, 8)

    def forward(self, x):
        return self.conv(x)


def test_any_module_with_out_channels_is_a_body_and_sees_imagenets_normalisation(tiny_clip):
    images, body, seen = torch.rand(2, 3, 32, 48), Stripes(), []
    body.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    body.conv.bias.requires_grad_(False)
    model = models.build(tiny_clip, body=body)
    assert model(images).shape == (2, 128, 4, 6) and "body.conv.bias" in model.trained_state()  # frozen, but its own
    assert torch.allclose(seen[0], standardise(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), atol=1e-6)


def test_a_network_of_timm_is_a_body(tiny_clip):
    timm = pytest.importorskip("timm")

    class Timm(nn.Module):
        def __init__(self, name):
            super().__init__()
            self.net = timm.create_model(name, features_only=True, out_indices=[2])
            self.out_channels = self.net.feature_info.channels()[-1]

        def forward(self, x):
            return self.net(x)[-1]

    model = models.build(tiny_clip, body=Timm("resnet10t"))
    z = model(torch.rand(2, 3, 64, 96))
    assert z.shape == (2, 128, 8, 12)
    z[:, 0].sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_settings_that_build_does_not_know(tiny_clip):
    with pytest.raises(TypeError, match="frozen_block"):
        models.build(tiny_clip, frozen_block=2)
    for wrong, words in (({"head": "mlp"}, "no head 'mlp': choose csh, linear, random"),
                         ({"body": "vgg"}, "no body 'vgg': choose one of small")):
        with pytest.raises(ModelError, match=words):
            models.build(tiny_clip, **wrong)
    for n in (-1, 5):
        with pytest.raises(clip.CLIPError, match="0 to 4"):
            models.build(tiny_clip, frozen_blocks=n)
    assert models.build(tiny_clip).tau == pytest.approx(0.07, rel=1e-3)  # CLIP's own
    assert models.build(tiny_clip, temperature=0.5).tau == 0.5


# ---------------------------------------------------------------- words


def test_classes_are_set_at_any_time_with_synonyms_and_underscores(tiny_clip):
    model, templates = models.build(tiny_clip), ["a photo of {}", "{}"]

    def embed(*texts):
        each = [normalize(tiny_clip.encode_text(clip.tokenize(text))[0], dim=0) for text in texts]
        return normalize(sum(each), dim=0)

    model.set_classes(["cat", "dog,  hound, ", "potted_plant"], templates)
    want = [embed("a photo of cat", "cat"), embed("a photo of dog", "dog", "a photo of hound", "hound"),
            embed("a photo of potted plant", "potted plant")]
    assert torch.allclose(model.t, torch.stack(want), atol=1e-5)
    images = torch.rand(1, 3, 32, 32)
    logits = torch.einsum("bdhw,kd->bkhw", model(images), model.t) / model.tau
    assert torch.allclose(model.logits(images), logits, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.logits(images)
    assert low.dtype == torch.float32 and not torch.equal(low, low.bfloat16().float())  # z · t / τ is not rounded
    model.set_classes(["a", "b"], templates)
    assert model.logits(images).shape == (1, 2, 8, 8) and "t" not in model.state_dict()
    tiny_clip.context_length = 6
    with pytest.raises(clip.CLIPError, match="text has 7 tokens, at most 6 fit"):
        model.set_classes(["cat"], ["a photo of {} here"])


def test_the_text_tower_runs_where_the_model_lies(tiny_clip, monkeypatch):
    devices = []
    monkeypatch.setattr(tiny_clip, "encode_text", lambda tokens: devices.append(tokens.device.type)
                        or torch.ones(len(tokens), 128))
    tiny_clip.to("meta")
    models.text_embeddings(tiny_clip, ["cat", "dog"], ["{}"])
    assert devices == ["meta", "meta"] and not clip.CACHE.exists()


# ---------------------------------------------------------------- labels of whole pictures


WEIGHT = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))


def by_colour(images):
    """Logits that are fixed random functions of colour at stride 4: every class wins somewhere."""
    small = F.avg_pool2d(images, 4, ceil_mode=True)
    return torch.einsum("kc,bchw->bkhw", WEIGHT, small - 0.5) * (1 + small.mean(dim=(1, 2, 3), keepdim=True))


@pytest.mark.parametrize("band", [1000, 2**23])
@pytest.mark.parametrize("size, short", [((40, 40), 64), ((64, 64), 64), ((30, 90), 64), ((101, 77), 90), ((5, 70), 64),
                                         ((200, 260), 50)])
def test_labels_against_a_loop(size, short, band, monkeypatch):
    """Resized to the test size, windows of 64 every 40, averaged, back to the picture's own size, lowered, argmax."""
    monkeypatch.setattr("losses.BAND", band)
    torch.manual_seed(0)
    image = torch.rand(1, 3, 6, 8)
    image = (255 * F.interpolate(image, size, mode="bicubic").clamp(0, 1)[0]).byte()
    lowered = torch.stack([torch.zeros(20), 0.3 * (torch.arange(20) < 15)])
    got = segmenter(by_colour, 20).label(image, short, 64, 40, lowered)
    assert got.shape == (2, *size) and got.dtype == torch.uint8

    factor = min(short / min(size), 8)
    h, w = (round(side * factor) for side in size)
    picture = F.interpolate(image[None].float() / 255, (h, w), mode="bilinear", antialias=True)
    total, count = torch.zeros(20, h, w), torch.zeros(h, w)
    for top in [0] if h <= 64 else [*[y for y in range(0, h, 40) if y + 64 < h], h - 64]:
        for left in [0] if w <= 64 else [*[x for x in range(0, w, 40) if x + 64 < w], w - 64]:
            part = picture[:, :, top:top + 64, left:left + 64]
            up = F.interpolate(by_colour(part), part.shape[2:], mode="bilinear")[0]
            total[:, top:top + 64, left:left + 64] += up
            count[top:top + 64, left:left + 64] += 1
    scores = F.interpolate((total / count)[None], size, mode="bilinear")[0]
    for labels, off in zip(got, lowered):
        want = (scores - off[:, None, None]).argmax(0)
        assert (labels == want).float().mean() > 0.999  # ties in rounding aside
    assert (got[0] != got[1]).any()
    assert torch.equal(segmenter(by_colour, 20).label(image, short, 64, 40), got[:1])  # lowered by nothing

    tau, cosine = 0.2, 0.2 * scores  # the threshold is one of cosines, of the winner after it was lowered
    best = cosine.gather(0, got[1:].long())[0]
    middle = best.median().item()
    kept = segmenter(by_colour, 20, tau).label(image, short, 64, 40, lowered, middle)[1]
    assert (kept != 255).eq(best >= middle).float().mean() > 0.999 and (kept == 255).any()
    assert torch.equal(kept[kept != 255], got[1][kept != 255])


def large(H, W):
    def logits(images):  # the worst case: any class may win anywhere
        return torch.randn(len(images), 100, images.shape[2] // 16, images.shape[3] // 16)

    image = torch.randint(0, 256, (3, H, W), dtype=torch.uint8)
    assert segmenter(logits, 100).label(image, 512, 512, 426).shape == (1, H, W)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2)  # GiB


@pytest.mark.parametrize("size, most", [((2000, 2500), 1.0), pytest.param((4000, 5000), 1.4, marks=pytest.mark.slow)])
def test_a_large_picture_takes_little_memory(size, most, tmp_path):
    """100 score maps of these pictures would be 1.9 and 7.5 GiB. The limit for the second is 1.5 GB."""
    assert float(finish(*start(tmp_path, large, *size)).stdout) < most
