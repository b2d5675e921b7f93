"""clip.load: a name, a file or a folder -> CLIP. Sizes are read off the tensors' shapes, the rest off a config file."""
import hashlib
import socket
from pathlib import Path

import torch

import clip  # for clip.CACHE, which may be set to another folder
from clip.formats import read_tensors, why
from clip.model import CLIP, HEAD_WIDTH, CLIPError
from clip.names import openai_names, read_config
from clip.tokenizer import VOCABULARY
from support.archive import ArchiveError, check_tensors, misfit
from support.processes import first_on_machine

ADDRESSES = ("https://openaipublic.azureedge.net/clip/models/{sha256}/{file}",  # 404 since October 2025
             "https://huggingface.co/jinaai/clip-models/resolve/main/{file}")  # the same files, byte by byte
MODELS = {  # name: (sha256 of the file, file name)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin", "model.safetensors", "pytorch_model.bin")
CONFIGS = ("open_clip_config.json", "config.json")
WIDEST = 1024  # ViT-L; wider image towers (ViT-H, g, bigG) have heads of other widths than 64
SILENCE = 60  # seconds without a byte after which an address counts as dead
HERE = Path(__file__).parent.parent


def load(name_or_path):
    """A name in MODELS (downloaded once into clip.CACHE), a file or a folder -> CLIP, fp32, frozen, on the CPU.

    A file holds one CLIP, in any format of formats.py and any names of names.py. In a folder it has one of the names in
    WEIGHTS, and such a file is read with the config next to it. Without a config, what no shape tells
    (activation, heads, mean and std of images) is as in OpenAI's files, and `remark` says so. Raises CLIPError."""
    if str(name_or_path) in MODELS:
        with first_on_machine():
            path = download(str(name_or_path))
    else:
        path = find(name_or_path)
    config = read_config(file) if (file := config_beside(path)) else {}
    try:
        state = openai_names(read_tensors(path))
        check_tensors(state, path)
        model = build(state, config)
    except ArchiveError as error:
        raise CLIPError(str(error)) from None
    except Exception as error:  # a damaged or foreign file may raise anything
        raise CLIPError(f"{path}: {why(error, path)}") from None
    known = str(name_or_path) in MODELS or config or path.resolve() == (HERE / "toy" / "clip.pt").resolve()
    if not known and file_sha256(path) not in [sha256 for sha256, _ in MODELS.values()]:
        model.remark = (f"{path} is not one of OpenAI's files and has no config: assuming QuickGELU and heads of "
                        f"{HEAD_WIDTH} as in theirs. This is wrong for a CLIP with plain GELU (most of LAION's): give "
                        "the folder with its config")
    return model.eval().requires_grad_(False)


def find(path):
    """File or folder -> the file with the weights."""
    path = Path(path)
    if not path.exists() and (HERE / path).is_file():  # toy/clip.pt, wherever the command is run
        path = HERE / path
    if path.is_dir():
        names = [name for name in WEIGHTS if (path / name).is_file()]
        if not names and any(path.glob("*.index.json")):
            raise CLIPError(f"{path}: weights in several files: join them with transformers' "
                            'CLIPModel.from_pretrained(FOLDER).save_pretrained(NEW, max_shard_size="50GB")')
        if not names:
            raise CLIPError(f"{path}: a folder without {', '.join(WEIGHTS)}: give the file itself")
        path /= names[0]
    if not path.is_file():
        raise CLIPError(f"no CLIP file {path}: give a file, a folder or one of {', '.join(MODELS)}")
    return path


def config_beside(path):
    """The config of weights under one of the names in WEIGHTS, their own library's first; None without one."""
    names = sorted(CONFIGS, key=lambda name: name.startswith("open_clip") != path.name.startswith("open_clip"))
    files = [path.with_name(name) for name in names if path.name in WEIGHTS and path.with_name(name).is_file()]
    return files[0] if files else None


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
        vocab_size=len(state["token_embedding.weight"]),
        transformer_width=len(state["ln_final.weight"]),
        transformer_layers=sum(key.startswith("transformer.") for key in blocks),
        transformer_hidden=len(state["transformer.resblocks.0.mlp.c_fc.weight"]))
    for key in shapes.keys() & config.keys():
        if shapes[key] != config[key]:
            raise CLIPError(f"its config is another model's: {key} is {config[key]} there, {shapes[key]} in the file")
    with torch.device("meta"):  # no memory is taken before names and shapes are known to fit
        model = CLIP(**shapes | config)
    if wrong := misfit(state, model.state_dict()):
        raise CLIPError(f"not a whole CLIP, or another model: {wrong}")
    if shapes["vocab_size"] != VOCABULARY:
        raise CLIPError(f"has {shapes['vocab_size']} tokens, CLIP's tokenizer has {VOCABULARY}: it needs another one")
    if shapes["vision_width"] > WIDEST and not config:
        raise CLIPError(f"an image tower of width {shapes['vision_width']}, OpenAI's widest is {WIDEST}: its number of "
                        f"heads is not known. Put its {' or '.join(CONFIGS)} beside it, and name it one of "
                        f"{', '.join(WEIGHTS)}")
    model.load_state_dict({key: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
                           for key, tensor in state.items()}, assign=True)
    return model


def download(name):
    """Name in MODELS -> its file in clip.CACHE, fetched from the first address that has the right bytes."""
    sha256, file = MODELS[name]
    path, failures = clip.CACHE / file, []
    for address in () if path.exists() else ADDRESSES:
        url, timeout = address.format(sha256=sha256, file=file), socket.getdefaulttimeout()
        print(f"downloading {url}\n         to {path}", flush=True)
        try:  # writes beside the target, checks the hash, renames: an interrupted download leaves nothing
            socket.setdefaulttimeout(SILENCE)
            clip.CACHE.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
            break
        except Exception as error:  # no network, 404, a dead connection, other bytes, a full disk
            failures.append(f"{url} said: {error}")
            print(f"failed: {error}", flush=True)
        finally:
            socket.setdefaulttimeout(timeout)
    if not path.exists():
        raise CLIPError(f"could not download {name}: {'; '.join(failures)}. Fetch {file} (sha256 {sha256}) "
                        f"elsewhere and put it at {path}")
    if file_sha256(path) != sha256:
        raise CLIPError(f"{path} is not OpenAI's {name} (its sha256 differs): delete it, then it is fetched again")
    return path


def fingerprint(model):
    """16 hex digits that identify a CLIP, whatever its file: a hash of all parameters and of what no shape tells."""
    towers = model.visual.transformer, model.transformer
    heads = [tower.resblocks[0].attn.heads for tower in towers]
    content = hashlib.sha256(repr([*heads, *(model.visual.config[k] for k in ("activation", "mean", "std"))]).encode())
    for name, p in sorted(model.named_parameters()):
        content.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
