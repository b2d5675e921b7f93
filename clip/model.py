"""CLIP's two towers. Parameter names are OpenAI's, so that official files load without renaming.

Symbols: B images, P texts, N tokens, W tower width, D joint width, L text length.
"""
from collections import OrderedDict

import torch
import torch.nn as nn
import torch.nn.functional as F

from support import UserError

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # OpenAI's statistics of images, RGB in [0, 1]
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)
HEAD_WIDTH = 64  # in every tower of OpenAI's: heads = width / 64


class CLIPError(UserError):
    """A CLIP file, name, image or text that cannot be used; the message says what to do."""


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise CLIPError(f"a width of {width} cannot be split among {heads} heads")
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.randn(3 * width, width) * width ** -0.5)
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x, causal=False, first=None):
        """(B, N, W) -> (B, N, W), or of the first `first` tokens alone: (B, first, W)"""
        B, N, W = x.shape
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias)  # (B, N, 3W)
        q, k, v = qkv.view(B, N, 3, self.heads, W // self.heads).permute(2, 0, 3, 1, 4)  # each (B, heads, N, d)
        y = F.scaled_dot_product_attention(q[:, :, :first], k, v, is_causal=causal)
        return self.out_proj(y.transpose(1, 2).flatten(2))

    def values(self, x):
        """Each token's own value in the place of attention: (B, N, W) -> (B, N, W)"""
        W = x.shape[-1]
        return self.out_proj(F.linear(x, self.in_proj_weight[2 * W:], self.in_proj_bias[2 * W:]))


class QuickGELU(nn.Module):
    """OpenAI's activation. Most of LAION's models have plain GELU."""

    def forward(self, x):
        return F.silu(1.702 * x) / 1.702  # x · sigmoid(1.702 x), one kernel each way


ACTIVATIONS = {"quick_gelu": QuickGELU, "gelu": nn.GELU}


class ResidualAttentionBlock(nn.Module):
    def __init__(self, width, heads, hidden, activation):
        super().__init__()
        self.attn = Attention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, hidden), gelu=ACTIVATIONS[activation](), c_proj=nn.Linear(hidden, width)))
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x, causal=False, first=None):
        x = x[:, :first] + self.attn(self.ln_1(x), causal, first)
        return x + self.mlp(self.ln_2(x))

    def values(self, x):
        """The block by the values path: no token looks at another, so each says what is at its own place (MaskCLIP,
        arXiv 2112.01071). (B, N, W) -> (B, N, W)"""
        x = x + self.attn.values(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """heads: by default width / 64. hidden: the MLP's width, by default 4 · width."""

    def __init__(self, width, layers, heads=None, hidden=None, activation="quick_gelu"):
        super().__init__()
        heads = heads or max(width // HEAD_WIDTH, 1)
        self.resblocks = nn.ModuleList(
            ResidualAttentionBlock(width, heads, hidden or 4 * width, activation) for _ in range(layers))

    def forward(self, x, causal=False, first=None):
        *blocks, last = self.resblocks
        for block in blocks:
            x = block(x, causal)
        return last(x, causal, first)


def resize_positions(table, h, w):
    """Positional table with the CLS row first, (1 + grid², W) -> the patches' rows at an h×w grid, (h·w, W).

    Antialiased bicubic interpolation, as open_clip does."""
    grid = round((len(table) - 1) ** 0.5)
    if (h, w) == (grid, grid):
        return table[1:]
    table = table[1:].T.reshape(1, -1, grid, grid)
    return F.interpolate(table, (h, w), mode="bicubic", antialias=True, align_corners=False)[0].flatten(1).T


class VisionTransformer(nn.Module):
    """Image tower. What a head borrows: `transformer.resblocks`, `ln_post`, `proj`.

    `config` is the constructor's arguments: VisionTransformer(**visual.config) is one of the same shape, untrained."""

    def __init__(self, input_size, patch_size, width, layers, output_dim, heads=None, hidden=None,
                 activation="quick_gelu", mean=IMAGE_MEAN, std=IMAGE_STD):
        super().__init__()
        self.config = dict(input_size=input_size, patch_size=patch_size, width=width, layers=layers, heads=heads,
                           output_dim=output_dim, hidden=hidden, activation=activation, mean=mean, std=std)
        self.input_size, self.patch_size = input_size, patch_size
        self.width, self.output_dim = width, output_dim
        self.conv1 = nn.Conv2d(3, width, patch_size, stride=patch_size, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width) * width ** -0.5)
        tokens = 1 + (input_size // patch_size) ** 2
        self.positional_embedding = nn.Parameter(torch.randn(tokens, width) * width ** -0.5)
        self.ln_pre = nn.LayerNorm(width)
        self.transformer = Transformer(width, layers, heads, hidden, activation)
        self.ln_post = nn.LayerNorm(width)
        self.proj = nn.Parameter(torch.randn(width, output_dim) * width ** -0.5)
        # on the CPU even where the loader makes a tower without storage: no file holds them
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, device="cpu").view(3, 1, 1), persistent=False)

    def embed(self, images):
        """(B, 3, H, W) in [0, 1] -> tokens of the first block (B, 1 + h·w, W), CLS before the patches."""
        x = self.conv1((images - self.mean) / self.std)  # (B, W, h, w)
        positions = resize_positions(self.positional_embedding, *x.shape[-2:])
        x = x.flatten(2).transpose(1, 2)  # (B, h·w, W)
        cls = self.class_embedding + self.positional_embedding[0]
        return self.ln_pre(torch.cat([cls.expand(len(x), 1, -1), x + positions], dim=1))

    def forward(self, images):
        """(B, 3, H, W) in [0, 1] -> all tokens after ln_post and proj, (B, 1 + h·w, D), CLS before the patches."""
        return self.ln_post(self.transformer(self.embed(images))) @ self.proj

    def split(self, last):
        """-> the blocks before the last `last` ones, and these. Raises CLIPError."""
        blocks, depth = self.transformer.resblocks, len(self.transformer.resblocks)
        if not 0 <= last <= depth:
            raise CLIPError(f"{last} frozen blocks asked for: this CLIP has 0 to {depth}")
        return blocks[:depth - last], blocks[depth - last:]

    def tokens_before(self, images, last):
        """(B, 3, H, W) in [0, 1] -> all tokens where the last `last` blocks begin, (B, 1 + h·w, W)."""
        x = self.embed(images)
        for block in self.split(last)[0]:
            x = block(x)
        return x

    def cls_and_patches(self, images):
        """(B, 3, H, W) in [0, 1] -> CLS embedding (B, D) and the patches' dense features (B, h·w, D) by the values path
        of the last block. One pass for both; not normalised."""
        x, last = self.tokens_before(images, 1), self.transformer.resblocks[-1]
        x = torch.cat([last(x, first=1), last.values(x[:, 1:])], dim=1)  # (B, 1 + h·w, W)
        x = self.ln_post(x) @ self.proj
        return x[:, 0], x[:, 1:]


