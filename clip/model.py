"""CLIP (Radford et al., arXiv 2103.00020): tokenizer, both towers and the loader, in one file.

Written for this project; parameter names are OpenAI's, so official files load strictly.
Images are RGB in [0, 1]; `encode_image` normalises them itself. Everything runs in fp32.

    model = clip.load("ViT-B/16")                           # or a path
    c = model.encode_image(images)                          # (B, 3, H, W) -> (B, D)
    t = model.encode_text(clip.tokenize(["a photo of a cat"]))  # (P, 77)  -> (P, D)

Symbols: B images, N patches, W tower width, D joint width, L text length.
"""
import gzip
import hashlib
import html
from collections import OrderedDict
from functools import lru_cache
from pathlib import Path

import ftfy
import regex
import torch
import torch.nn as nn
import torch.nn.functional as F

from support.archive import ArchiveError, check_tensors, misfit, read_archive

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # CLIP's own statistics, RGB in [0, 1]
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # every OpenAI ViT and text tower: heads = width / 64
WIDEST = 1024  # ViT-L; wider towers of others (ViT-H, g, G) have other heads

_URL = "https://openaipublic.azureedge.net/clip/models/{sha256}/{file}"
MODELS = {  # name: (sha256 of the file, file name)
    "ViT-B/32": ("40d365715913c9da98579312b702a82c18be219cc2a73407c4526f58eba950af", "ViT-B-32.pt"),
    "ViT-B/16": ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", "ViT-B-16.pt"),
    "ViT-L/14": ("b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836", "ViT-L-14.pt"),
    "ViT-L/14@336px": ("3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02", "ViT-L-14-336px.pt"),
}
CACHE = Path.home() / ".cache" / "clip"  # the folder OpenAI's own package uses
HERE = Path(__file__).parent.parent
MERGES = Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz"
MERGES_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"


class CLIPError(ValueError):
    """A CLIP file, name or text that cannot be used; the message says what to do."""


# ---------------------------------------------------------------- tokenizer


