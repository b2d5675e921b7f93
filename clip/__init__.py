"""CLIP (Radford et al., arXiv 2103.00020), written for this project. Its weights are fp32.

    model = clip.load("ViT-B/16")  # a name in clip.MODELS, a file, or a folder as save_pretrained leaves it
    c = model.encode_image(images)                              # (B, 3, H, W), RGB in [0, 1] -> (B, D)
    t = model.encode_text(clip.tokenize(["a photo of a cat"]))  # (P, 77) -> (P, D)
    print(model.remark)                                         # None, or what the user should know of the file

model: the two towers. tokenizer: text to ids. loading: names, downloads, architecture. names: others' parameter
names and config files. (What reads a file of tensors is support/archive.py.)
"""
from pathlib import Path

from clip.loading import MODELS, file_sha256, fingerprint, load
from clip.model import CLIP, CLIPError, VisionTransformer, resize_positions
from clip.tokenizer import tokenize

__all__ = ["CACHE", "CLIP", "CLIPError", "MODELS", "VisionTransformer", "file_sha256", "fingerprint", "load",
           "resize_positions", "tokenize"]

CACHE = Path.home() / ".cache" / "clip"  # where downloads go, the folder of OpenAI's own package; may be set to another
