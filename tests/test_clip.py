"""clip/ against its peers on random weights: OpenAI's own code (clip-anytorch), open_clip, transformers."""
import json
import random
import runpy
import string
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from torch.nn.functional import cosine_similarity

import clip
from clip.model import IMAGE_MEAN, IMAGE_STD
from clip.tokenizer import tokenizer

# image side, patch, width, heads, layers, MLP width, joint width; text width, heads, layers: OpenAI's, with two blocks
B16, L14 = (224, 16, 768, 12, 2, 3072, 512, 128, 2, 2), (224, 14, 1024, 16, 2, 4096, 768, 128, 2, 2)
ODD = (75, 10, 160, 2, 11, 500, 96, 72, 3, 2)
TEXTS = ["a photo of a cat", "the diningtable &amp; two pottedplants, 1997", "ein Café über der Straße 🐈"]


def peer(module):
    """What is in a file of OpenAI's code, whose package has the name of ours."""
    files = [Path(p) / "clip" / f"{module}.py" for p in sys.path]
    if not (found := [file for file in files if file.is_file() and ROOT not in file.parents]):
        pytest.skip("clip-anytorch is not installed")
    return SimpleNamespace(**runpy.run_path(str(found[0])))


def perturbed(model):
    """Biases start at 0 and norms at 1: a swap of two would not show."""
    torch.manual_seed(0)
    for p in model.eval().requires_grad_(False).parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model


def normalised(images):
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    return (images - mean) / std


def agree(paths, side, encode_image, encode_text):
    """Ours from each file gives the peer's features -> the fingerprints of ours."""
    images, tokens, seen = torch.rand(2, 3, side, side), clip.tokenize(TEXTS), set()
    wanted = encode_image(normalised(images)), encode_text(tokens)
    for path in paths:
        ours = clip.load(path)
        assert not ours.training and not any(p.requires_grad or p.dtype != torch.float32 for p in ours.parameters())
        for got, want in zip((ours.encode_image(images), ours.encode_text(tokens)), wanted):
            assert (got - want).abs().max() < 1e-4 and (1 - cosine_similarity(got, want)).abs().max() < 1e-4
        seen.add(clip.fingerprint(ours))
    return seen


@pytest.mark.parametrize("shape", [B16, L14])
def test_openai_model_as_state_dict_and_as_torchscript_archive(shape, tmp_path):
    side, patch, width, _, layers, _, joint, *text = shape
    theirs = perturbed(peer("model").CLIP(joint, side, layers, width, patch, 77, 49408, *text)).half().float()
    torch.save(theirs.state_dict(), tmp_path / "plain.pt")
    archive = torch.jit.trace(theirs, (torch.rand(2, 3, side, side), clip.tokenize(TEXTS)), check_trace=False)
    archive.half().save(str(tmp_path / "scripted.pt"))  # as OpenAI's files are; this changes `theirs` too
    theirs.float()
    agree([tmp_path / "plain.pt", tmp_path / "scripted.pt"], side, theirs.encode_image, theirs.encode_text)


@pytest.mark.parametrize("shape, activation", [(B16, "gelu"), (ODD, "quick_gelu")])
def test_transformers_folder(shape, activation, tmp_path):
    library = pytest.importorskip("transformers")
    side, patch, width, heads, layers, hidden, joint, text, text_heads, text_layers = shape
    theirs = perturbed(library.CLIPModel(library.CLIPConfig(projection_dim=joint, vision_config=dict(
        image_size=side, patch_size=patch, hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        intermediate_size=hidden, hidden_act=activation), text_config=dict(
        hidden_size=text, num_attention_heads=text_heads, num_hidden_layers=text_layers, intermediate_size=4 * text,
        hidden_act=activation))))
    theirs.save_pretrained(tmp_path)
    old = {**theirs.state_dict(), "text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0),
           "vision_model.embeddings.position_ids": torch.arange(50).unsqueeze(0)}  # as older versions wrote it
    torch.save(old, tmp_path / "pytorch_model.bin")
    agree([tmp_path, tmp_path / "pytorch_model.bin"], side, lambda x: theirs.get_image_features(x).pooler_output,
          lambda x: theirs.get_text_features(x).pooler_output)


