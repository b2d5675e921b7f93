"""clip/ against its peers on random weights: OpenAI's own code (clip-anytorch), open_clip, transformers."""
import importlib.util
import json
import os
import random
import string
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity

import clip
from clip.model import IMAGE_MEAN, IMAGE_STD, Attention
from clip.tokenizer import tokenizer

ROOT = Path(__file__).parent.parent
FULL = bool(os.environ.get("FULL_DEPTH"))  # FULL_DEPTH=1: whole ViT-B/32, B/16, L/14 (minutes), not two blocks each
# image side, patch, width, heads, layers, MLP width, joint width; text width, heads, layers
SHAPES = {
    "ViT-B/32": (224, 32, 768, 12, 12, 3072, 512, 512, 8, 12),
    "ViT-B/16": (224, 16, 768, 12, 12, 3072, 512, 512, 8, 12),
    "ViT-L/14": (224, 14, 1024, 16, 24, 4096, 768, 768, 12, 12), "odd": (75, 10, 160, 2, 3, 500, 96, 72, 3, 2)}
TEXTS = ["a photo of a cat", "the diningtable &amp; two pottedplants, 1997", "ein Café über der Straße 🐈"]


def shape(name):
    side, patch, width, heads, layers, hidden, joint, *text = SHAPES[name]
    if not FULL and name != "odd":
        layers, text = 2, (128, 2, 2)  # and a narrow text tower: its 49,408 embeddings are most of a file
    return side, patch, width, heads, layers, hidden, joint, *text


def peer(module):
    """A file of the package `clip` (OpenAI's code), whose name ours would hide."""
    folders = [Path(p) / "clip" for p in sys.path if (Path(p) / "clip" / "simple_tokenizer.py").is_file()]
    if not folders:
        pytest.skip("clip-anytorch is not installed")
    spec = importlib.util.spec_from_file_location(f"openai_{module}", folders[0] / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def openai_model(name):
    side, patch, width, _, layers, _, joint, text, heads, text_layers = shape(name)
    torch.manual_seed(0)
    model = peer("model").CLIP(joint, side, layers, width, patch, 77, 49408, text, heads, text_layers)
    return model.eval().requires_grad_(False)


def transformers_model(name, activation="quick_gelu"):
    library = pytest.importorskip("transformers")
    side, patch, width, heads, layers, hidden, joint, text, text_heads, text_layers = shape(name)
    torch.manual_seed(0)
    config = library.CLIPConfig(projection_dim=joint, vision_config=dict(
        image_size=side, patch_size=patch, hidden_size=width, num_attention_heads=heads, num_hidden_layers=layers,
        intermediate_size=hidden, hidden_act=activation), text_config=dict(
        hidden_size=text, num_attention_heads=text_heads, num_hidden_layers=text_layers, intermediate_size=4 * text,
        hidden_act=activation))
    model = library.CLIPModel(config).eval().requires_grad_(False)
    for p in model.parameters():  # biases start at 0 and norms at 1: a swap of two would not show
        p.add_(0.02 * torch.randn_like(p))
    return model


def open_clip_model(name, quick_gelu):
    """-> model, its config as open_clip's own files have it"""
    library = pytest.importorskip("open_clip")
    side, patch, width, heads, layers, hidden, joint, text, text_heads, text_layers = shape(name)
    torch.manual_seed(0)
    config = dict(embed_dim=joint, vision_cfg=dict(
        image_size=side, patch_size=patch, width=width, head_width=width // heads, layers=layers,
        mlp_ratio=hidden / width), text_cfg=dict(width=text, heads=text_heads, layers=text_layers))
    config |= dict(quick_gelu=True) if quick_gelu else {}
    model = library.model.CLIP(**config).eval().requires_grad_(False)
    for p in model.parameters():
        p.add_(0.02 * torch.randn_like(p))
    return model, config


def close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4
    assert (1 - cosine_similarity(ours, theirs)).abs().max() < 1e-4


def pictures(name):
    """-> as ours takes them, as the peers take them"""
    images = torch.rand(2, 3, shape(name)[0], shape(name)[0])
    return images, (images - torch.tensor(IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(IMAGE_STD).view(3, 1, 1)


# ---------------------------------------------------------------- features


@pytest.mark.parametrize("name", ["ViT-B/32", "ViT-B/16", "ViT-L/14"])
def test_openai_model_as_state_dict_and_as_torchscript_archive(name, tmp_path):
    theirs, (images, normalised), tokens = openai_model(name).half().float(), pictures(name), clip.tokenize(TEXTS)
    torch.save(theirs.state_dict(), tmp_path / "plain.pt")
    archive = torch.jit.trace(theirs, (normalised, tokens), check_trace=False)
    archive.half().save(str(tmp_path / "scripted.pt"))  # as OpenAI's files are; this changes `theirs` too
    theirs.float()
    for file in ("plain.pt", "scripted.pt"):
        ours = clip.load(tmp_path / file)
        assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours.parameters()) and not ours.training
        close(ours.encode_image(images), theirs.encode_image(normalised))
        close(ours.encode_text(tokens), theirs.encode_text(tokens))
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))  # names never renamed


