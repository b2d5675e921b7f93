"""clip.py against its peers: OpenAI's own code (clip-anytorch) and open_clip, on random weights."""
import importlib.util
import json
import os
import random
import re
import string
import subprocess
import sys
from pathlib import Path

import open_clip
import pytest
import torch
from torch.nn.functional import cosine_similarity

import clip

ROOT = Path(__file__).parent.parent
DEPTH = 12 if os.environ.get("FULL_DEPTH") else 2  # FULL_DEPTH=1 compares whole ViT-B/32, B/16, L/14 (minutes)
SHAPES = {  # image side, patch, width, joint width, text width; the rest as in OpenAI's files
    "ViT-B/32": (224, 32, 768, 512, 512), "ViT-B/16": (224, 16, 768, 512, 512), "ViT-L/14": (224, 14, 1024, 768, 768)}


def peer(module):
    """A file of the package `clip` (OpenAI's code), whose name ours would hide."""
    folder = next(Path(p) / "clip" for p in sys.path if (Path(p) / "clip" / "simple_tokenizer.py").is_file())
    spec = importlib.util.spec_from_file_location(f"openai_{module}", folder / f"{module}.py")
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    return loaded


def openai_model(name):
    size, patch, width, joint, text = SHAPES[name]
    torch.manual_seed(0)
    layers = 24 if DEPTH == 12 and name == "ViT-L/14" else DEPTH
    model = peer("model").CLIP(joint, size, layers, width, patch, 77, 49408, text, text // 64, DEPTH).eval()
    return model.requires_grad_(False)


def close(ours, theirs):
    assert (ours - theirs).abs().max() < 1e-4
    assert (1 - cosine_similarity(ours, theirs)).abs().max() < 1e-4


TEXTS = ["a photo of a cat", "the diningtable &amp; two pottedplants, 1997", "ein Café über der Straße 🐈"]


@pytest.mark.parametrize("name", SHAPES)
def test_openai_model_as_state_dict_and_as_torchscript_archive(name, tmp_path):
    theirs = openai_model(name)
    images = torch.rand(2, 3, SHAPES[name][0], SHAPES[name][0])
    normalised = (images - torch.tensor(clip.IMAGE_MEAN).view(3, 1, 1)) / torch.tensor(clip.IMAGE_STD).view(3, 1, 1)
    tokens = clip.tokenize(TEXTS)
    torch.save(theirs.state_dict(), tmp_path / "plain.pt")
    inside = {"state_dict": {f"module.{k}": v for k, v in theirs.state_dict().items()}, "epoch": 3}
    torch.save(inside, tmp_path / "inside.pt")
    torch.jit.trace(theirs, (normalised, tokens), check_trace=False).save(str(tmp_path / "scripted.pt"))
    want_image, want_text = theirs.encode_image(normalised), theirs.encode_text(tokens)
    for file in ("plain.pt", "inside.pt", "scripted.pt"):
        ours = clip.load(tmp_path / file)
        close(ours.encode_image(images), want_image)
        close(ours.encode_text(tokens), want_text)


def test_fp16_archive_loads_as_fp32_frozen_eval(tmp_path):
    theirs = openai_model("ViT-B/32")
    example = (torch.rand(1, 3, 224, 224), clip.tokenize(["a"]))
    archive = torch.jit.trace(theirs, example, check_trace=False).half()  # OpenAI's files are fp16
    archive.save(str(tmp_path / "half.pt"))
    ours = clip.load(tmp_path / "half.pt")
    assert not ours.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in ours.parameters())
    want = theirs.half().float()
    close(ours.encode_text(example[1]), want.encode_text(example[1]))
    assert set(dict(ours.named_parameters())) == set(dict(theirs.named_parameters()))  # names never renamed