@pytest.mark.parametrize("shape, more", [(B16, {}), (ODD, {"quick_gelu": True})])
def test_open_clip_folder(shape, more, tmp_path):
    library, hub = pytest.importorskip("open_clip"), pytest.importorskip("open_clip.push_to_hf_hub")
    side, patch, width, heads, layers, hidden, joint, text, text_heads, text_layers = shape
    config = dict(**more, embed_dim=joint, vision_cfg=dict(
        image_size=side, patch_size=patch, width=width, head_width=width // heads, layers=layers,
        mlp_ratio=hidden / width), text_cfg=dict(width=text, heads=text_heads, layers=text_layers))
    theirs = perturbed(library.model.CLIP(**config))
    theirs.visual.image_mean, theirs.visual.image_std = IMAGE_MEAN, IMAGE_STD  # as its create_model sets them
    no_tokenizer = type("Tokenizer", (), {"save_pretrained": lambda self, folder: None})()
    hub.save_for_hf(theirs, no_tokenizer, config, tmp_path, safe_serialization="both")
    paths = [tmp_path, tmp_path / "open_clip_model.safetensors", tmp_path / "open_clip_pytorch_model.bin"]
    assert len(agree(paths, side, theirs.encode_image, theirs.encode_text)) == 1


def test_positions_resize_as_open_clip_does():
    open_clip = pytest.importorskip("open_clip")
    table = torch.randn(1 + 14 ** 2, 768)
    model = type("M", (), {"visual": type("V", (), {"grid_size": (24, 20)})})  # what open_clip's function reads
    state = {"visual.positional_embedding": table.clone()}
    open_clip.model.resize_pos_embed(state, model)
    assert torch.allclose(clip.resize_positions(table, 24, 20), state["visual.positional_embedding"][1:], atol=1e-5)
    assert torch.equal(clip.resize_positions(table, 14, 14), table[1:])


def test_cls_and_patches_at_the_scale_of_vit_b16():
    """CLS is encode_image's; the patches are MaskCLIP's: in the last block each has its own value alone."""
    side, patch, width, _, _, _, joint, *text = B16
    theirs = perturbed(peer("model").CLIP(joint, side, 12, width, patch, 77, 49408, *text)).float()
    ours, images, kept = clip.CLIP(joint, side, 12, width, patch, 77, 49408, 128, 2), torch.rand(1, 3, side, side), []
    ours.requires_grad_(False).load_state_dict(theirs.state_dict())
    c, d = ours.visual.cls_and_patches(images)
    assert torch.allclose(c, ours.encode_image(images), atol=1e-5)
    # OpenAI's code with a mask in its last block that leaves each token itself
    theirs.visual.transformer.resblocks[-1].attn_mask = torch.full((197, 197), -torch.inf).fill_diagonal_(0)
    theirs.visual.transformer.register_forward_hook(lambda module, given, made: kept.append(made[1:, 0]))
    theirs.encode_image(normalised(images))
    assert torch.allclose(d[0], theirs.visual.ln_post(kept[0]) @ theirs.visual.proj, atol=1e-4)


def test_dense_tokens_at_any_input_size(tiny_clip):
    images = torch.rand(2, 3, 72, 100)
    tokens, (c, d) = tiny_clip.visual(images), tiny_clip.visual.cls_and_patches(images)
    assert tokens.shape == (2, 1 + 9 * 12, 128) and d.shape == (2, 9 * 12, 128)
    assert torch.allclose(torch.stack([c, tiny_clip.encode_image(images)]), tokens[:, 0], atol=1e-5)


def test_tokenizer_equals_both_peers():
    openai, open_clip = peer("simple_tokenizer").SimpleTokenizer(), pytest.importorskip("open_clip")
    protocol = json.loads((ROOT / "sources" / "protocol.json").read_text())
    texts = [t.format(c) for p in protocol.values() for c in p["classes"] for t in p["templates"]]
    texts += ["", "\n\t", "<|startoftext|> x <|endoftext|>", "A" * 300, "schön " * 200, "ﬁne ½ ² ﬂ", "cat " * 75]
    pools = [string.printable, "àéîõüçñßøåœæłžšğı", "日本語中文字漢字かなカナ한국어", "😀🐈‍⬛👩‍🚀🏳️‍🌈❤️🇯🇵",
             "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff", "&amp;&lt;&#39;&amp;amp;'s't're'd â€œq€"]
    rng, reference, short = random.Random(0), open_clip.SimpleTokenizer(), []
    for text in texts + ["".join(rng.choices("".join(rng.sample(pools, 2)) + " ", k=i % 41)) for i in range(600)]:
        ours = tokenizer().encode(text)
        assert ours == openai.encode(text), repr(text)
        if "<|" not in text:  # open_clip writes its marks otherwise
            assert ours == reference.encode(text), repr(text)
            short += [text] if len(ours) <= 75 else []
    assert len(short) >= 2000 and torch.equal(clip.tokenize(short), open_clip.tokenize(short))
    with pytest.raises(clip.CLIPError, match="at most 77 fit"):
        clip.tokenize("cat " * 76)
