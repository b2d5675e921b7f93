"""CLIP files as people have them: wrapped, renamed, described by a config, downloaded, damaged, hostile."""
import argparse
import hashlib
import http.server
import json
import os
import pickle
import random
import re
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch

import clip
from clip import loading

SMALL = dict(embed_dim=24, image_resolution=32, vision_layers=2, vision_width=48, vision_patch_size=16,
             context_length=77, vocab_size=49408, transformer_width=8, transformer_layers=1)  # 0.5 million parameters


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    model = clip.CLIP(**SMALL)
    return {key: tensor + 0.01 * torch.randn_like(tensor) for key, tensor in model.state_dict().items()}


def refused(path, message):
    """One clear line that names the file."""
    with pytest.raises(clip.CLIPError) as error:
        clip.load(path)
    line = str(error.value)
    assert re.search(message, line), line
    assert "\n" not in line and path.name in line and len(line) < 900


def same(path, state):
    loaded = clip.load(path).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key].float()) for key in state)


def safetensors(state, metadata=None):
    """-> bytes, written without the library; shapes and offsets as the format's text says"""
    header, data = {"__metadata__": metadata} if metadata else {}, b""
    names = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64"}
    for key, x in state.items():
        raw = x.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        place = [len(data), len(data) + len(raw)]
        header[key] = {"dtype": names[x.dtype], "shape": list(x.shape), "data_offsets": place}
        data += raw
    return join(json.dumps(header).encode(), data)


def join(header, data):
    return len(header).to_bytes(8, "little") + header + data


# ---------------------------------------------------------------- names and formats


def test_every_wrapping_by_one_rule(small, tmp_path):
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    path = tmp_path / "wrapped.pt"
    for prefix in ("", "module.", "model.", "clip.", "clip_model.", "_orig_mod.", "module._orig_mod.model.clip."):
        named = {prefix + key: x for key, x in small.items()}
        for content in (named, {"state_dict": named, "optimizer": optimizer, "epoch": 3},
                        {"model": {"state_dict": named}},
                        *([named | {"head.weight": torch.ones(2), "epoch": 3}] if prefix else [])):
            torch.save(content, path)
            same(path, small)
        path.write_bytes(safetensors(named))
        same(path, small)
    torch.save({"student": small, "teacher": small | {"logit_scale": torch.ones(())}}, path)
    refused(path, "2 CLIPs in it .*save one of them alone")
    torch.save({key: torch.nn.Parameter(x) for key, x in small.items()}, path)  # of named_parameters
    same(path, small)
    text = ("transformer.", "token_emb", "positional", "ln_final", "text_proj")
    torch.save({"text." * key.startswith(text) + key: x for key, x in small.items()} | {
        "text.attn_mask": torch.zeros(7, 7), "logit_bias": torch.zeros(())}, path)  # open_clip's CustomTextCLIP
    same(path, small)