def test_open_clip_model(tmp_path):
    torch.manual_seed(0)
    theirs = open_clip.model.CLIP(
        512, dict(layers=2, width=768, patch_size=16, image_size=224), dict(width=512, heads=8, layers=2),
        quick_gelu=True).eval().requires_grad_(False)
    torch.save(theirs.state_dict(), tmp_path / "open.pt")
    ours = clip.load(tmp_path / "open.pt")
    images, tokens = torch.rand(2, 3, 224, 224), clip.tokenize(TEXTS)
    close(ours.encode_image(images), theirs.encode_image((images - ours.visual.mean) / ours.visual.std))
    close(ours.encode_text(tokens), theirs.encode_text(tokens))


def test_what_no_shape_tells_is_said_or_refused(tmp_path, tiny_clip_file, monkeypatch):
    """Others' CLIPs have OpenAI's names and shapes with another activation, or wider towers with other heads."""
    torch.manual_seed(0)
    plain = open_clip.model.CLIP(512, dict(layers=2, width=768, patch_size=16, image_size=224),
                                 dict(width=512, heads=8, layers=2), quick_gelu=False).eval().requires_grad_(False)
    torch.save(plain.state_dict(), tmp_path / "plain-gelu.pt")
    ours, images = clip.load(tmp_path / "plain-gelu.pt"), torch.rand(2, 3, 224, 224)
    theirs = plain.encode_image((images - ours.visual.mean) / ours.visual.std)
    assert (ours.encode_image(images) - theirs).abs().max() > 0.001  # read wrongly, and no shape tells
    assert "none of OpenAI's files" in clip.doubt(tmp_path / "plain-gelu.pt")
    assert clip.doubt("ViT-B/16") is None and clip.doubt("toy/clip.pt") is None
    assert clip.doubt(clip.HERE / "toy" / "clip.pt") is None
    monkeypatch.setitem(clip.MODELS, "theirs", (clip.file_sha256(tiny_clip_file), "x.pt"))
    assert clip.doubt(tiny_clip_file) is None
    wide = clip.CLIP(64, 32, 1, 1280, 16, 77, 100, 64, 1)
    torch.save(wide.state_dict(), tmp_path / "wide.pt")
    with pytest.raises(clip.CLIPError, match="width 1280, OpenAI's widest is 1024"):
        clip.load(tmp_path / "wide.pt")


def test_positions_resize_as_open_clip_does():
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


def test_attention_kinds_against_a_loop():
    torch.manual_seed(0)
    attention, x = clip.Attention(8, 2), torch.randn(1, 5, 8)
    q, k, v = (x[0] @ attention.in_proj_weight.T + attention.in_proj_bias).split(8, dim=1)
    for kind in ("qk", "vv", "self"):
        rows = []
        for i in range(5):
            heads = []
            for part in (slice(0, 4), slice(4, 8)):
                left, right = (q, k) if kind == "qk" else (v, v)
                weight = torch.stack([left[i, part] @ right[j, part] / 2 for j in range(5)]).softmax(0)
                if kind == "self":
                    weight = torch.eye(5)[i]
                heads.append(sum(weight[j] * v[j, part] for j in range(5)))
            rows.append(torch.cat(heads))
        want = attention.out_proj(torch.stack(rows))
        assert torch.allclose(attention(x, kind, first=2)[0], want[:2], atol=1e-5)
        assert torch.allclose(attention(x, kind)[0], want, atol=1e-6), kind


# ---------------------------------------------------------------- tokenizer


def many_strings():
    protocol = json.loads((ROOT / "protocol.json").read_text())
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
    openai, reference = peer("simple_tokenizer").SimpleTokenizer(), open_clip.SimpleTokenizer()
    for text in texts:
        ours = clip.tokenizer().encode(text)
        assert ours == openai.encode(text), repr(text)
        if "<|" not in text:  # open_clip writes its marks otherwise
            assert ours == reference.encode(text), repr(text)
    short = [t for t in texts if len(openai.encode(t)) <= 75 and "<|" not in t]
    assert torch.equal(clip.tokenize(short), open_clip.tokenize(short))


def test_long_texts():
    with pytest.raises(clip.CLIPError, match="at most 77 fit"):
        clip.tokenize("cat " * 76)
    assert clip.tokenize("cat " * 75).argmax() == 76
    full = clip.tokenize("cat " * 75)[0]
    assert full.shape == (77,) and full[0] == 49406 and full[-1] == 49407 and (full[1:-1] == 2368).all()


