"""CLIP, written for this project: `clip.load`, `clip.tokenize`, `clip.CLIP`."""
from clip.model import *  # noqa: F403
from clip.model import CACHE, HEAD_WIDTH, MODELS, _URL, CLIPError, doubt, file_sha256, fingerprint, load, tokenize  # noqa: F401
