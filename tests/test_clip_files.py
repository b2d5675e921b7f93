"""CLIP files as people have them: wrapped, renamed, described by a config, downloaded, damaged, hostile."""
import argparse
import json
import os
import pickle
import re
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from trees import serve

import clip
from clip import loading

SMALL = dict(embed_dim=24, image_resolution=32, vision_layers=2, vision_width=48, vision_patch_size=16,
             context_length=77, vocab_size=49408, transformer_width=8, transformer_layers=1)  # 0.5 million parameters
TRANSFORMERS = {"model_type": "clip", "projection_dim": 24, "text_config": dict(
    hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32), "vision_config": dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=35, patch_size=16)}
OPEN_CLIP = {"model_cfg": {"embed_dim": 24, "vision_cfg": dict(width=48, layers=2, head_width=16, image_size=32),
                           "text_cfg": dict(width=8, layers=1, heads=2)}}
JUNK = [None, True, -1, 0, 2 ** 63, 10 ** 30, 0.5, float("nan"), float("inf"), "", "x", [], {}, [1, [2]], {"a": 1}]


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return {key: x + 0.01 * torch.randn_like(x) for key, x in clip.CLIP(**SMALL).state_dict().items()}


@pytest.fixture
def folder(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(save(small))
    return tmp_path


def refused(path, message):
    """One clear line that names the file."""
    with pytest.raises(clip.CLIPError) as error:
        clip.load(path)
    line = str(error.value)
    assert re.search(message, line) and "\n" not in line and path.name[:200] in line and len(line) < 900, line


def same(path, state):
    """It loads with these weights -> the remark on it."""
    model = clip.load(path)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key].float()) for key in state)
    return model.remark


def with_(config, path, value):
    """A copy of the config with the value at a dotted path."""
    first, _, rest = path.partition(".")
    return config | {first: with_(config.get(first, {}), rest, value) if rest else value}