class CLIP(nn.Module):
    """Both towers. The text tower's parameters sit at the top level, as in OpenAI's files."""

    remark = None  # a line that the user should see, set by clip.load

    def __init__(self, embed_dim, image_resolution, vision_layers, vision_width, vision_patch_size,
                 context_length, vocab_size, transformer_width, transformer_layers, activation="quick_gelu",
                 vision_heads=None, transformer_heads=None, vision_hidden=None, transformer_hidden=None,
                 mean=IMAGE_MEAN, std=IMAGE_STD):
        super().__init__()
        self.context_length = context_length
        self.visual = VisionTransformer(image_resolution, vision_patch_size, vision_width, vision_layers, embed_dim,
                                        vision_heads, vision_hidden, activation, mean, std)
        self.transformer = Transformer(transformer_width, transformer_layers, transformer_heads, transformer_hidden,
                                       activation)
        self.token_embedding = nn.Embedding(vocab_size, transformer_width)
        self.positional_embedding = nn.Parameter(torch.randn(context_length, transformer_width) * 0.01)
        self.ln_final = nn.LayerNorm(transformer_width)
        self.text_projection = nn.Parameter(torch.randn(transformer_width, embed_dim) * transformer_width ** -0.5)
        self.logit_scale = nn.Parameter(torch.tensor(0.07).reciprocal().log())
        nn.init.normal_(self.token_embedding.weight, std=0.02)

    def encode_image(self, images):
        """RGB in [0, 1], (B, 3, H, W) at any H, W ≥ the patch size -> CLS embeddings (B, D), not normalised."""
        return self.visual(images)[:, 0]

    def encode_text(self, tokens):
        """int (P, L) from `tokenize` -> (P, D), not normalised; read at the end mark, the largest id."""
        end = tokens.argmax(dim=-1)
        tokens = tokens[:, :int(end.max()) + 1]  # the mask is causal: what follows the end changes nothing
        x = self.token_embedding(tokens) + self.positional_embedding[:tokens.shape[1]]  # (P, L, W)
        x = self.ln_final(self.transformer(x, causal=True))
        return x[torch.arange(len(x), device=x.device), end] @ self.text_projection