def test_safetensors_against_the_library(small, tmp_path):
    library = pytest.importorskip("safetensors.torch")
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        state = {key: x.to(dtype) for key, x in small.items()}
        extra = {"text_model.embeddings.position_ids": torch.arange(77).unsqueeze(0)}
        library.save_file(state | extra, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
        same(tmp_path / "theirs.safetensors", state)
        (tmp_path / "ours.safetensors").write_bytes(safetensors(state, {"format": "pt"}))
        assert library.load_file(tmp_path / "ours.safetensors").keys() == state.keys()
        same(tmp_path / "ours.safetensors", state)


def test_what_cannot_be_read_says_why(small, tmp_path, tiny_clip_file):
    path = tmp_path / "bad.pt"

    def write(content):
        path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
        return path

    data = tiny_clip_file.read_bytes()
    flipped = bytearray(data)
    flipped[len(data) // 2] ^= 255
    no_archive = "no file of torch.save .*safetensors"
    for content, message in [
            (data[:len(data) // 2], "truncated"), (bytes(flipped), "damaged"), (b"hello", no_archive),
            (b"", no_archive),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer.*git lfs pull"),
            ({"state_dict": small, "args": argparse.Namespace(lr=1)}, "wants the class argparse.Namespace.*torch.save"),
            ({"state_dict": small, "best": np.float64(1)}, r"wants the class numpy\S*scalar.*weights_only=False"),
            ([1, 2], "no CLIP with a ViT: none of its 0 tensors"), ({"a": torch.zeros(1)}, "none of its 1 tensors"),
            ({k: x for k, x in small.items() if k != "visual.proj"}, "1 tensors differ.* visual.proj, is missing"),
            ({k: x for k, x in small.items() if k.startswith("visual.")}, "complete CLIP.*lacks .*'text_projection'"),
            (small | {"visual.more": torch.zeros(1)}, "another model: .*visual.more, is unexpected"),
            (small | {"ln_final.bias": torch.zeros(3)}, r"ln_final.bias has shape \(3,\)"),
            (small | {"visual.proj": small["visual.proj"] * torch.nan}, "not finite"),
            (small | {"visual.proj": torch.zeros(1).expand(48, 10 ** 9)}, "larger tensors than it holds"),
            (small | {"visual.layer1.0.conv1.weight": torch.zeros(1)}, "a ResNet CLIP .*use a CLIP with .*ViT"),
            ({"vision_model.head.probe": torch.zeros(1)}, "SigLIP"), ({"visual.trunk.x": torch.zeros(1)}, "timm"),
            (small | {"token_embedding.weight": torch.zeros(100, 8)}, "has 100 tokens, CLIP's tokenizer has 49408")]:
        refused(write(content), message)
    refused(tmp_path / "absent.pt", "no CLIP file.*ViT-B/32, ViT-B/16, ViT-L/14, ViT-L/14@336px")
    wide = clip.CLIP(**SMALL | dict(vision_width=1280, vision_layers=1))
    refused(write(wide.state_dict()), "width 1280, OpenAI's widest is 1024")
    loop = {"state_dict": small}
    loop["self"] = loop
    same(write(loop), small)


def test_hostile_shapes_take_no_memory(tmp_path, small):
    """A file of 3 MB whose shapes ask for a tower of 10^11 parameters, which no machine could make."""
    state = small | {"visual.conv1.weight": torch.zeros(200_000, 1, 1, 1)}
    torch.save(state, tmp_path / "big.pt")
    refused(tmp_path / "big.pt", "has shape")


def test_a_hostile_archive_runs_nothing(tmp_path):
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
        refused(path, "wants the class posix.system")
    assert not (tmp_path / "ran").exists()


# ---------------------------------------------------------------- configs

TRANSFORMERS = {"model_type": "clip",
                "text_config": {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
                "vision_config": {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}}
OPEN_CLIP = {"model_cfg": {"embed_dim": 24, "vision_cfg": {"width": 48, "layers": 2, "head_width": 16},
                           "text_cfg": {"width": 8, "layers": 1, "heads": 2}}}


def with_(config, path, value):
    """A copy of the config with the value at a dotted path."""
    config = json.loads(json.dumps(config))
    *folders, last = path.split(".")
    part = config
    for folder in folders:
        part = part.setdefault(folder, {})
    part[last] = value
    return config


def heads(model):
    image, text = model.visual.transformer.resblocks[1], model.transformer.resblocks[0]
    return image.attn.heads, text.attn.heads, type(image.mlp.gelu).__name__, type(text.mlp.gelu).__name__


def test_the_config_decides_what_no_shape_tells(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(small))
    config, quick, plain, seen = tmp_path / "config.json", ("QuickGELU", "QuickGELU"), ("GELU", "GELU"), {}
    for content, want in [
            (TRANSFORMERS, (3, 2, *quick)),
            (with_(with_(TRANSFORMERS, "text_config.hidden_act", "gelu"), "vision_config.hidden_act", "gelu"),
             (3, 2, *plain)),
            (with_(TRANSFORMERS, "text_config_dict", TRANSFORMERS["text_config"] | {"num_attention_heads": 4}),
             (3, 4, *quick)),
            (OPEN_CLIP, (3, 2, *plain)), (with_(OPEN_CLIP, "model_cfg.quick_gelu", True), (3, 2, *quick))]:
        config.write_text(json.dumps(content))
        model = clip.load(tmp_path)
        assert heads(model) == want and model.remark is None
        assert seen.setdefault(want, clip.fingerprint(model)) == clip.fingerprint(model)
        assert clip.fingerprint(clip.load(tmp_path / "model.safetensors")) == clip.fingerprint(model)
    assert len(set(seen.values())) == len(seen) == 3
    # of two libraries' files in one folder, each is read with its own config
    (tmp_path / "open_clip_config.json").write_text(json.dumps(OPEN_CLIP))
    config.write_text(json.dumps(TRANSFORMERS))
    torch.save(small, tmp_path / "open_clip_pytorch_model.bin")
    assert heads(clip.load(tmp_path))[2:] == plain
    assert heads(clip.load(tmp_path / "model.safetensors"))[2:] == quick
    # a file of any other name stands alone
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    assert heads(clip.load(tmp_path / "other.safetensors")) == (1, 1, "QuickGELU", "QuickGELU")
    assert "no config" in clip.load(tmp_path / "other.safetensors").remark


def test_statistics_of_pictures(small, tmp_path):
    """LAION's ViT-L/14 was trained with mean and std 0.5."""
    (tmp_path / "model.safetensors").write_bytes(safetensors(small))
    (tmp_path / "config.json").write_text(json.dumps(TRANSFORMERS))
    usual = clip.load(tmp_path)
    half, pictures = [0.5, 0.5, 0.5], torch.rand(1, 3, 32, 32)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"image_mean": half, "image_std": half}))
    ours = clip.load(tmp_path)
    undone = (pictures * 2 - 1) * usual.visual.std + usual.visual.mean  # which usual normalises to the same
    assert torch.allclose(ours.encode_image(pictures), usual.encode_image(undone), atol=1e-5)
    assert clip.fingerprint(ours) != clip.fingerprint(usual)
    open_clips = with_(with_(OPEN_CLIP, "model_cfg.quick_gelu", True), "preprocess_cfg", {"mean": half, "std": half})
    (tmp_path / "config.json").write_text(json.dumps(open_clips))
    assert clip.fingerprint(clip.load(tmp_path)) == clip.fingerprint(ours)


def test_unusual_configs_and_folders_are_refused(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(small))
    for base, path, value, message in [
            (TRANSFORMERS, "model_type", "siglip", "model_type is siglip, expected clip"),
            (TRANSFORMERS, "text_config.layer_norm_eps", 1e-6, "layer_norm_eps is 1e-06"),
            (TRANSFORMERS, "vision_config.hidden_act", "gelu_new", "hidden_act is gelu_new"),
            (TRANSFORMERS, "vision_config.hidden_act", "gelu", "in both towers the same"),
            (TRANSFORMERS, "text_config.eos_token_id", 1, "eos_token_id is 1"),
            (TRANSFORMERS, "vision_config", None, "vision_config is None, expected a JSON object"),
            (TRANSFORMERS, "vision_config.num_hidden_layers", 12, "another model's: vision_layers is 12 there"),
            (TRANSFORMERS, "text_config.num_attention_heads", 3, "width of 8 cannot be split among 3 heads"),
            (OPEN_CLIP, "model_cfg.vision_cfg.act_kwargs", {"approximate": "tanh"}, "act_kwargs is {'approxi"),
            (OPEN_CLIP, "model_cfg.text_cfg.norm_kwargs", {"eps": 1e-6}, "norm_kwargs is "),
            (OPEN_CLIP, "model_cfg.text_cfg.no_causal_mask", True, "no_causal_mask is True"),
            (OPEN_CLIP, "model_cfg.vision_cfg.pool_type", "avg", "pool_type is avg"),
            (OPEN_CLIP, "model_cfg.vision_cfg.layers", [3, 4, 6, 3], "the image tower is a ResNet, expected a ViT"),
            (OPEN_CLIP, "model_cfg.vision_cfg.timm_model_name", "vit", "timm_model_name is vit"),
            (OPEN_CLIP, "preprocess_cfg.mean", [0.5, "x", 0.5], "mean is [0.5, 'x', 0.5], expected three numbers")]:
        (tmp_path / "config.json").write_text(json.dumps(with_(base, path, value)))
        with pytest.raises(clip.CLIPError, match=re.escape(message)):
            clip.load(tmp_path)
    (tmp_path / "sharded").mkdir()
    refused(tmp_path / "sharded", "a folder without open_clip_model.safetensors, ")
    (tmp_path / "sharded" / "model.safetensors.index.json").write_text("{}")
    refused(tmp_path / "sharded", "weights in several files: join them")


# ---------------------------------------------------------------- downloads


class Server(http.server.BaseHTTPRequestHandler):
    files, seen = {}, []

    def do_GET(self):
        self.seen.append(self.path)
        length, data = self.files.get(self.path, (0, None))
        self.send_response(200 if data is not None else 404)
        self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(data or b"")  # fewer bytes than announced: the connection dies

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    monkeypatch.setattr(clip, "CACHE", tmp_path / "cache")
    Server.files, Server.seen = {}, []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as served:
        threading.Thread(target=served.serve_forever, daemon=True).start()
        base = f"http://127.0.0.1:{served.server_port}"
        monkeypatch.setattr(loading, "ADDRESSES", [f"{base}/{{file}}/{n}" for n in range(4)])
        yield Server
        served.shutdown()


def test_addresses():
    urls = [a.format(sha256=clip.MODELS["ViT-B/16"][0], file=clip.MODELS["ViT-B/16"][1]) for a in loading.ADDRESSES]
    assert urls[0].endswith("/5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f/ViT-B-16.pt")
    assert urls[1] == "https://huggingface.co/jinaai/clip-models/resolve/main/ViT-B-16.pt"


def test_downloads(server, monkeypatch, tmp_path, tiny_clip_file, capsys):
    good = tiny_clip_file.read_bytes()
    monkeypatch.setitem(clip.MODELS, "tiny", (hashlib.sha256(good).hexdigest(), "tiny.pt"))
    where = [f"/tiny.pt/{n}" for n in range(4)]
    server.files = {where[1]: (len(good), good[:len(good) // 2]), where[2]: (5, b"other"), where[3]: (len(good), good)}
    model = clip.load("tiny")
    assert model.visual.output_dim == 128 and model.remark is None
    assert server.seen == where  # in order, the first three in vain
    printed = capsys.readouterr().out
    assert printed.count("downloading http") == 4 and printed.count("failed: ") == 3 and "404" in printed
    clip.load("tiny")
    assert server.seen == where and [p.name for p in clip.CACHE.iterdir()] == ["tiny.pt"]

    (clip.CACHE / "tiny.pt").write_bytes(b"spoilt")
    refused(clip.CACHE / "tiny.pt", "not one of OpenAI's|no file of")
    with pytest.raises(clip.CLIPError, match=r"tiny.pt is not OpenAI's tiny \(its sha256 differs\): delete it"):
        clip.load("tiny")
    assert server.seen == where  # not overwritten unasked

    (clip.CACHE / "tiny.pt").unlink()
    del server.files[where[3]]
    monkeypatch.setattr(loading, "ADDRESSES", [*loading.ADDRESSES, "http://127.0.0.1:9/{file}"])  # refuses
    with pytest.raises(clip.CLIPError) as error:
        clip.load("tiny")
    line = str(error.value)
    assert line.count(" said: ") == 5 and line.count("404") == 2 and "invalid hash" in line and "refused" in line
    assert str(clip.CACHE / "tiny.pt") in line and clip.MODELS["tiny"][0] in line and "\n" not in line
    assert not list(clip.CACHE.iterdir())


def test_the_remark_is_of_strangers_only(tiny_clip_file, monkeypatch):
    assert "not one of OpenAI's files" in clip.load(tiny_clip_file).remark
    assert clip.load(loading.HERE / "toy" / "clip.pt").remark is None
    monkeypatch.setitem(clip.MODELS, "theirs", (clip.file_sha256(tiny_clip_file), "x.pt"))
    assert clip.load(tiny_clip_file).remark is None


# ---------------------------------------------------------------- fuzz

SEEDS = int(os.environ.get("FUZZ", 1))  # rounds; FUZZ=50 for a long one
JUNK = [None, True, -1, 0, 2 ** 63, 10 ** 30, 0.5, float("nan"), float("inf"), "", "x", [], {}, [1, [2]], {"a": 1}]


def damaged(seed, header, data):
    """-> {kind: bytes of a safetensors file with one thing wrong}"""
    rng = random.Random(seed)
    whole, garbled = join(json.dumps(header).encode(), data), bytearray(json.dumps(header).encode())
    name, other = rng.sample([name for name in header if len(header[name]["shape"]) == 2], 2)
    for _ in range(20):
        garbled[rng.randrange(len(garbled))] = rng.randrange(256)

    def entry(**change):
        return join(json.dumps(header | {name: header[name] | change}).encode(), data)

    shape, place, shift = header[name]["shape"], header[name]["data_offsets"], rng.choice([-8, 4, 10 ** 12, -10 ** 12])
    shapes = [[10 ** 12], [2 ** 62, 4], [0], [-shape[0], -shape[1]], [1] * 100, [*shape, 2], [10 ** 30] * 8]
    return dict(
        cut=whole[:rng.randrange(len(whole))], more=whole + b"\0" * rng.randint(1, 99), garbled=join(garbled, data),
        length=rng.choice([2 ** 63, 2 ** 64 - 1, 10 ** 9, len(whole), 0, 1]).to_bytes(8, "little") + whole[8:],
        nested=join(b'{"a":' + b"[" * 200_000, data), offsets=entry(data_offsets=[n + shift for n in place]),
        overlap=entry(data_offsets=header[other]["data_offsets"]), shape=entry(shape=shapes[seed % 7]),
        dtype=entry(dtype=rng.choice(["F64", "I8", *JUNK])), place=entry(data_offsets=rng.choice(JUNK)))


def test_damaged_safetensors(small, tmp_path, monkeypatch):
    made, real = [], torch.frombuffer
    monkeypatch.setattr(torch, "frombuffer", lambda buffer, **how: made.append(len(buffer)) or real(buffer, **how))
    whole = safetensors({key: x.half() for key, x in small.items()})
    start, path = 8 + int.from_bytes(whole[:8], "little"), tmp_path / "damaged.safetensors"
    for seed in range(7 * SEEDS):
        for kind, content in damaged(seed, json.loads(whole[8:start]), whole[start:]).items():
            path.write_bytes(content)
            tracemalloc.start()
            try:
                refused(path, "damaged, |has dtype|no file of|no CLIP with a ViT|lacks the tensor|differ")
                peak = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
            assert peak < len(content) + 2_000_000, (kind, seed, peak)  # and the header as objects
            if kind != "garbled":  # which may leave a whole file with another name
                assert not made, (kind, seed)  # no tensor of a file that is wrong anywhere


def test_damaged_configs(small, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(safetensors(small))
    config, tried = tmp_path / "config.json", 0
    for content in (b"", b"{", b"null", b"[1]", b"NaN", b"[" * 300_000, b'{"a":' * 100_000, b"\xff\xfe{}", b"{}",
                    json.dumps(TRANSFORMERS).encode() + b" " * 1_000_000, b'{"model_cfg": 3}',
                    b'{"model_type": "clip", "text_config": [], "vision_config": {}}',
                    b'{"model_cfg": {"text_cfg": {}, "vision_cfg": {}}, "preprocess_cfg": 7}'):
        config.write_bytes(content)
        refused(tmp_path, "config.json: no config of a CLIP")
        tried += 1
    for base, paths in (
            (TRANSFORMERS, ("text_config.num_attention_heads", "vision_config.hidden_size", "text_config",
                            "vision_config.hidden_act", "text_config.layer_norm_eps")),
            (OPEN_CLIP, ("model_cfg.vision_cfg.head_width", "model_cfg.text_cfg.heads", "model_cfg.text_cfg",
                         "model_cfg.vision_cfg.layers", "model_cfg.vision_cfg.made_up", "preprocess_cfg.std"))):
        for path in paths:
            for junk in JUNK:
                config.write_text(json.dumps(with_(base, path, junk)))
                tried += 1
                try:
                    assert heads(clip.load(tmp_path))[:2] == (3, 2)
                    assert path.endswith(("made_up", "std")) and not junk, (path, junk)  # off, or not given
                except clip.CLIPError as error:
                    assert "\n" not in str(error) and "config" in str(error) and len(str(error)) < 400, (path, junk)
    assert tried >= 60
