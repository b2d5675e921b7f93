"""What others call the same things: open_clip's and transformers' parameter names and config files."""
import json
import re

import torch

from clip.model import ACTIVATIONS, CLIPError
from support import first_line

ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.class_embedding")  # OpenAI's and open_clip's; transformers'
CHANGES = re.compile(r"lora|adapter|(^|[._])ema([._]|$)", re.IGNORECASE)  # what stands beside weights to change them
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size", "attn_mask", "position_ids", "logit_bias")
TRANSFORMERS = {  # its names: ours
    "text_model.embeddings.token_embedding": "token_embedding", "text_model.final_layer_norm": "ln_final",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.encoder.layers": "transformer.resblocks", "text_projection.weight": "text_projection",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.embeddings.class_embedding": "visual.class_embedding", "visual_projection.weight": "visual.proj",
    "vision_model.embeddings.patch_embedding": "visual.conv1", "vision_model.pre_layrnorm": "visual.ln_pre",
    "vision_model.encoder.layers": "visual.transformer.resblocks", "vision_model.post_layernorm": "visual.ln_post",
    "self_attn.": "attn.", "layer_norm1": "ln_1", "layer_norm2": "ln_2", ".fc1": ".c_fc", ".fc2": ".c_proj"}


def openai_names(tensors):
    """{name: tensor} of any file that holds one CLIP -> its state dict in OpenAI's names; [what is left out].

    Each CLIP has one name of ANCHORS. What comes before it is the prefix of all ("state_dict.module.",
    "clip_model.", ...). Tensors without the prefix are left out, an optimizer's for instance. Raises CLIPError, and
    KeyError where a tensor is missing."""
    found = [(name, anchor) for name in tensors for anchor in ANCHORS if f".{name}".endswith(f".{anchor}")]
    if len(found) != 1:
        raise CLIPError(f"expected one CLIP with OpenAI's ViT (no ResNet, timm tower, SigLIP), found {len(found)}: "
                        f"of {len(tensors)} tensors, {len(found)} are called {' or '.join(ANCHORS)}")
    (name, anchor), state = found[0], {}
    prefix = name.removesuffix(anchor)
    beside = sorted(name for name in tensors if not name.startswith(prefix))
    if changing := [name for name in tensors if CHANGES.search(name.removeprefix(prefix))]:
        raise CLIPError(f"holds {len(changing)} tensors that would change CLIP's weights, as {changing[0][-60:]!r}: "
                        "merge them in, or save the weights alone if you want them as they are")
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix).removeprefix("text.") if name.startswith(prefix) else ""
        if name.rpartition(".")[2] not in ("", *NO_WEIGHTS):
            for theirs, ours in TRANSFORMERS.items() if anchor == ANCHORS[1] else ():
                name = name.replace(theirs, ours)
            if name in state:
                raise CLIPError(f"holds {name[:60]!r} twice, under two names: save one of them alone")
            state[name] = tensor
    if anchor == ANCHORS[1]:
        for name in [name for name in state if ".q_proj." in name]:
            qkv = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)  # (3W, W), or (3W) of a bias
        for name in ("visual.proj", "text_projection"):
            state[name] = state[name].t()  # (D, W) -> (W, D)
    return state, beside


TRANSFORMERS_USUAL = {"hidden_act": tuple(ACTIVATIONS), "layer_norm_eps": (1e-5,), "eos_token_id": (49407, 2, None)}
# open_clip's settings that are read below, or that shapes tell, or that change no feature; all others must be UNSET
OPEN_CLIP_KNOWN = (
    "quick_gelu", "vision_cfg", "text_cfg", "width", "layers", "heads", "head_width", "embed_dim", "mlp_ratio",
    "context_length", "vocab_size", "image_size", "patch_size", "patch_dropout", "output_tokens", "custom_text",
    "hf_tokenizer_name", "eos_id", "init_logit_scale", "init_logit_bias")
UNSET = (None, False, {}, "tok", "argmax", "learnable", "linear")


def read_config(path):
    """config.json or open_clip_config.json -> arguments of clip.CLIP: what no shape tells (activation, heads, mean and
    std of images) and, to be compared with the weights, each tower's width and layers. Raises CLIPError."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if "model_cfg" in config:
            found, pictures = open_clip(config["model_cfg"]), config.get("preprocess_cfg") or {}
        else:
            beside = path.with_name("preprocessor_config.json")
            found = transformers(config)
            pictures = json.loads(beside.read_text(encoding="utf-8-sig")) if beside.is_file() else {}
        for key, least in (("mean", 0), ("std", 0.001)):
            if value := pictures.get(key) or pictures.get(f"image_{key}"):
                right = len(value) == 3 and all(type(x) in (int, float) and least <= x <= 1 for x in value)
                expect(right, key, value, f"three numbers of {least} to 1")
                found[key] = tuple(value)
        expect(pictures.get("do_normalize", True) is True, "do_normalize", pictures.get("do_normalize"), "true")
    except Exception as error:  # what stands there may be anything
        reason = f"{type(error).__name__}: {first_line(error, 160)}"
        raise CLIPError(f"{path}: no config of a CLIP that this code can build ({reason})") from None
    return found


def expect(right, what, found, expected):
    if not right:
        raise ValueError(f"{what[:40]} is {str(found)[:40]}, expected {expected}")


def size(part, key, default):
    value = part.get(key, default)
    expect(type(value) is int and 0 < value < 2 ** 20, key, value, "a whole number")
    return value


def transformers(config):
    """A CLIPModel's config.json. What it leaves out is as in the library."""
    expect(config.get("model_type") == "clip", "model_type", config.get("model_type"), "clip")
    found = {}
    for tower, ours, width, heads in (("text", "transformer", 512, 8), ("vision", "vision", 768, 12)):
        part = config.get(f"{tower}_config_dict") or config[f"{tower}_config"]  # as the library: the first one counts
        for key, usual in TRANSFORMERS_USUAL.items():
            value = part.get(key, usual[0])
            expect(value in usual, key, value, f"one of {usual}")
        act = part.get("hidden_act", "quick_gelu")
        expect(act == found.setdefault("activation", act), "hidden_act", act, "the same in both towers")
        found[f"{ours}_width"] = size(part, "hidden_size", width)
        found[f"{ours}_layers"] = size(part, "num_hidden_layers", 12)
        found[f"{ours}_heads"] = size(part, "num_attention_heads", heads)
    return found


def open_clip(config):
    """model_cfg of an open_clip_config.json. What it leaves out is as in the library."""
    text, vision, quick = config["text_cfg"], config["vision_cfg"], config.get("quick_gelu")
    for key, value in (*config.items(), *text.items(), *vision.items()):
        expect(key in OPEN_CLIP_KNOWN or value in UNSET, key, value, "it unset: no such part is built here")
    expect(quick in (None, False, True), "quick_gelu", quick, "true or false")
    width = size(vision, "width", 768)
    return {"activation": "quick_gelu" if quick else "gelu",
            "transformer_width": size(text, "width", 512), "transformer_layers": size(text, "layers", 12),
            "transformer_heads": size(text, "heads", 8),
            "vision_width": width, "vision_layers": size(vision, "layers", 12),
            "vision_heads": max(width // size(vision, "head_width", 64), 1)}
