"""clip.load: a name, a file or a folder -> CLIP. Sizes are read off the tensors' shapes, the rest off a config file."""
import hashlib
import os
from pathlib import Path

import torch

import clip  # for clip.CACHE, which may be set to another folder
from clip.model import CLIP, HEAD_WIDTH, CLIPError
from clip.names import openai_names, read_config
from clip.tokenizer import VOCABULARY
from support import first_line
from support.archive import ArchiveError, check_tensors, fetch, file_sha256, misfit, read_tensors
from support.processes import first_on_machine

ADDRESSES = ("https://openaipublic.azureedge.net/clip/models/{sha256}/{file}",  # 404 since October 2025
             "{hub}/jinaai/clip-models/resolve/main/{file}")  # the same files, byte by byte
MODELS = {  # name: (sha256 of the file, file name)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
CONFIGS = ("open_clip_config.json", "config.json")
HERE = Path(__file__).resolve().parent.parent


def load(name_or_path):
    """A name in MODELS (downloaded once into clip.CACHE), a file or a folder -> CLIP, fp32, frozen, on the CPU.

    A file holds one CLIP, in any format of support/archive.py and any names of names.py. In a folder it has one of the
    names in WEIGHTS, or is the only file of weights; such a file is read with the config next to it. Without a config,
    what no shape tells (activation, heads, mean and std of images) is as in OpenAI's files. `remark` says so, and which
    tensors of the file are no part of CLIP. Raises CLIPError."""
    sha256, file = MODELS.get(str(name_or_path), (None, None))
    path = clip.CACHE / file if file else find(name_or_path)
    try:
        if file:
            hub = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")  # a mirror, or itself
            with first_on_machine():
                fetch(path, [url.format(sha256=sha256, file=file, hub=hub) for url in ADDRESSES], sha256)
        state, beside = openai_names(read_tensors(path, sha256))
        known = path.resolve() == HERE / "toy" / "clip.pt" or (sha256 or file_sha256(path)) in dict(MODELS.values())
        config = None if known else config_beside(path)
        check_tensors(state, path)
        model = build(state, read_config(config) if config else {})
    except ArchiveError as error:
        raise CLIPError(str(error)) from None
    except CLIPError as error:
        raise CLIPError(f"{path}: {error}") from None
    except Exception as error:  # a foreign file may raise anything
        reason = f"{type(error).__name__}: {first_line(error)}"  # KeyError: 'visual.proj'
        raise CLIPError(f"{path}: not the weights of a whole CLIP with OpenAI's ViT ({reason})") from None
    remarks = []
    if beside:
        remarks += [f"{path}: {len(beside)} tensors are left out, as no part of CLIP, the first is {beside[0][:60]!r}"]
    if not known and not config:
        remarks += [f"{path} is not OpenAI's and has no config: assuming QuickGELU and heads of {HEAD_WIDTH}. "
                    "Wrong for a CLIP with plain GELU (most of LAION's): put it into a folder, with its config"]
    model.remark = "; ".join(remarks) or None
    return model.eval().requires_grad_(False)


def find(name):
    """File or folder -> the file with the weights."""
    path = Path(name)
    if not os.path.exists(path) and os.path.isfile(HERE / path):  # toy/clip.pt, wherever the command is run
        path = HERE / path
    if os.path.isdir(path):
        usual, alone = [path / file for file in WEIGHTS if (path / file).is_file()], weights_in(path)
        if not usual and len(alone) != 1:
            raise CLIPError(f"{path}: a folder without {', '.join(WEIGHTS)}: give the file itself. Several files of "
                            'one CLIP: CLIPModel.from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size="50GB")')
        path = (usual or alone)[0]
    if not os.path.isfile(path):
        raise CLIPError(f"no CLIP file {str(path)[:200]}: give a file, a folder or one of {', '.join(MODELS)}")
    return path


def weights_in(folder):
    return [path for path in folder.iterdir() if path.suffix in SUFFIXES and path.is_file()]


def config_beside(path):
    """The config of weights under one of the names in WEIGHTS, or alone in their folder; their own library's first."""
    names = sorted(CONFIGS, key=lambda name: name.startswith("open_clip") != path.name.startswith("open_clip"))
    files = [path.with_name(name) for name in names if path.with_name(name).is_file()]
    return files[0] if files and (path.name in WEIGHTS or weights_in(path.parent) == [path]) else None


def build(state, config):
    """State dict in OpenAI's names -> CLIP of the sizes that the tensors' shapes say, with these weights."""
    conv, table = state["visual.conv1.weight"], state["visual.positional_embedding"]
    patch, blocks = conv.shape[-1], [key for key in state if key.endswith(".attn.in_proj_weight")]
    shapes = dict(
        embed_dim=state["text_projection"].shape[1],
        image_resolution=patch * round((len(table) - 1) ** 0.5),
        vision_layers=sum(key.startswith("visual.") for key in blocks),
        vision_width=len(conv),
        vision_patch_size=patch,
        vision_hidden=len(state["visual.transformer.resblocks.0.mlp.c_fc.weight"]),
        context_length=len(state["positional_embedding"]),
        vocab_size=VOCABULARY,
        transformer_width=len(state["ln_final.weight"]),
        transformer_layers=sum(key.startswith("transformer.") for key in blocks),
        transformer_hidden=len(state["transformer.resblocks.0.mlp.c_fc.weight"]))
    for key, size in shapes.items():
        if config.get(key, size) != size:
            raise CLIPError(f"its config is another model's: {key} is {config[key]} there, {size} in the file")
    with torch.device("meta"):  # no memory is taken before names and shapes are known to fit
        model = CLIP(**shapes | config)
    if wrong := misfit(state, model.state_dict()):
        raise CLIPError(f"not a whole CLIP, or another model: {wrong}")
    if shapes["vision_width"] > 1024 and not config:  # ViT-H, g and bigG have heads of other widths than 64
        raise CLIPError(f"an image tower of width {shapes['vision_width']}, OpenAI's widest is 1024: its number of "
                        f"heads is not known. Put it into a folder with its {' or '.join(CONFIGS)}")
    if not 1 <= (scale := state["logit_scale"].item()) <= 5.5:
        raise CLIPError(f"its logit_scale is {scale:.4g}, expected the logarithm of 1/τ, 1 to 5.5 (OpenAI's: 4.605). "
                        "If it is 1/τ or τ itself, save the logarithm of 1/τ in its place")
    model.load_state_dict({key: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                           for key, tensor in state.items()}, assign=True)
    return model


def fingerprint(model):
    """16 hex digits that identify a CLIP, whatever its file: a hash of all parameters and of what no shape tells."""
    towers = model.visual.transformer, model.transformer
    beside = [tower.resblocks[0].attn.heads for tower in towers]
    beside += [model.visual.config[key] for key in ("activation", "mean", "std")]
    content = hashlib.sha256(repr(beside).encode())
    for name, p in sorted(model.named_parameters()):
        content.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return content.hexdigest()[:16]