@pytest.mark.parametrize("name, activation", [("ViT-B/32", "gelu"), ("ViT-B/16", "quick_gelu"),
                                              ("ViT-L/14", "quick_gelu"), ("odd", "quick_gelu"), ("odd", "gelu")])
def test_transformers_folder(name, activation, tmp_path):
    theirs, (images, normalised), tokens = transformers_model(name, activation), pictures(name), clip.tokenize(TEXTS)
    theirs.save_pretrained(tmp_path / "new")
    (tmp_path / "old").mkdir()
    old = dict(theirs.state_dict())
    old["text_model.embeddings.position_ids"] = torch.arange(77).unsqueeze(0)
    old["vision_model.embeddings.position_ids"] = torch.arange(50).unsqueeze(0)
    if name == "odd":
        old = {"model": {f"module.clip_model.{key}": x for key, x in old.items()}, "step": 3}
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    (tmp_path / "new" / "config.json").rename(tmp_path / "old" / "config.json")
    paths = [tmp_path / "old", tmp_path / "old" / "pytorch_model.bin"]
    if activation == "quick_gelu" and name != "odd":
        paths.append(tmp_path / "new")  # without a config
    for path in paths:
        ours = clip.load(path)
        assert (ours.remark is None) == (path != tmp_path / "new")
        close(ours.encode_image(images), theirs.get_image_features(normalised).pooler_output)
        close(ours.encode_text(tokens), theirs.get_text_features(tokens).pooler_output)


@pytest.mark.parametrize("name, quick_gelu", [("ViT-B/32", False), ("odd", True), ("odd", False)])
def test_open_clip_folder(name, quick_gelu, tmp_path):
    (theirs, config), (images, normalised) = open_clip_model(name, quick_gelu), pictures(name)
    tokens = clip.tokenize(TEXTS)
    theirs.visual.image_mean, theirs.visual.image_std = IMAGE_MEAN, IMAGE_STD  # as its create_model sets them
    hub = pytest.importorskip("open_clip.push_to_hf_hub")
    no_tokenizer = type("Tokenizer", (), {"save_pretrained": lambda self, folder: None})()
    hub.save_for_hf(theirs, no_tokenizer, config, tmp_path, safe_serialization="both")
    seen = []
    for file in ("", "open_clip_model.safetensors", "open_clip_pytorch_model.bin"):
        ours = clip.load(tmp_path / file)
        assert ours.remark is None
        close(ours.encode_image(images), theirs.encode_image(normalised))
        close(ours.encode_text(tokens), theirs.encode_text(tokens))
        seen.append(clip.fingerprint(ours))
    assert len(set(seen)) == 1
    (tmp_path / "open_clip_pytorch_model.bin").rename(tmp_path / "alone.pt")
    ours = clip.load(tmp_path / "alone.pt")
    assert "not one of OpenAI's files" in ours.remark
    if name == "ViT-B/32":  # read wrongly, and no shape tells: so the remark
        assert (ours.encode_image(images) - theirs.encode_image(normalised)).abs().max() > 0.001
        assert clip.fingerprint(ours) != seen[0]


def test_positions_resize_as_open_clip_does():
    open_clip = pytest.importorskip("open_clip")
    table = torch.randn(1 + 14 ** 2, 768)
    model = type("M", (), {"visual": type("V", (), {"grid_size": (24, 20)})})  # what open_clip's function reads
    state = {"visual.positional_embedding": table.clone()}
    open_clip.model.resize_pos_embed(state, model)
    assert torch.allclose(clip.resize_positions(table, 24, 20), state["visual.positional_embedding"][1:], atol=1e-5)
    assert torch.equal(clip.resize_positions(table, 14, 14), table[1:])


# ---------------------------------------------------------------- towers


