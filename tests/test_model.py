"""The head, the bodies and the segmenter: what is frozen, what is trained, what is saved."""
import pytest
import torch
from torch.nn.functional import normalize

import bodies
import clip
import model as models
from clip_head import CSH


def x(B=2, C=16, h=4, w=6):
    return torch.randn(B, C, h, w)


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_csh_is_the_tail_of_clip(tiny_clip, n):
    """With CLIP's own tokens in place of the adapter's, the head gives CLIP's own dense embeddings."""
    visual = tiny_clip.visual
    head = CSH(visual, visual.width, frozen_blocks=n).eval()
    seen = {}
    if n:
        visual.transformer.resblocks[4 - n].register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    else:
        visual.ln_post.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    want = visual(torch.rand(2, 3, 64, 64))  # (B, 1+N, D); keep CLS in, as attention saw it
    head.adapter = torch.nn.Identity()
    got = head.clip(seen["x"], 8, 8, "qk")
    assert torch.allclose(got, want, atol=1e-5)


def test_csh_output_is_unit_length_on_the_grid(tiny_clip):
    for attention in ("qk", "vv", "self"):
        for positional in (False, True):
            z = CSH(tiny_clip.visual, 16, 1, attention, positional)(x())
            assert z.shape == (2, 128, 4, 6)
            assert torch.allclose(z.norm(dim=1), torch.ones(2, 4, 6), atol=1e-5)
    with pytest.raises(ValueError, match="0 to 4"):
        CSH(tiny_clip.visual, 16, 5)


def test_positions_matter_only_when_asked(tiny_clip):
    """Without the positional term the head commutes with any permutation of positions; with it, it does not."""
    torch.manual_seed(0)
    features, order = x(1), torch.randperm(24)
    shuffled = features.flatten(2)[..., order].unflatten(2, (4, 6))
    for positional in (False, True):
        head = CSH(tiny_clip.visual, 16, 1, positional=positional)
        same = torch.allclose(head(features).flatten(2)[..., order], head(shuffled).flatten(2), atol=1e-5)
        assert same != positional