# ---------------------------------------------------------------- bad input


def broken_files(folder, good):
    state = torch.load(good, weights_only=True)
    data = good.read_bytes()

    def write(name, content):
        path = folder / name
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    yield folder / "absent.pt", "no CLIP file"
    yield write("truncated.pt", data[:len(data) // 2]), "cannot be read"
    yield write("flipped.pt", bytes(flipped)), "damaged"
    yield write("text.pt", b"hello"), "cannot be read"
    yield write("empty.pt", b""), "cannot be read"
    yield write("list.pt", [1, 2]), "no state dict"
    without = {k: v for k, v in state.items() if k != "visual.proj"}
    yield write("missing.pt", without), "not a whole CLIP.* 1 tensors differ, the first, visual.proj, is missing"
    yield write("nothing.pt", {"a": torch.zeros(1)}), "not a CLIP in OpenAI's names"
    yield write("extra.pt", {**state, "visual.more": torch.zeros(1)}), "another model: .*visual.more, is unexpected"
    yield write("shape.pt", {**state, "ln_final.bias": torch.zeros(3)}), r"ln_final.bias has shape \(3,\)"
    yield write("nan.pt", {**state, "visual.proj": state["visual.proj"] * torch.nan}), "not finite"
    yield write("resnet.pt", {**state, "visual.layer1.0.conv1.weight": torch.zeros(1)}), "ResNet CLIP"


def test_bad_files_give_one_clear_line(tmp_path, tiny_clip_file):
    for path, message in broken_files(tmp_path, tiny_clip_file):
        with pytest.raises(clip.CLIPError) as error:
            clip.load(path)
        assert re.search(message, str(error.value)), (path.name, str(error.value))
        assert "\n" not in str(error.value)
        assert path.name in str(error.value)
    with pytest.raises(clip.CLIPError, match="ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px"):
        clip.load("ViT-B/17")


def test_a_hostile_archive_runs_nothing(tmp_path):
    import pickle
    import zipfile

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/ran",)

    for scripted in (True, False):
        path = tmp_path / f"evil{scripted}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("evil/data.pkl", pickle.dumps(Evil(), protocol=2))
            archive.writestr("evil/version", "3\n")
            if scripted:
                archive.writestr("evil/constants.pkl", pickle.dumps((), protocol=2))
        with pytest.raises(clip.CLIPError, match="cannot be read"):
            clip.load(path)
    assert not (tmp_path / "ran").exists()


def test_download_checks_the_hash_and_leaves_nothing(tmp_path, monkeypatch, tiny_clip_file):
    """The real download code, from a file:// address."""
    import hashlib
    good = hashlib.sha256(tiny_clip_file.read_bytes()).hexdigest()
    monkeypatch.setattr(clip, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(clip, "_URL", f"file://{tiny_clip_file}")
    monkeypatch.setattr(clip, "MODELS", {"right": (good, "right.pt"), "wrong": ("0" * 64, "wrong.pt")})
    assert clip.load("right").visual.output_dim == 128
    with pytest.raises(clip.CLIPError, match="could not download.*invalid hash"):
        clip.load("wrong")
    assert [p.name for p in (tmp_path / "cache").iterdir()] == ["right.pt"]
    (tmp_path / "cache" / "right.pt").write_bytes(b"spoilt")
    with pytest.raises(clip.CLIPError, match="sha256 differs"):
        clip.load("right")
    monkeypatch.setattr(clip, "_URL", f"file://{tmp_path}/absent")
    (tmp_path / "cache" / "right.pt").unlink()
    with pytest.raises(clip.CLIPError, match="could not download"):
        clip.load("right")
    assert not list((tmp_path / "cache").iterdir())


def test_import_needs_no_peer():
    """The runtime needs torch, torchvision, ftfy, regex and numpy alone."""
    code = "import sys; sys.modules.update(open_clip=None, transformers=None, timm=None); import clip, train, evaluate"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
