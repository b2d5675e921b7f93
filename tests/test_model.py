"""The head and the segmenter: what is frozen, trained, saved; words to classes."""
import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT
from torch.nn.functional import normalize
from torchvision.transforms.v2.functional import normalize as standardise

import clip
import model as models
from bodies import ModelError
from clip_head import CSH, clip_tokens
from toy import world


@pytest.mark.parametrize("n", [0, 1, 2, 4])
def test_csh_is_the_tail_of_clip(tiny_clip, n):
    """CLIP's own tokens in place of the adapter's give CLIP's own dense embeddings, unit length, in their places."""
    visual, tokens = tiny_clip.visual, {}
    head = CSH(visual, visual.width, n, False).eval()
    part = visual.transformer.resblocks[4 - n] if n else visual.ln_post
    part.register_forward_pre_hook(lambda _, args: tokens.update(x=args[0]))
    want = normalize(visual(torch.rand(2, 3, 64, 64)), dim=-1)  # (B, 65, D); CLS stays in, as attention saw it
    head.adapter = nn.Sequential(nn.Flatten(2), nn.Module())
    head.adapter[1].forward = lambda x: x.transpose(1, 2)
    z = head(tokens["x"].transpose(1, 2).unflatten(2, (5, 13)))
    assert z.shape == (2, 128, 5, 13) and torch.allclose(z.flatten(2).transpose(1, 2), want, atol=1e-5)


def test_the_adapter_starts_at_clips_own_tokens(tiny_clip):
    """They are what the last block gets inside the teacher; the adapter's outputs then have their mean and spread."""
    torch.manual_seed(0)
    images, seen = torch.rand(8, 3, 64, 64), []
    last = tiny_clip.visual.transformer.resblocks[-1]
    hook = last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    tiny_clip.encode_image(images)
    hook.remove()
    with pytest.raises(clip.CLIPError, match="9 frozen blocks asked for: this CLIP has 0 to 4"):
        clip_tokens(tiny_clip.visual, images, 9)
    tokens = clip_tokens(tiny_clip.visual, images, 1)
    assert torch.allclose(tokens, seen[0][:, 1:], atol=1e-6)
    tokens = torch.linspace(1, 5, 96) * tokens + torch.arange(96.0) / 96  # each channel has its own
    head = CSH(tiny_clip.visual, 96, 1, False)
    head.adapter.start_like(tokens)
    torch.nn.init.zeros_(head.adapter.project.bias)
    out = head.adapter(torch.randn(4, 96, 40, 40))
    assert torch.allclose(out.mean((0, 1)), tokens.mean((0, 1)), atol=0.3)
    assert torch.allclose(out.std((0, 1)), tokens.flatten(0, 1).std(0), rtol=0.3)


def test_without_attention_the_head_does_what_gives_the_teachers_patches(tiny_clip):
    visual, images = tiny_clip.visual, torch.rand(2, 3, 64, 64)
    found = CSH(visual, 96, 1, True).tail(clip_tokens(visual, images, 1))
    assert torch.allclose(found, visual.cls_and_patches(images)[1], atol=1e-5)


def test_the_frozen_block_is_not_drowned():
    """At this start CLIP's block changes what comes out; at tokens four times as large it hardly would."""
    toy, images = clip.load(ROOT / "toy/clip.pt"), torch.stack([
        torch.from_numpy(world.draw(np.random.RandomState(seed))[0]).permute(2, 0, 1) for seed in range(16)]) / 255
    head = CSH(toy.visual, 128, 1, False)
    head.adapter.start_like(clip_tokens(toy.visual, images, 1))
    features = torch.randn(2, 128, 16, 16)
    for scale, least, most in ((1, 0, 0.9), (4, 0.94, 1)):
        tokens, tail = scale * head.adapter(features), head.tail
        without = normalize(tail.ln_post(tokens) @ tail.proj, dim=-1)
        assert least < (normalize(tail(tokens), dim=-1) * without).sum(-1).mean() < most


@pytest.mark.parametrize("head", ["csh", "linear", "random"])
def test_training_moves_and_a_checkpoint_holds_adapter_and_body_and_nothing_of_clip(head, tiny_clip, tiny_clip_file):
    model, other = models.build(tiny_clip, head=head, frozen_blocks=2).train(), clip.load(tiny_clip_file)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for _ in range(2):
        z = model(torch.rand(2, 3, 32, 32))
        assert torch.allclose(z.norm(dim=1), torch.ones(2, 8, 8), atol=1e-5)
        z[:, 0].sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    frozen = {name for name in before if name.startswith("head.tail.") and head != "linear"}
    assert {name for name, value in model.state_dict().items() if torch.equal(value, before[name])} == frozen
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in tiny_clip.state_dict().items())
    assert model.trained_state().keys() == before.keys() - frozen
    fresh = models.build(other, head=head, frozen_blocks=2)
    del other.visual
    fresh.load_trained_state(model.trained_state())
    images = torch.rand(1, 3, 64, 64)
    assert torch.equal(model.eval()(images), fresh.eval()(images))