@pytest.mark.parametrize("head", ["csh", "linear", "random"])
def test_training_moves_adapter_and_body_and_nothing_of_clip(tiny_clip, head):
    model = models.build(tiny_clip, head=head, frozen_blocks=2, positional=head == "csh").train()
    if head != "linear":
        assert model.head.training and not any(m.training for m in model.head.clip.modules())
    before = {k: v.clone() for k, v in model.state_dict().items()}
    teacher = {k: v.clone() for k, v in tiny_clip.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        model(torch.rand(2, 3, 32, 32))[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("head.clip."), name
    assert all(torch.equal(v, teacher[k]) for k, v in tiny_clip.state_dict().items())
    assert len(model.trained_state()) == sum(not k.startswith("head.clip.") for k in before)


def test_random_head_has_clips_shape_and_not_its_weights(tiny_clip):
    csh, random = (models.build(tiny_clip, head=h).head for h in ("csh", "random"))
    for (name, a), b in zip(csh.clip.named_parameters(), random.clip.parameters()):
        assert a.shape == b.shape
        assert name.startswith("ln") or "ln_" in name or "bias" in name or not torch.equal(a, b), name
    again = models.build(tiny_clip, head="random").head
    assert all(torch.equal(a, b) for a, b in zip(random.clip.parameters(), again.clip.parameters()))


def test_linear_control_has_the_same_normalisation(tiny_clip):
    csh, linear = (models.build(tiny_clip, head=h).head for h in ("csh", "linear"))
    assert torch.equal(csh.adapter.norm.weight, linear.adapter.norm.weight)
    assert csh.adapter.project.weight.shape == linear.adapter.project.weight.shape


def test_a_trained_state_round_trips_without_the_image_tower(tiny_clip, tiny_clip_file, tmp_path):
    torch.manual_seed(1)
    model = models.build(tiny_clip).eval()
    torch.save(model.trained_state(), tmp_path / "state.pt")
    fresh_clip = clip.load(tiny_clip_file)
    fresh = models.build(fresh_clip).eval()
    del fresh_clip.visual
    fresh.load_trained_state(torch.load(tmp_path / "state.pt", weights_only=True))
    for m in (model, fresh):
        m.set_classes(["red circle", "blue ring"], ["a photo of {}"])
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.logits(images), fresh.logits(images))
    with pytest.raises(bodies.ModelError, match="another body or head"):
        models.build(tiny_clip, head="linear").load_trained_state(model.trained_state())


def test_body_sees_imagenets_normalisation(tiny_clip, monkeypatch):
    from torchvision.transforms.v2.functional import normalize as standardise
    model, images, seen = models.build(tiny_clip), torch.rand(2, 3, 32, 32), []
    model.body.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(images)
    assert torch.allclose(seen[0], standardise(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), atol=1e-6)


def test_set_classes_at_any_time(tiny_clip):
    model = models.build(tiny_clip)
    templates = ["a photo of {}", "{}"]
    model.set_classes(["cat", "dog, hound"], templates)

    def embed(text):
        return normalize(tiny_clip.encode_text(clip.tokenize(text))[0], dim=0)

    cat = normalize(embed("a photo of cat") + embed("cat"), dim=0)
    dog = normalize(sum(embed(t) for t in ("a photo of dog", "dog", "a photo of hound", "hound")), dim=0)
    assert torch.allclose(model.t, torch.stack([cat, dog]), atol=1e-5)
    assert model.logits(torch.rand(1, 3, 32, 32)).shape == (1, 2, 8, 8)
    model.set_classes(["a", "b", "c"], templates)
    assert model.logits(torch.rand(1, 3, 32, 32)).shape == (1, 3, 8, 8)


def test_names_longer_than_this_clip_reads_say_so(tiny_clip):
    tiny_clip.context_length = 6
    with pytest.raises(clip.CLIPError, match="text has 7 tokens, at most 6 fit"):
        models.text_embeddings(tiny_clip, ["cat"], ["a photo of {} here"])


def test_text_embeddings_are_cached_by_content(tiny_clip, tmp_path, monkeypatch):
    monkeypatch.setattr(clip, "CACHE", tmp_path)
    encode, calls = tiny_clip.encode_text, []
    monkeypatch.setattr(tiny_clip, "encode_text", lambda tokens: calls.append(1) or encode(tokens))
    first = models.text_embeddings(tiny_clip, ["cat", "dog"], ["a {}"])
    assert len(calls) == 2
    assert torch.equal(models.text_embeddings(tiny_clip, ["cat", "dog"], ["a {}"]), first) and len(calls) == 2
    assert torch.equal(models.text_embeddings(tiny_clip, ["dog", "cat"], ["a {}"]), first.flip(0)) and len(calls) == 4
    kept, = [path for path in tmp_path.iterdir() if torch.equal(torch.load(path), first)]
    kept.write_bytes(b"damaged")
    assert torch.equal(models.text_embeddings(tiny_clip, ["cat", "dog"], ["a {}"]), first) and len(calls) == 6
    tiny_clip.text_projection[0, 0] += 1  # another CLIP
    assert not torch.equal(models.text_embeddings(tiny_clip, ["cat", "dog"], ["a {}"]), first) and len(calls) == 8


@pytest.mark.parametrize("name", bodies.BODIES)
def test_bodies(name, tiny_clip):
    model = models.build(tiny_clip, body=name, body_weights="none").train()
    z = model(torch.rand(1, 3, 64, 96))  # one image a batch
    stride = 4 if name == "small" else 16
    assert z.shape == (1, 128, 64 // stride, 96 // stride)
    if name in ("mobilenet-v2", "segnext-t"):
        assert bodies.build_body(name, "none", stride=8)(torch.rand(1, 3, 64, 96)).shape == (1, 256, 8, 12)
        assert bodies.build_body(name, "none").eval()(torch.rand(1, 3, 72, 88)).shape == (1, 256, 5, 6)  # rounded up
    z[:, 0].sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without


def test_torchvision_weights_load_from_a_file_or_say_why(tmp_path, tiny_clip):
    from torchvision.models import mobilenet_v2
    torch.manual_seed(0)
    network = mobilenet_v2()
    torch.save(network.state_dict(), tmp_path / "w.pth")
    body = bodies.build_body("mobilenet-v2", tmp_path / "w.pth").eval()
    images = torch.rand(1, 3, 64, 64)
    assert torch.allclose(body.stages(images)[3], network.eval().features(images))
    (tmp_path / "bad.pth").write_bytes(b"no")
    with pytest.raises(bodies.ModelError, match="put https://.*mobilenet_v2.*pth at .*--body-weights"):
        bodies.build_body("mobilenet-v2", tmp_path / "bad.pth")
    with pytest.raises(bodies.ModelError, match="choose one of small"):
        models.build(tiny_clip, body="vgg")
