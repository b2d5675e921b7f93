"""What others call the same things: open_clip's and transformers' parameter names and config files."""
import json

import torch

from clip.model import ACTIVATIONS, CLIPError

ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.class_embedding")  # OpenAI's and open_clip's; transformers'
OTHERS = {"visual.layer1.": "a ResNet CLIP", "visual.trunk.": "a CLIP with a timm image tower",
          "vision_model.head.": "SigLIP"}
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
    """{name: tensor} of any file that holds one CLIP -> its state dict in OpenAI's names. Raises CLIPError, KeyError.

    Each CLIP has one name of ANCHORS. What comes before it is the prefix of all ("state_dict.module.",
    "clip_model.", ...). Tensors without the prefix, an optimizer's for instance, are left out."""
    for name in tensors:
        if other := [OTHERS[part] for part in OTHERS if part in name]:
            raise CLIPError(f"{other[0]} (it holds {name[:80]}): use a CLIP with OpenAI's ViT, for instance ViT-B/16")
    found = [(name, anchor) for name in tensors for anchor in ANCHORS if f".{name}".endswith(f".{anchor}")]
    if not found:
        raise CLIPError(f"no CLIP with a ViT: none of its {len(tensors)} tensors is called {' or '.join(ANCHORS)}")
    if len(found) > 1:
        raise CLIPError(f"{len(found)} CLIPs in it ({found[0][0][:80]}, {found[1][0][:80]}): save one of them alone")
    (name, anchor), state = found[0], {}
    prefix = name.removesuffix(anchor)
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix).removeprefix("text.") if name.startswith(prefix) else ""
        if name.rpartition(".")[2] not in ("", *NO_WEIGHTS):
            for theirs, ours in TRANSFORMERS.items() if anchor == ANCHORS[1] else ():
                name = name.replace(theirs, ours)
            state[name] = tensor
    if anchor == ANCHORS[1]:
        for name in [name for name in state if ".q_proj." in name]:
            qkv = [state.pop(name.replace(".q_proj.", f".{part}_proj.")) for part in "qkv"]
            state[name.replace(".q_proj.", ".in_proj_")] = torch.cat(qkv)  # (3W, W), or (3W) of a bias
        for name in ("visual.proj", "text_projection"):
            state[name] = state[name].t()  # (D, W) -> (W, D)
    return state


# ---------------------------------------------------------------- config files


def read_config(path):
    """config.json or open_clip_config.json -> arguments of clip.CLIP: what no shape tells (activation, heads, mean and
    std of images) and, to be compared, width and layers of both towers. Raises CLIPError."""
    try:
        config = read_json(path)
        if "model_cfg" in config:
            found, pictures = open_clip(section(config, "model_cfg")), config.get("preprocess_cfg") or {}
        else:
            beside = path.with_name("preprocessor_config.json")
            found, pictures = transformers(config), read_json(beside) if beside.is_file() else {}
        for key, value in found.items():
            expect(key == "activation" or type(value) is int and 0 < value < 2 ** 20, key, value, "a whole number")
        for key in ("mean", "std"):
            value = pictures.get(key) or pictures.get(f"image_{key}")
            expect(value is None or type(value) is list and len(value) == 3 and all(
                type(x) in (int, float) and 0 <= x < 1e3 for x in value), key, value, "three numbers")
            found |= {key: tuple(value)} if value else {}
        expect(all(found.get("std", (1,))), "std", 0, "numbers above 0")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CLIPError(f"{path}: no config of a CLIP that this code can build: {str(error)[:160]}") from None
    if head_width := found.pop("vision_head_width", None):
        found["vision_heads"] = max(found["vision_width"] // head_width, 1)
    return found


def read_json(path):
    expect(path.stat().st_size < 1_000_000, path.name, "a file above 1 MB", "about 5 KB")
    return section({path.name: json.loads(path.read_text(encoding="utf-8"))}, path.name)


def section(config, key):
    expect(isinstance(config.get(key), dict), key, config.get(key), "a JSON object")
    return config[key]


def expect(right, what, found, expected):
    if not right:
        raise ValueError(f"{what[:40]} is {str(found)[:40]}, expected {expected}")


def transformers(config):
    """A CLIPModel's config.json; what it leaves out has transformers' defaults."""
    expect(config.get("model_type") == "clip", "model_type", config.get("model_type"), "clip")
    found = {}
    for tower, ours, width, heads in (("text", "transformer", 512, 8), ("vision", "vision", 768, 12)):
        old = f"{tower}_config_dict"  # stands above the other if a file has both
        part = section(config, old if config.get(old) else f"{tower}_config")
        act, eps, eos = part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5), part.get("eos_token_id")
        expect(act in list(ACTIVATIONS) and act == found.get("activation", act), "hidden_act", act,
               "quick_gelu or gelu, in both towers the same")
        expect(eps == 1e-5, "layer_norm_eps", eps, 1e-5)
        expect(eos in (None, 2, 49407), "eos_token_id", eos, "49407 (or 2, in old files)")
        found |= {"activation": act, f"{ours}_width": part.get("hidden_size", width),
                  f"{ours}_layers": part.get("num_hidden_layers", 12),
                  f"{ours}_heads": part.get("num_attention_heads", heads)}
    return found


# Settings of open_clip that are read below, that shapes tell, or that change no feature; all others must be USUAL
SETTINGS = ("quick_gelu", "vision_cfg", "text_cfg", "width", "layers", "heads", "head_width", "embed_dim", "image_size",
            "patch_size", "context_length", "vocab_size", "mlp_ratio", "patch_dropout", "output_tokens", "custom_text",
            "hf_tokenizer_name", "eos_id", "init_logit_scale", "init_logit_bias")
USUAL = (None, False, {}, "tok", "argmax", "learnable", "linear")


def open_clip(config):
    """model_cfg of an open_clip_config.json; what it leaves out has open_clip's defaults."""
    text, vision = section(config, "text_cfg"), section(config, "vision_cfg")
    for key, value in [*config.items(), *text.items(), *vision.items()]:
        expect(key in SETTINGS or value in USUAL, key, value, "it unset: no such part is built here")
    expect(type(vision.get("layers")) is not list, "the image tower", "a ResNet", "a ViT")
    return {"activation": "quick_gelu" if config.get("quick_gelu") is True else "gelu",
            "vision_width": vision.get("width", 768), "vision_layers": vision.get("layers", 12),
            "vision_head_width": vision.get("head_width", 64), "transformer_width": text.get("width", 512),
            "transformer_layers": text.get("layers", 12), "transformer_heads": text.get("heads", 8)}