def test_every_wrapping_by_one_rule(small, tmp_path):
    """Any prefix, any of torch.save's formats; what stands beside CLIP is left out and named."""
    path, text = tmp_path / "wrapped.pt", ("transformer.", "token_emb", "positional", "ln_final", "text_proj")
    custom = {"text." * key.startswith(text) + key: x for key, x in small.items()}  # open_clip's CustomTextCLIP
    loop, optimizer = {"state_dict": small}, {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    loop["self"] = loop
    contents = [(loop, ""), ({key: torch.nn.Parameter(x) for key, x in small.items()}, ""), (
        custom | {"text.attn_mask": torch.full((7, 7), -torch.inf).triu(1), "logit_bias": torch.zeros(())}, "")]
    for prefix in ("", "clip_model.", "module._orig_mod.model.clip."):
        named = {prefix + key: x for key, x in small.items()}
        contents += [(named, ""), ({"model": {"state_dict": named}}, ""),
                     ({"state_dict": named, "optimizer": optimizer, "epoch": 3}, "1 tensors are left out.*'optimizer."),
                     ({"epoch": 3, "states": [optimizer], "x.y": {"model": named}}, "is 'states.0.state.0.exp_avg'")]
        contents += [(named | {"head.weight": torch.ones(2, dtype=torch.int64)}, "is 'head.weight'")] if prefix else []
    for (content, left_out), zipped in [(content, zipped) for content in contents for zipped in (True, False)]:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        assert re.search(left_out, remark := same(path, small)) and ("left out" in remark) == bool(left_out)
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        state = {key: x.to(dtype) for key, x in small.items()}
        ids = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
        path.write_bytes(save({prefix + key: x for key, x in (state | ids).items()}, {"format": "pt"}))
        same(path, state)


def test_what_cannot_be_read_says_why(small, tmp_path, tiny_clip_file):
    path, data, no_file = tmp_path / "bad.pt", tiny_clip_file.read_bytes(), "no file of torch.save, of safetensors"
    middle, beside, proj, one = len(data) // 2, {"state_dict": small}, small["visual.proj"], torch.ones(1)
    image, long = {key: x for key, x in small.items() if key.startswith("visual.")}, "x" * 10 ** 6
    contents = [
        (data[:middle], "truncated"), (b"hello", no_file), (b"", no_file), (b"\x80\x02" + data, "damaged"),
        (data[:middle] + bytes([data[middle] ^ 255]) + data[middle + 1:], "damaged"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", f"{no_file}.*version.*git lfs pull"),
        (beside | {"args": argparse.Namespace(lr=1)}, "wants the class argparse.Namespace.*torch.save"),
        (beside | {"best": np.float64(1)}, r"wants the class numpy\S*scalar.*weights_only=False"),
        ([1, 2], "expected one CLIP.*SigLIP.*, found 0: of 0 tensors"), ({"a": small, "b": dict(small)}, "found 2"),
        (image, "not the weights of a whole CLIP .*KeyError: 'text_projection'"),
        (beside | {"model_ema": {"visualproj": proj}}, "would change .*'model_ema.visualproj'.*merge"),
        (beside | {"adapters": [one, one]}, "2 tensors that would"), (beside | {"state_dict.visual.proj": proj}, "two"),
        ({long: {"a": small}}, "a name of 1000001 characters"),
        (clip.CLIP(**SMALL | dict(vision_width=1280, vision_layers=1)).state_dict(), "width 1280, OpenAI's widest")]
    contents += [(small | {key: value}, message) for key, value, message in [
        ("visual.more", one, "another model: .*'visual.more', is unexpected"), (long, proj, "'x{60}', is unexpected"),
        ("text.ln_final.bias", one, "'ln_final.bias' twice"), ("visual.lora_A", one, "would change .*'visual.lora_A'"),
        ("ln_final.bias", torch.zeros(3), r"ln_final.bias' has shape \(3,\)"),
        ("visual.proj", proj * torch.nan, "not finite"), ("visual.proj", proj * 1e30, "not finite or beyond 1e"),
        ("visual.proj", proj + 0j, "plain tensors"), ("visual.proj", proj.to(torch.int8), "int8, expected floats"),
        ("visual.proj", one.expand(48, 10 ** 9), "larger tensors than it holds"),
        ("visual.conv1.weight", torch.zeros(200_000, 1, 1, 1), "has shape"),  # asks for 10^11 parameters
        ("token_embedding.weight", torch.zeros(100, 8), r"'token_embedding.weight' has shape \(100"),
        ("logit_scale", torch.tensor(100.0), "its logit_scale is 100, expected the logarithm"),
        ("logit_scale", torch.tensor(0.07), "its logit_scale is 0.07, expected the logarithm")]]
    for content, message in contents:
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        refused(path, message)
    refused(tmp_path / "absent.pt", "no CLIP file.*ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px")
    refused(Path(long), "no CLIP file x{200}: give")
    path.unlink()
    refused(tmp_path, "a folder without open_clip_model.safetensors, .*save_pretrained")


@pytest.mark.parametrize("name, ok", [("net-{:.8}.pth", 1), ("{}", 1), ("net-a0b1c2d3.pth", 0), ("a0b1c2d3" * 8, 0),
                                      ("net-20240131.pth", 1)])  # the last is a date
def test_a_sha256_in_the_name_is_checked(name, ok, small, tmp_path):
    """As torch.hub names files, and Hugging Face's cache, which links to them."""
    torch.save(small, tmp_path / "w.pt")
    target = (tmp_path / "w.pt").rename(tmp_path / name.format(clip.file_sha256(tmp_path / "w.pt")))
    (tmp_path / "link.pt").symlink_to(target)
    same(tmp_path / "link.pt", small) if ok else refused(tmp_path / "link.pt", "sha256.*a0b1c2d3.*rename")


def test_damaged_safetensors_are_refused_and_take_no_memory(small, tmp_path):
    path, whole = tmp_path / "damaged.safetensors", save({key: x.half() for key, x in small.items()})
    start, name = 8 + int.from_bytes(whole[:8], "little"), "visual.proj"
    header, data = json.loads(whole[8:start]), whole[start:]
    place = header[name]["data_offsets"]

    def join(header):
        return len(header).to_bytes(8, "little") + header + data

    contents = [whole[:9], whole[:-1], whole + b"\0", join(b'{"a":' + b"[" * 200_000), join(b"{}"), join(b'{"a": 3}')]
    contents += [n.to_bytes(8, "little") + whole[8:] for n in (2 ** 63, 10 ** 9, len(whole), 0)]
    values = {"shape": [[10 ** 12], [2 ** 62, 4], [0], [-48, -24], [-1, 24], [1] * 100, [10 ** 9] * 8],
              "data_offsets": [[n + shift for n in place] for shift in (-8, 4, 10 ** 12, -10 ** 12)],
              "dtype": ["F64", "F8_E4M3"]}
    contents += [join(json.dumps(header | {name: header[name] | {key: value}}).encode())
                 for key, more in values.items() for value in more + JUNK]
    for content in contents:
        path.write_bytes(content)
        tracemalloc.start()
        refused(path, "damaged|no file of")
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < len(content) + 2_000_000, content[:200]  # 2 MB: the header as objects


def test_a_hostile_archive_runs_nothing(tmp_path):
    evil = type("Evil", (), {"__reduce__": lambda self: (os.system, (f"touch {tmp_path}/ran",))})()
    for more in ((), ("evil/constants.pkl",)):  # with constants.pkl it is TorchScript
        with zipfile.ZipFile(tmp_path / "evil.pt", "w") as archive:
            for name in ("evil/data.pkl", "evil/version", *more):
                archive.writestr(name, pickle.dumps(evil, protocol=2) if name.endswith("pkl") else "3\n")
        refused(tmp_path / "evil.pt", "wants the class posix.system")
    assert not (tmp_path / "ran").exists()


def heads(model):
    image, text = model.visual.transformer.resblocks[1], model.transformer.resblocks[0]
    assert type(image.mlp.gelu) is type(text.mlp.gelu)
    return image.attn.heads, text.attn.heads, type(image.mlp.gelu).__name__


def test_the_config_decides_what_no_shape_tells(small, folder, monkeypatch):
    config, file, seen, images = folder / "config.json", folder / "model.safetensors", {}, torch.rand(1, 3, 32, 32)
    gelu = with_(with_(TRANSFORMERS, "text_config.hidden_act", "gelu"), "vision_config.hidden_act", "gelu")
    for content, want in [
            (TRANSFORMERS, (3, 2, "QuickGELU")), (OPEN_CLIP, (3, 2, "GELU")), (gelu, (3, 2, "GELU")),
            (with_(OPEN_CLIP, "model_cfg.quick_gelu", True), (3, 2, "QuickGELU")), (with_(
                TRANSFORMERS, "text_config_dict", TRANSFORMERS["text_config"] | {"num_attention_heads": 4}),
                (3, 4, "QuickGELU"))]:
        config.write_text(json.dumps(content))
        for path in (folder, file):
            model = clip.load(path)
            assert heads(model) == want and model.remark is None
            twin = clip.VisionTransformer(**model.visual.config)  # config makes a tower of the same shape
            twin.load_state_dict(model.visual.state_dict())
            assert torch.equal(twin(images), model.visual(images))
            assert seen.setdefault(want, clip.fingerprint(model)) == clip.fingerprint(model)
    assert len(set(seen.values())) == len(seen) == 3
    alone = file.rename(folder / "other.safetensors")  # the only file of weights: the config is its
    assert heads(clip.load(folder)) == heads(clip.load(alone)) == want
    # of two libraries' files in one folder, each is read with its own config; a file of another name stands alone
    (folder / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    config.write_text("\ufeff" + json.dumps(TRANSFORMERS), encoding="utf-8")
    torch.save(small, folder / "open_clip_pytorch_model.bin")
    file.write_bytes(alone.read_bytes())
    assert (heads(clip.load(folder))[2], heads(clip.load(file))[2]) == ("GELU", "QuickGELU")
    model = clip.load(alone)
    assert heads(model) == (1, 1, "QuickGELU") and "no config" in model.remark
    monkeypatch.setitem(clip.MODELS, "theirs", (clip.file_sha256(alone), "x.pt"))  # were it one of OpenAI's
    assert clip.load(alone).remark is None
    monkeypatch.chdir(folder)
    assert clip.load("toy/clip.pt").remark is None  # found from any folder


def test_statistics_of_pictures(folder):
    """LAION's ViT-L/14 was trained with mean and std 0.5."""
    half, prints = (0.5, 0.5, 0.5), set()
    quick = with_(with_(OPEN_CLIP, "model_cfg.quick_gelu", True), "preprocess_cfg", {"mean": half, "std": half})
    for config, beside in ((TRANSFORMERS, {"image_mean": half, "image_std": half}), (quick, {})):
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "preprocessor_config.json").write_text(json.dumps(beside))
        tower = (model := clip.load(folder)).visual
        assert tower.config["mean"] == tower.config["std"] == half and torch.cat([tower.mean, tower.std]).eq(0.5).all()
        prints |= {clip.fingerprint(model)}
    (folder / "config.json").write_text(json.dumps(TRANSFORMERS))
    assert clip.fingerprint(clip.load(folder)) not in prints and len(prints) == 1
    (folder / "preprocessor_config.json").write_text('{"do_normalize": false}')
    refused(folder, "do_normalize is False")


def test_unusual_and_damaged_configs_are_refused(folder):
    config = folder / "config.json"
    for base, path, value, message in [
            (TRANSFORMERS, "model_type", "siglip", "model_type is siglip, expected clip"),
            (TRANSFORMERS, "text_config.layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06"),
            (TRANSFORMERS, "vision_config.hidden_act", "gelu_new", "hidden_act is gelu_new"),
            (TRANSFORMERS, "vision_config.hidden_act", "gelu", "the same in both towers"),
            (TRANSFORMERS, "text_config.eos_token_id", 1, "eos_token_id is 1"),
            (TRANSFORMERS, "vision_config.num_hidden_layers", 12, "another model's: vision_layers is 12 there, 2 in"),
            (OPEN_CLIP, "model_cfg.text_cfg.width", 512, "transformer_width is 512 there, 8 in the file"),
            (OPEN_CLIP, "model_cfg.quick_gelu", "x", "quick_gelu is x, expected true or false"),
            (TRANSFORMERS, "text_config.num_attention_heads", 3, "width of 8 cannot be split among 3 heads"),
            (OPEN_CLIP, "model_cfg.vision_cfg.act_kwargs", {"approximate": "tanh"}, "act_kwargs is {'approxi"),
            (OPEN_CLIP, "model_cfg.vision_cfg.layers", [3, 4, 6, 3], "layers is [3, 4, 6, 3], expected a whole number"),
            (OPEN_CLIP, "preprocess_cfg.mean", [123.7, 116.3, 103.5], "mean is [123.7, 116.3, 103.5], expected three"),
            (OPEN_CLIP, "preprocess_cfg.std", [1, 1, 0], "std is [1, 1, 0], expected three numbers of 0.001")]:
        config.write_text(json.dumps(with_(base, path, value)))
        refused(folder, re.escape(message))
    for content in (b"", b"null", b"[1]", b"[" * 300_000, b"\xff\xfe{}", b"{}", b'{"model_cfg": 3}'):
        config.write_bytes(content)
        refused(folder, "config.json: no config of a CLIP")
    for base, path in ((TRANSFORMERS, "text_config.num_attention_heads"), (TRANSFORMERS, "vision_config.hidden_act"),
                       (OPEN_CLIP, "model_cfg.vision_cfg.head_width"), (OPEN_CLIP, "model_cfg.text_cfg"),
                       (OPEN_CLIP, "preprocess_cfg.std")):
        for junk in filter(None, JUNK) if "std" in path else JUNK:
            config.write_text(json.dumps(with_(base, path, junk)))
            refused(folder, "config")


def test_downloads(monkeypatch, tmp_path, tiny_clip_file, capsys):
    """In order, once, from a mirror of Hugging Face if HF_ENDPOINT names one."""
    sha256, path = clip.file_sha256(tiny_clip_file), tmp_path / "cache" / "tiny.pt"
    where = [f"/openaipublic.azureedge.net/clip/models/{sha256}/tiny.pt",
             "/mirror/jinaai/clip-models/resolve/main/tiny.pt", "/good/tiny.pt"]
    files = {where[1]: b"other", where[2]: tiny_clip_file.read_bytes()}
    monkeypatch.setattr(clip, "CACHE", path.parent)
    monkeypatch.setitem(clip.MODELS, "tiny", (sha256, "tiny.pt"))
    with serve(files) as (base, asked):
        addresses = [address.replace("https://", base) for address in loading.ADDRESSES] + [base + "good/{file}"]
        monkeypatch.setattr(loading, "ADDRESSES", addresses)
        monkeypatch.setenv("HF_ENDPOINT", base + "mirror/")
        assert clip.load("tiny").remark is None and clip.load("tiny").visual.output_dim == 128
        assert [place for place, _ in asked] == where and list(clip.CACHE.iterdir()) == [path]
        assert capsys.readouterr().out.count("downloading http") == 3
        path.write_bytes(b"spoilt")
        with pytest.raises(clip.CLIPError, match="tiny.pt is damaged or another file: its sha256.* Delete it"):
            clip.load("tiny")
        assert len(asked) == 3  # not overwritten unasked
        path.unlink()
        addresses[2] = "http://127.0.0.1:9/{file}"  # refuses
        with pytest.raises(clip.CLIPError, match=rf"404.* said: .*invalid hash.* said: .*refused.*{sha256}.*{path}\Z"):
            clip.load("tiny")
    assert not list(clip.CACHE.iterdir())