def test_controls_differ_from_the_head_in_what_they_say_alone(tiny_clip):
    states = []
    for seed, name in ((1, "csh"), (1, "linear"), (1, "random"), (2, "random")):
        torch.manual_seed(seed)
        model = models.build(tiny_clip, head=name, frozen_blocks=2)
        states.append(model.head.state_dict())
    csh, linear, random, again = states
    assert linear["tail.weight"].shape == (128, 96) and "tail.bias" not in linear and csh.keys() == random.keys()
    for key, tensor in random.items():  # the adapters follow the seed, the random weights do not
        assert tensor.shape == csh[key].shape and torch.equal(tensor, again[key]) == ("adapter.project" not in key), key
        if key.startswith("adapter"):
            assert torch.equal(tensor, csh[key]) and torch.equal(tensor, linear[key]), key
        else:
            assert "ln_" in key or "bias" in key or not torch.equal(tensor, csh[key]), key
    with pytest.raises(ModelError, match="another body or head"):
        model.load_trained_state(models.build(tiny_clip, head="linear").trained_state())


def test_any_module_with_out_channels_is_a_body_and_sees_imagenets_normalisation(tiny_clip):
    images, body, seen = torch.rand(2, 3, 32, 48), nn.Conv2d(3, 5, 8, 8), []
    body.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    body.bias.requires_grad_(False)
    model = models.build(tiny_clip, body=body)
    assert model(images).shape == (2, 128, 4, 6) and "body.bias" in model.trained_state()  # frozen, but its own
    assert torch.allclose(seen[0], standardise(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), atol=1e-6)
    assert model.tau == pytest.approx(0.07, rel=1e-3)  # CLIP's own


@pytest.mark.parametrize("wrong, message", [
    ({"head": "mlp"}, "no head 'mlp' with attention 'clip': choose csh"), ({"body": "vgg"}, "no body 'vgg': choose"),
    ({"head_attention": "none"}, "no head 'csh' with attention 'none'"), ({"frozen_blocks": -1}, "0 to 4"),
    ({"frozen_blocks": 5}, "0 to 4")])
def test_settings_that_build_does_not_know(wrong, message, tiny_clip):
    with pytest.raises((ModelError, clip.CLIPError), match=message):
        models.build(tiny_clip, **wrong)


def test_classes_are_set_at_any_time_with_synonyms_and_underscores(tiny_clip):
    model, templates = models.build(tiny_clip), ["a photo of {}", "{}"]

    def embed(*texts):
        each = [normalize(tiny_clip.encode_text(clip.tokenize(text))[0], dim=0) for text in texts]
        return normalize(sum(each), dim=0)

    model.set_classes(["cat", "dog,  hound, ", "potted_plant"], templates)
    want = [embed("a photo of cat", "cat"), embed("a photo of dog", "dog", "a photo of hound", "hound"),
            embed("a photo of potted plant", "potted plant")]
    assert torch.allclose(model.t, torch.stack(want), atol=1e-5) and "t" not in model.state_dict()
    images = torch.rand(1, 3, 32, 32)
    logits = torch.einsum("bdhw,kd->bkhw", model(images), model.t) / model.tau
    assert torch.allclose(model.logits(images), logits, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        low = model.logits(images)
    assert low.dtype == torch.float32 and not torch.equal(low, low.bfloat16().float())  # z · t / τ is not rounded
    tiny_clip.context_length = 6
    model.set_classes(["a", "b"], templates)
    assert model.logits(images).shape == (1, 2, 8, 8)
    with pytest.raises(clip.CLIPError, match="text has 7 tokens, at most 6 fit"):
        model.set_classes(["cat"], ["a photo of {} here"])


def test_the_text_tower_runs_where_the_model_lies(tiny_clip, monkeypatch):
    devices = []
    monkeypatch.setattr(tiny_clip, "encode_text", lambda tokens: devices.append(tokens.device.type)
                        or torch.ones(len(tokens), 128))
    models.text_embeddings(tiny_clip.to("meta"), ["cat", "dog"], ["{}"])
    assert devices == ["meta", "meta"]