def test_dense_tokens_at_any_input_size(tiny_clip):
    images = torch.rand(2, 3, 72, 100)
    tokens = tiny_clip.visual(images)
    assert tokens.shape == (2, 1 + 9 * 12, 128)
    assert torch.allclose(tokens[:, 0], tiny_clip.encode_image(images), atol=1e-5)  # which computes no other token
    with pytest.raises(clip.CLIPError, match="one patch needs 8×8"):
        tiny_clip.encode_image(torch.rand(1, 3, 4, 64))


def test_config_makes_a_tower_of_the_same_shape(tiny_clip):
    odd = clip.VisionTransformer(40, 10, 48, 2, 24, heads=4, hidden=100, activation="gelu")
    for tower in (tiny_clip.visual, odd):
        twin = clip.VisionTransformer(**tower.config)
        assert twin.config == tower.config
        assert not torch.equal(twin.proj, tower.proj)
        twin.load_state_dict(tower.state_dict())
        images = torch.rand(1, 3, 40, 40)
        assert torch.equal(twin(images), tower(images))
    with pytest.raises(clip.CLIPError, match="width of 48 cannot be split among 5 heads"):
        clip.VisionTransformer(40, 10, 48, 2, 24, heads=5)


def test_attention_against_a_loop():
    torch.manual_seed(0)
    attention, x = Attention(8, 2), torch.randn(1, 5, 8)
    q, k, v = (x[0] @ attention.in_proj_weight.T + attention.in_proj_bias).split(8, dim=1)
    for causal in (False, True):
        rows = []
        for i in range(5):
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                last = i + 1 if causal else 5
                weight = torch.stack([q[i, part] @ k[j, part] / 2 for j in range(last)]).softmax(0)
                heads.append(sum(weight[j] * v[j, part] for j in range(last)))
            rows.append(torch.cat(heads))
        want = attention.out_proj(torch.stack(rows))
        assert torch.allclose(attention(x, causal)[0], want, atol=1e-6)
    assert torch.allclose(attention(x, first=2), attention(x)[:, :2], atol=1e-6)


# ---------------------------------------------------------------- tokenizer


def many_strings():
    protocol = json.loads((ROOT / "sources" / "protocol.json").read_text())
    texts = [t.format(c) for p in protocol.values() for c in p["classes"] for t in p["templates"]]
    rng = random.Random(0)
    pools = [string.printable, "àéîõüçñßøåœæłžšğı", "日本語中文字漢字かなカナ한국어", "😀🐈‍⬛👩‍🚀🏳️‍🌈❤️🇯🇵",
             "0123456789.,:;-/%$€", "".join(map(chr, range(32))) + "\x7f\x85\u200b\u2028\ufeff",
             "&amp;&lt;&#39;&nbsp;&eacute;&amp;amp;", "'s't're've'm'll'd'S"]
    for _ in range(600):
        pool = rng.choice(pools) + rng.choice(pools) + " "
        texts.append("".join(rng.choice(pool) for _ in range(rng.randint(0, 40))))
    return texts + ["", " ", "\n\t", "<|startoftext|> x <|endoftext|>", "A" * 300, "schön " * 200, "ﬁne ½ ² ﬂ",
                    "â€œquotesâ€\x9d"]


def test_tokenizer_equals_both_peers():
    texts = many_strings()
    assert len(texts) >= 2000
    openai, open_clip = peer("simple_tokenizer").SimpleTokenizer(), pytest.importorskip("open_clip")
    reference = open_clip.SimpleTokenizer()
    for text in texts:
        ours = tokenizer().encode(text)
        assert ours == openai.encode(text), repr(text)
        if "<|" not in text:  # open_clip writes its marks otherwise
            assert ours == reference.encode(text), repr(text)
    short = [t for t in texts if len(openai.encode(t)) <= 75 and "<|" not in t]
    assert torch.equal(clip.tokenize(short), open_clip.tokenize(short))


def test_long_texts():
    with pytest.raises(clip.CLIPError, match="at most 77 fit"):
        clip.tokenize("cat " * 76)
    full = clip.tokenize("cat " * 75)[0]
    assert full.shape == (77,) and full[0] == 49406 and full[-1] == 49407 and (full[1:-1] == 2368).all()


def test_import_needs_no_peer():
    """The runtime needs torch, torchvision, ftfy, regex and numpy alone."""
    code = ("import sys; sys.modules.update(open_clip=None, transformers=None, timm=None, safetensors=None)\n"
            "import clip; assert clip.load('toy/clip.pt').remark is None")  # found from any folder
    subprocess.run([sys.executable, "-c", code], cwd="/", env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
