"""What others call the same things: open_clip's and transformers' parameter names and config files."""
import json
import re
from itertools import accumulate

import torch

from clip.model import ACTIVATIONS, CLIPError

ANCHORS = ("visual.conv1.weight", "vision_model.embeddings.class_embedding")  # OpenAI's and open_clip's; transformers'
TOWERS = {"image": ("class_embedding", "visual.proj", "visual_projection.weight"),  # how some of its names end
          "text": ("token_embedding.weight", "text_projection", "text_projection.weight")}
OTHERS = {"visual.layer1.": "a ResNet CLIP", "visual.trunk.": "a CLIP with a timm image tower",
          "vision_model.head.": "SigLIP", "text.transformer.embeddings.": "a CLIP with another text tower"}
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
    """{name: tensor} of any file that holds one CLIP -> its state dict in OpenAI's names; what is left out, in words.

    Each CLIP has one name of ANCHORS. What comes before it is the prefix of all ("state_dict.module.",
    "clip_model.", ...). Tensors without the prefix are left out, an optimizer's for instance. Raises CLIPError,
    KeyError."""
    for name in tensors:
        if other := [OTHERS[part] for part in OTHERS if part in name]:
            raise CLIPError(f"{other[0]} (it holds {name[:60]!r}): use a CLIP with OpenAI's ViT, for instance ViT-B/16")
    if len(towers := [tower for tower, end in TOWERS.items() if any(name.endswith(end) for name in tensors)]) == 1:
        raise CLIPError(f"holds CLIP's {towers[0]} tower alone, both are needed: give the whole CLIP's file")
    found = [(name, anchor) for name in tensors for anchor in ANCHORS if f".{name}".endswith(f".{anchor}")]
    if not found:
        raise CLIPError(f"no CLIP with a ViT: none of its {len(tensors)} tensors is called {' or '.join(ANCHORS)}")
    if len(found) > 1:
        raise CLIPError(f"{len(found)} CLIPs in it ({found[0][0][:60]!r} and {found[1][0][:60]!r}): save one alone")
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
    parts = ", ".join(sorted({repr(branch(name, prefix)[:60]) for name in beside}))[:200]
    return state, f"{len(beside)} tensors are left out, as no part of CLIP: {parts}" if beside else None


def branch(name, prefix):
    """Where a name leaves the prefix: state_dict.head.weight, state_dict.clip. -> state_dict.head"""
    starts = accumulate(name.split("."), "{}.{}".format)
    return next((start for start in starts if not prefix.startswith(f"{start}.")), name)


# ---------------------------------------------------------------- config files

# {a setting: (argument of clip.CLIP, what the library takes where it is left out)}
TRANSFORMERS_TEXT = {"hidden_size": ("transformer_width", 512), "num_hidden_layers": ("transformer_layers", 12),
                     "num_attention_heads": ("transformer_heads", 8), "intermediate_size": ("transformer_hidden", 2048),
                     "max_position_embeddings": ("context_length", 77), "vocab_size": ("vocab_size", 49408)}
TRANSFORMERS_VISION = {"hidden_size": ("vision_width", 768), "num_hidden_layers": ("vision_layers", 12),
                       "num_attention_heads": ("vision_heads", 12), "intermediate_size": ("vision_hidden", 3072),
                       "image_size": ("image_resolution", 224), "patch_size": ("vision_patch_size", 32)}
OPEN_CLIP_TEXT = {"width": ("transformer_width", 512), "layers": ("transformer_layers", 12),
                  "heads": ("transformer_heads", 8), "context_length": ("context_length", 77),
                  "vocab_size": ("vocab_size", 49408)}
OPEN_CLIP_VISION = {"width": ("vision_width", 768), "layers": ("vision_layers", 12), "patch_size": (
    "vision_patch_size", 16), "image_size": ("image_resolution", 224), "head_width": ("head_width", 64)}
# Settings of open_clip beside these that are read below or change no feature; all others must be USUAL
SETTINGS = ("quick_gelu", "vision_cfg", "text_cfg", "embed_dim", "mlp_ratio", "patch_dropout", "output_tokens",
            "custom_text", "hf_tokenizer_name", "eos_id", "init_logit_scale", "init_logit_bias")
USUAL = (None, False, {}, "tok", "argmax", "learnable", "linear")


