"""What several test files share: a tiny CLIP, commands in this process and in processes of their own."""
import contextlib
import io
import multiprocessing
import os
import runpy
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import clip
from model import ChimeraSeg
from support.command import run_command

torch.set_num_threads(1)  # as in the processes that tests compare with: rounding depends on it

ROOT = Path(__file__).parent.parent
TINY = dict(embed_dim=128, image_resolution=64, vision_layers=4, vision_width=96, vision_patch_size=8,
            context_length=77, vocab_size=49408, transformer_width=64, transformer_layers=2)
SERVER = multiprocessing.get_context("forkserver")  # imports everything once; a command then starts at once
SERVER.set_forkserver_preload(["train", "predict"])


def run_inside(module, *argv):
    """A command in this process, as fast as can be -> exit status, what it printed, its last words."""
    argv, out = [str(a) for a in argv], io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            run_command(module.main, lambda: module.parse(argv))
        except SystemExit as end:
            return 1, out.getvalue(), str(end.code)
    return 0, out.getvalue(), ""


def enter(files, environment, function, args):
    """The first lines of a process of `start`: its output goes into files, its environment is torchrun's."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.update(environment)
    torch.set_num_threads(1)
    function(*args)


def script(path, *argv):
    sys.argv = [str(path), *map(str, argv)]
    runpy.run_path(str(path), run_name="__main__")


def start(folder, function, *args, ranks=1):
    """function(*args) in processes of their own, as torchrun starts them -> processes, files of their output."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    files = [Path(folder) / f"{name}-{time.time_ns()}" for name in ("stdout", "stderr")]
    processes = []
    for rank in range(ranks):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        processes.append(SERVER.Process(target=enter, args=(files, environment | own, function, args)))
        processes[-1].start()
    return processes, files


def finish(processes, files, ok=True):
    for process in processes:
        process.join(200)
        process.kill()
    out, err = (file.read_text() if file.exists() else "" for file in files)
    assert all((process.exitcode == 0) == ok for process in processes), out + err
    return SimpleNamespace(stdout=out, stderr=err)


def command(folder, name, *args, ranks=1, ok=True):
    """A command line as users type it; `folder` takes its output -> stdout, stderr."""
    return finish(*start(folder, script, ROOT / name, *args, ranks=ranks), ok)


def segmenter(logits, K, tau=1.0):
    """A ChimeraSeg whose logits are this function of the images."""
    model = ChimeraSeg(torch.nn.Identity(), torch.nn.Identity(), None, tau)
    model.t, model.logits = torch.zeros(K, 1), logits
    return model


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """Downloads of tests stay out of the user's cache."""
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