class Tokenizer:
    """Byte-level BPE with CLIP's 49,408 entries: 256 bytes, the same 256 ending a word, merges, two marks."""

    def __init__(self):
        packed = MERGES.read_bytes()
        if hashlib.sha256(packed).hexdigest() != MERGES_SHA256:
            raise CLIPError(f"{MERGES} is damaged (sha256 differs): restore it from the repository")
        lines = gzip.decompress(packed).decode().split("\n")
        merges = [tuple(line.split()) for line in lines[1:49152 - 256 - 2 + 1]]

        # every byte gets a printable character, so that merges can be written as text
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        hidden = [b for b in range(256) if b not in printable]
        self.byte_char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(hidden)}
        symbols = list(self.byte_char.values())
        symbols += [s + "</w>" for s in symbols] + ["".join(pair) for pair in merges]
        symbols += ["<|startoftext|>", "<|endoftext|>"]
        self.id = {s: i for i, s in enumerate(symbols)}
        self.rank = {pair: i for i, pair in enumerate(merges)}
        self.split = regex.compile(
            r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
            regex.IGNORECASE)
        self.encode_word = lru_cache(65536)(self._encode_word)

    def _encode_word(self, word):
        if word in ("<|startoftext|>", "<|endoftext|>"):
            return [self.id[word]]
        parts = [self.byte_char[b] for b in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:  # merge the pair that was learned first, everywhere, until none is known
            best = min(zip(parts, parts[1:]), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged, i = [], 0
            while i < len(parts):
                pair = tuple(parts[i:i + 2])
                merged.append("".join(pair) if pair == best else parts[i])
                i += 2 if pair == best else 1
            parts = merged
        return [self.id[p] for p in parts]

    def encode(self, text):
        """str -> list of token ids, without the start and end marks."""
        text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
        text = regex.sub(r"\s+", " ", text).strip().lower()
        return [i for word in self.split.findall(text) for i in self.encode_word(word)]


tokenizer = lru_cache(1)(Tokenizer)


def tokenize(texts, context_length=77):
    """str or list of P strs -> int64 (P, context_length): start, tokens, end, zeros. Raises CLIPError where a text does
    not fit."""
    texts = [texts] if isinstance(texts, str) else list(texts)
    start, end = tokenizer().id["<|startoftext|>"], tokenizer().id["<|endoftext|>"]
    tokens = torch.zeros(len(texts), context_length, dtype=torch.long)
    for row, text in zip(tokens, texts):
        ids = [start, *tokenizer().encode(text), end]
        if len(ids) > context_length:
            raise CLIPError(f"text has {len(ids)} tokens, at most {context_length} fit: shorten it: {text[:60]!r}")
        row[:len(ids)] = torch.tensor(ids)
    return tokens


# ---------------------------------------------------------------- towers


class Attention(nn.Module):
    """Multi-head self-attention. `kind` is how the attention weights are made:

    qk    softmax(q kᵀ / √d) v, as CLIP was trained
    vv    softmax(v vᵀ / √d) v: like attends to like (CLIP Surgery, arXiv 2304.05653)
    self  v: each token attends to itself alone (MaskCLIP, arXiv 2112.01071)
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, kind="qk", causal=False, first=None):
        """(B, N, W) -> (B, N, W), or of the first `first` tokens alone: (B, first, W)"""
        B, N, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3W)
        q, k, v = qkv.view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        q, own = q[:, :, :first], v[:, :, :first]
        if kind == "qk":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        elif kind == "vv":
            y = F.scaled_dot_product_attention(own, v, v)
        elif kind == "self":
            y = own
        else:
            raise CLIPError(f"attention kind {kind!r} is unknown: choose qk, vv or self")
        return self.out_proj(y.transpose(1, 2).flatten(2))


class QuickGELU(nn.Module):
    def forward(self, x):
        return F.silu(1.702 * x) / 1.702  # x · sigmoid(1.702 x), one kernel each way


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, 4 * width), gelu=QuickGELU(), c_proj=nn.Linear(4 * width, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, kind="qk", causal=False, first=None):
        x = x[:, :first] + self.attn(self.ln_1(x), kind, causal, first)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, width, layers, heads):
        super().__init__()
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, heads) for _ in range(layers))

    def forward(self, x, causal=False, first=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, causal=causal)
        return last(x, causal=causal, first=first)


def resize_positions(table, h, w):
    """Positional table with the CLS row first, (1 + grid², W) -> the patches' rows at an h×w grid, (h·w, W).

    Antialiased bicubic interpolation, as open_clip does."""
    grid = round((len(table) - 1) ** 0.5)
    table = table[1:]
    if (h, w) == (grid, grid):
        return table
    table = table.T.reshape(1, -1, grid, grid)
    return F.interpolate(table, (h, w), mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T


class VisionTransformer(nn.Module):
    """Image tower. What a head borrows: `transformer.resblocks`, `ln_post`, `proj`,
    `positional_embedding` (with `resize_positions`), `input_size`."""

    def __init__(self, input_size, patch_size, width, layers, output_dim):
        super().__init__()
        self.input_size, self.patch_size = input_size, patch_size
        self.width, self.output_dim = width, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        patches = (input_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(patches + 1, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads=max(width // HEAD_WIDTH, 1))
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)
        self.register_buffer("mean", torch.tensor(IMAGE_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(IMAGE_STD).view(3, 1, 1), persistent=False)

    def forward(self, images, first=None):
        """(B, 3, H, W) in [0, 1] -> all tokens after ln_post and proj, (B, 1 + h·w, D), CLS before the patches; or of
        the first `first` tokens alone: the last block then computes no others."""
        x = self.conv1((images - self.mean) / self.std)  # (B, W, h, w)
        positions = resize_positions(self.positional_embedding, *x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (B, N, W)
        cls = self.class_embedding + self.positional_embedding[0]
        x = torch.cat([cls.expand(len(x), 1, -1), x + positions], dim=1)  # (B, 1+N, W)
        x = self.transformer(self.ln_pre(x), first=first)
        return self.ln_post(x) @ self.proj


class CLIP(nn.Module):
    """Both towers. The text tower's parameters sit at the top level, as in OpenAI's files."""

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_layers):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width, vision_layers, embed_dim)
        self.transformer = Transformer(transformer_width, transformer_layers,
                                       heads=max(transformer_width // HEAD_WIDTH, 1))
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, transformer_width) * 0.01)
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.randn(transformer_width, embed_dim) * transformer_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """RGB in [0, 1], (B, 3, H, W) at any H, W ≥ the patch size -> CLS embeddings (B, D), not normalised."""
        H, W, patch = *images.shape[-2:], self.visual.patch_size
        if min(H, W) < patch:
            raise CLIPError(f"image is {H}×{W} pixels, one patch needs {patch}×{patch}")
        return self.visual(images, first=1)[:, 0]

    def encode_text(self, tokens):
        """int (P, L) from `tokenize` -> (P, D), not normalised; read at the end mark, the largest id."""
        end = tokens.argmax(dim=-1)
        tokens = tokens[:, :int(end.max()) + 1]  # the mask is causal: what follows the end changes nothing
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (P, L, W)
        x = self.ln_final(self.transformer(x, causal=True))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection


# ---------------------------------------------------------------- loading


def load(name_or_path):
    """Name in MODELS (downloaded once into CACHE) or a file -> CLIP in fp32, eval mode, frozen, on the CPU.

    A file is OpenAI's TorchScript archive, a plain state dict, or a checkpoint with a state dict inside
    (under "state_dict" or "model"). The architecture is read off the shapes; keys must match exactly. What no shape
    tells, QuickGELU and heads of 64, is taken from OpenAI's (see `doubt`). No code inside the file is ever run.
    Raises CLIPError."""
    path = _download(name_or_path) if str(name_or_path) in MODELS else _find(name_or_path)
    state = _read_state_dict(path)
    model = _build(state, path)
    if wrong := misfit(state, model.state_dict()):
        raise CLIPError(f"{path} is not a whole CLIP, or another model: {wrong}")
    if model.visual.width > WIDEST:
        raise CLIPError(f"{path} has an image tower of width {model.visual.width}, OpenAI's widest is {WIDEST}: how "
                        "many heads it has is not known")
    model.load_state_dict(state)
    return model.float().eval().requires_grad_(False)


def doubt(name_or_path):
    """What a user should know of a file that is not OpenAI's (or the embedded default's), else None."""
    if str(name_or_path) in MODELS:
        return None
    path, known = _find(name_or_path), {sha256 for sha256, _ in MODELS.values()}
    if path.resolve() != (HERE / "toy" / "clip.pt").resolve() and file_sha256(path) not in known:
        return (f"{path} is none of OpenAI's files: taken to have QuickGELU and heads of {HEAD_WIDTH} as theirs. One "
                "trained with plain GELU (most of LAION's) is read wrongly")


def _find(path):
    path = Path(path)
    if not path.is_file() and (HERE / path).is_file():  # toy/clip.pt, wherever the command is run
        path = HERE / path
    if not path.is_file():
        raise CLIPError(f"no CLIP file {path}: give a file or one of {', '.join(MODELS)}")
    return path


def _download(name):
    sha256, file = MODELS[name]
    path, url = CACHE / file, _URL.format(sha256=sha256, file=file)
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        print(f"downloading {url}\n         to {path}", flush=True)
        try:  # writes beside the target, checks the hash, renames: an interrupted download leaves nothing
            torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256, progress=True)
        except (OSError, RuntimeError) as error:
            raise CLIPError(f"could not download {url} ({error}): fetch it elsewhere and put it at {path}") from None
    if file_sha256(path) != sha256:
        raise CLIPError(f"{path} is not OpenAI's {name} (its sha256 differs): delete it, it is fetched again")
    return path


def fingerprint(model, text_tower_only=False):
    """16 hex digits that tell one CLIP's weights from another's, in whatever file they lie; of every parameter."""
    content = hashlib.sha256()
    for name, p in sorted(model.named_parameters()):
        if not (text_tower_only and name.startswith("visual.")):
            content.update(name.encode() + p.detach().cpu().numpy().tobytes())
    return content.hexdigest()[:16]


def file_sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_state_dict(path):
    """File -> {name: tensor}, from any of the three formats."""
    try:
        state = read_archive(path)
        for key in ("state_dict", "model"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        if not isinstance(state, dict):
            raise ArchiveError(f"{path} holds no state dict (a mapping of names to tensors)")
        for extra in ("input_resolution", "context_length", "vocab_size"):  # plain numbers in OpenAI's archives
            state.pop(extra, None)
        check_tensors(state, path)
    except ArchiveError as error:
        raise CLIPError(str(error)) from None
    except Exception as error:  # a truncated zip, a foreign pickle, a picture: all the same to the user
        reason = str(error).strip().split("\n")[0][:120]
        raise CLIPError(f"{path} cannot be read as CLIP weights, it is truncated or another format "
                        f"({type(error).__name__}: {reason})") from None
    return {key.removeprefix("module."): tensor for key, tensor in state.items()}


def _build(state, path):
    """Reads the architecture off the shapes of OpenAI's tensors."""
    if "visual.layer1.0.conv1.weight" in state:
        raise CLIPError(f"{path} is a ResNet CLIP: its image tower has no blocks to borrow, use a ViT")
    try:
        conv, table = state["visual.conv1.weight"], state["visual.positional_embedding"]
        patch = conv.shape[-1]
        return CLIP(
            embed_dim=state["text_projection"].shape[1],
            image_resolution=patch * round((table.shape[0] - 1) ** 0.5),
            vision_layers=sum(k.startswith("visual.") and k.endswith(".attn.in_proj_weight") for k in state),
            vision_width=conv.shape[0],
            vision_patch_size=patch,
            context_length=state["positional_embedding"].shape[0],
            vocab_size=state["token_embedding.weight"].shape[0],
            transformer_width=state["ln_final.weight"].shape[0],
            transformer_layers=sum(k.startswith("transformer.") and k.endswith(".attn.in_proj_weight") for k in state))
    except KeyError as key:
        raise CLIPError(f"{path} lacks the tensor {key}: not a CLIP in OpenAI's names") from None
    except (ValueError, IndexError, RuntimeError, ZeroDivisionError) as error:
        raise CLIPError(f"{path}: its tensors' shapes make no CLIP ({str(error)[:100]})") from None