def read_config(path):
    """config.json or open_clip_config.json -> arguments of clip.CLIP: what no shape tells (activation, heads, mean and
    std of images) and, to be compared with the weights, all sizes. Raises CLIPError."""
    try:
        config = read_json(path)
        if "model_cfg" in config:
            found, pictures = open_clip(section(config, "model_cfg")), config.get("preprocess_cfg") or {}
        else:
            beside = path.with_name("preprocessor_config.json")
            found, pictures = transformers(config), read_json(beside) if beside.is_file() else {}
        found["image_resolution"] -= found["image_resolution"] % found["vision_patch_size"]  # the rest is not seen
        for key in ("mean", "std"):
            value = pictures.get(key) or pictures.get(f"image_{key}")
            expect(value is None or type(value) is list and len(value) == 3 and all(
                type(x) in (int, float) and 0 <= x <= 1 for x in value), key, value, "three numbers of 0 to 1")
            found |= {key: tuple(value)} if value else {}
        expect(all(found.get("std", (1,))), "std", 0, "numbers above 0")
        expect(pictures.get("do_normalize", True) is True, "do_normalize", pictures.get("do_normalize"), "true")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise CLIPError(f"{path}: no config of a CLIP that this code can build: {str(error)[:160]}") from None
    return found


def read_json(path):
    expect(path.stat().st_size < 1_000_000, path.name, "a file above 1 MB", "about 5 KB")
    return section({path.name: json.loads(path.read_text(encoding="utf-8-sig"))}, path.name)


def section(config, key):
    expect(isinstance(config.get(key), dict), key, config.get(key), "a JSON object")
    return config[key]


def sizes(config, table):
    """{argument of clip.CLIP: the whole number that a part of a config has for it}"""
    for key, (_, default) in table.items():
        value = config.get(key, default)
        expect(type(value) is int and 0 < value < 2 ** 20, key, value, "a whole number")
    return {ours: config.get(key, default) for key, (ours, default) in table.items()}


def expect(right, what, found, expected):
    if not right:
        raise ValueError(f"{what[:40]} is {str(found)[:40]}, expected {expected}")


def transformers(config):
    """A CLIPModel's config.json."""
    expect(config.get("model_type") == "clip", "model_type", config.get("model_type"), "clip")
    found = sizes(config, {"projection_dim": ("embed_dim", 512)})
    for tower, table in (("text", TRANSFORMERS_TEXT), ("vision", TRANSFORMERS_VISION)):
        old = f"{tower}_config_dict"  # stands above the other if a file has both
        part = section(config, old if config.get(old) else f"{tower}_config")
        act, eps, eos = part.get("hidden_act", "quick_gelu"), part.get("layer_norm_eps", 1e-5), part.get("eos_token_id")
        expect(act in list(ACTIVATIONS) and act == found.get("activation", act), "hidden_act", act,
               "quick_gelu or gelu, in both towers the same")
        expect(eps == 1e-5, "layer_norm_eps", eps, 1e-5)
        expect(eos in (None, 2, 49407), "eos_token_id", eos, "49407 (or 2, in old files)")
        found |= {"activation": act, **sizes(part, table)}
    return found


def open_clip(config):
    """model_cfg of an open_clip_config.json."""
    text, vision = section(config, "text_cfg"), section(config, "vision_cfg")
    for part, table in ((config, {}), (text, OPEN_CLIP_TEXT), (vision, OPEN_CLIP_VISION)):
        for key, value in part.items():
            expect(key in (*SETTINGS, *table) or value in USUAL, key, value, "it unset: no such part is built here")
    expect(type(vision.get("layers")) is not list, "the image tower", "a ResNet", "a ViT")
    quick = config.get("quick_gelu")
    expect(quick is None or type(quick) is bool, "quick_gelu", quick, "true or false")
    found = {"activation": "quick_gelu" if quick else "gelu", **sizes(config, {"embed_dim": ("embed_dim", 512)}),
             **sizes(text, OPEN_CLIP_TEXT), **sizes(vision, OPEN_CLIP_VISION)}
    for part, tower in ((text, "transformer"), (vision, "vision")):
        ratio = part.get("mlp_ratio", 4)
        expect(type(ratio) in (int, float) and 0 < ratio < 100, "mlp_ratio", ratio, "a number")
        found[f"{tower}_hidden"] = int(found[f"{tower}_width"] * ratio)
    return found | {"vision_heads": max(found["vision_width"] // found.pop("head_width"), 1)}
