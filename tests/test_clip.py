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
from clip.model import IMAGE_MEAN, IMAGE_STD, Attention
from clip.tokenizer import tokenizer

# image side, patch, width, heads, layers, MLP width, joint width; text width, heads, layers: OpenAI's, with two blocks
B16, L14 = (224, 16, 768, 12, 2, 3072, 512, 128, 2, 2), (224, 14, 1024, 16, 2, 4096, 768, 128, 2, 2)
ODD = (75, 10, 160, 2, 11, 500, 96, 72, 3, 2)
TEXTS = ["a photo of a cat", "the diningtable &amp; two pottedplants, 1997", "ein Café über der Straße 🐈"]


def peer(module):
    """What is in a file of OpenAI's code, whose package has the name of ours."""
    folders = [Path(p) / "clip" for p in sys.path if (Path(p) / "clip" / "simple_tokenizer.py").is_file()]
    if not folders:
        pytest.skip("clip-anytorch is not installed")
    return SimpleNamespace(**runpy.run_path(str(folders[0] / f"{module}.py")))


def perturbed(model):
    """Biases start at 0 and norms at 1: a swap of two would not show."""
    torch.manual_seed(0)
    for p in model.eval().requires_grad_(False).parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model


def agree(paths, side, encode_image, encode_text):
    """Ours from each file gives the peer's features -> the fingerprints of ours."""
    images, tokens = torch.rand(2, 3, side, side), clip.tokenize(TEXTS)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (IMAGE_MEAN, IMAGE_STD))
    pictures, texts, seen = encode_image((images - mean) / std), encode_text(tokens), set()
    for path in paths:
        ours = clip.load(path)
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours.parameters()) and not ours.training
        for got, want in ((ours.encode_image(images), pictures), (ours.encode_text(tokens), texts)):
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


def test_dense_tokens_at_any_input_size(tiny_clip):
    images = torch.rand(2, 3, 72, 100)
    tokens = tiny_clip.visual(images)
    assert tokens.shape == (2, 1 + 9 * 12, 128)
    assert torch.allclose(tokens[:, 0], tiny_clip.encode_image(images), atol=1e-5)  # which computes no other token
    with pytest.raises(clip.CLIPError, match="one patch needs 8×8"):
        tiny_clip.encode_image(torch.rand(1, 3, 4, 64))


def test_attention_against_a_loop():
    attention, x = Attention(8, 2), torch.randn(1, 5, 8)
    torch.nn.init.normal_(attention.in_proj_bias)
    q, k, v = (x[0] @ attention.in_proj_weight.T + attention.in_proj_bias).split(8, dim=1)
    for causal in (False, True):
        rows = torch.zeros(5, 8)
        for i in range(5):
            last = i + 1 if causal else 5
            for head in (slice(0, 4), slice(4, 8)):
                weight = torch.stack([q[i, head] @ k[j, head] / 2 for j in range(last)]).softmax(0)
                rows[i, head] = sum(weight[j] * v[j, head] for j in range(last))
        assert torch.allclose(attention(x, causal)[0], attention.out_proj(rows), atol=1e-6)
    assert torch.allclose(attention(x, first=2), attention(x)[:, :2], atol=1e-6)


def test_tokenizer_equals_both_peers():
    openai, open_clip = peer("simple_tokenizer").SimpleTokenizer(), pytest.importorskip("open_clip")
    protocol = json.loads((ROOT / "sources" / "protocol.json").read_text())
    texts = [t.format(c) for p in protocol.values() for c in p["classes"] for t in p["templates"]]
    texts += ["", "\n\t", "<|startoftext|> x <|endoftext|>", "A" * 300, "schön " * 200, "ﬁne ½ ² ﬂ", "â€œq€\x9d",
              "cat " * 75]
    pools = [string.printable, "àéîõüçñßøåœæłžšğı", "日本語中文字漢字かなカナ한국어", "😀🐈‍⬛👩‍🚀🏳️‍🌈❤️🇯🇵",
             "0123456789.,:;-/%$€", "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff",
             "&amp;&lt;&#39;&nbsp;&eacute;&amp;amp;", "'s't're've'm'll'd'S"]
    rng, reference, short = random.Random(0), open_clip.SimpleTokenizer(), []
    for _ in range(600):
        pool = rng.choice(pools) + rng.choice(pools) + " "
        texts.append("".join(rng.choice(pool) for _ in range(rng.randint(0, 40))))
    for text in texts:
        ours = tokenizer().encode(text)
        assert ours == openai.encode(text), repr(text)
        if "<|" not in text:  # open_clip writes its marks otherwise
            assert ours == reference.encode(text), repr(text)
            short += [text] if len(ours) <= 75 else []
    assert len(short) >= 2000 and torch.equal(clip.tokenize(short), open_clip.tokenize(short))
    with pytest.raises(clip.CLIPError, match="at most 77 fit"):
        clip.tokenize("cat " * 76)
