import contextlib
import io

import pytest
import torch

import clip
from support import command as guard

torch.set_num_threads(1)  # as the subprocesses that tests compare with: rounding depends on it

TINY = dict(embed_dim=128, image_resolution=64, vision_layers=4, vision_width=96, vision_patch_size=8,
            context_length=77, vocab_size=49408, transformer_width=64, transformer_layers=2)


def run_inside(module, *argv):
    """A command in this process, as fast as can be -> exit status, what it printed, its last words."""
    argv, out = [str(a) for a in argv], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            guard.run_command(module.main, lambda: module.parse(argv))
        except SystemExit as end:
            return 1, out.getvalue(), str(end.code)
    return 0, out.getvalue(), ""


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Text embeddings and downloads of tests stay out of the user's cache."""
    monkeypatch.setattr(clip, "CACHE", tmp_path_factory.getbasetemp() / "cache")


@pytest.fixture(scope="session")
def tiny_clip_file(tmp_path_factory):
    """A CLIP of random weights in OpenAI's state-dict format."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("clip") / "tiny.pt"
    torch.save({k: v.half() for k, v in clip.CLIP(**TINY).state_dict().items()}, path)
    return path


@pytest.fixture
def tiny_clip(tiny_clip_file):
    return clip.load(tiny_clip_file)
