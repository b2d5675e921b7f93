"""What happens on shared machines, by the real commands: kills, signals, many processes, a long run."""
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest
import pytest
import torch
from conftest import ROOT, run_inside
from test_support import flags, load, log, own, same  # noqa: F401
from trees import draw_tree

import clip
import train

pytestmark = pytest.mark.slow
STEPS = 20
SOAK_STEPS = int(os.environ.get("SOAK_STEPS", 500))
SCRIPT = """
import itertools, os, sys
sys.path.insert(0, {root!r})
from PIL import Image
import train
from support import command
train.LOG_EVERY = 1
rank, opened, really = os.environ.get("RANK", "0"), itertools.count(), Image.open
open(os.path.join({pids!r}, rank), "w").write(str(os.getpid()))
if os.environ.get("FAIL_RANK") == rank:
    Image.open = lambda path, **how: really(path if next(opened) < 200 else "/", **how)
command.run_command(train.main, train.parse)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """train.py that logs each step and leaves its processes' ids; FAIL_RANK's images turn bad after a while."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "logs_all.py").write_text(SCRIPT.format(root=str(ROOT), pids=str(folder)))
    return folder / "logs_all.py"


def start(script, *args, ranks=1, launcher=(), env=(), **more):
    front = [sys.executable]
    if ranks > 1 or launcher:
        front += ["-m", "torch.distributed.run", *(launcher or ["--standalone"]), f"--nproc-per-node={ranks}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | dict(env)
    return subprocess.Popen([*front, *map(str, (script, *args))], text=True, env=environment, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, start_new_session=True, **more)


def finish(process, ok=True, seconds=600):
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert (process.returncode == 0) == ok, out + err
    return out, err


def wait_for(process, steps):
    """Reads on until so many steps are logged."""
    for line in process.stdout:
        steps -= line.startswith("step ")
        if not steps:
            return
    raise AssertionError(process.stderr.read())


def parts(out):
    steps = [line for line in log(out) if "loss" in line]  # the last line has the scores
    return torch.tensor([[line[key] for key in ("loss", "seg", "sgd", "sam")] for line in steps])


@pytest.fixture(scope="module")
def base(flags):  # noqa: F811
    return [*flags, "--precision", "fp32", "--steps", STEPS, "--save-every", 1]


@pytest.fixture(scope="module")
def whole(script, base, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    finish(start(script, *base, "--out-dir", out))
    return out


@pytest.fixture(autouse=True)
def log_each_step(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)


def test_killed_at_random_moments(script, base, whole, tmp_path):
    """kill -9, twenty times, a save at every step; then --resume: tensors, optimiser, bank and log as if never."""
    rng, resumed, during = random.Random(0), 0, 0
    for i in range(20):
        out, steps = tmp_path / str(i), rng.randrange(1, STEPS)
        (process,), files = conftest.start(tmp_path, conftest.script, script, *base, "--out-dir", out)
        while not files[0].exists() or files[0].read_text().count("\nstep ") < steps:
            assert process.is_alive(), files[1].read_text()
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        process.join()
        during += any(out.glob(".partial.*.last.pt"))
        saved = (out / "last.pt").exists()
        resumed += saved
        status, text, words = run_inside(train, *base, "--out-dir", out, "--resume")  # also where nothing was saved
        assert status == 0, text + words
        assert same(load(out / "last.pt"), load(whole / "last.pt")) and log(out) == log(whole)
        assert not list(out.glob(".*"))
    assert resumed >= 15 and during >= 1, (resumed, during)


@pytest.fixture(scope="module")
def vit_b16(tmp_path_factory):
    """Random weights whose image tower has ViT-B/16's shape."""
    path = tmp_path_factory.mktemp("clip") / "vit-b-16.pt"
    state = clip.CLIP(512, 224, 12, 768, 16, 77, 49408, 64, 1).state_dict()
    torch.save({key: x.half() for key, x in state.items()}, path)
    return path


@pytest.mark.parametrize("name", ["voc", "coco-stuff"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_benchmarks_recipe_at_full_size_is_killed_and_resumed(name, precision, script, vit_b16, tmp_path):
    """ResNet-50 at crop 512 and CLIP's 14×14 patches on its 32×32 grid; ten steps of two images."""
    args = ["--dataset", name, "--data-root", draw_tree(name, tmp_path / name, val=1), "--clip", vit_b16, "--steps", 10,
            "--body-weights", "none", "--batch-size", 2, "--save-every", 1, "--workers", 0, "--device", "cpu",
            "--precision", precision, "--out-dir", tmp_path / "out", "--resume"]
    process = start(script, *args)
    wait_for(process, 4)
    process.kill()
    process.communicate()
    assert f"continues {tmp_path}/out at step " in finish(start(script, *args), seconds=3000)[0]
    assert load(tmp_path / "out/last.pt")["step"] == 10 and parts(tmp_path / "out").isfinite().all()


def test_a_signal_to_all_processes_saves_soon(script, base, whole, tmp_path):
    """Launcher, processes and their loaders at once, as a scheduler does before it takes the machine away."""
    process = start(script, *base, "--save-every", 500, "--workers", 2, "--out-dir", tmp_path, ranks=2)
    wait_for(process, 4)
    os.killpg(process.pid, signal.SIGTERM)
    text, err = finish(process, ok=False)  # the launcher itself reports a signal as such
    assert "stopped after step 10" in text and "error:" not in err, text + err
    assert load(tmp_path / "last.pt")["step"] == 11
    status, text, words = run_inside(train, *base, "--out-dir", tmp_path, "--resume")
    assert status == 0 and "resume  2 processes before, 1 now" in text, words
    assert (parts(tmp_path) - parts(whole)).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["killed", "bad image"])
def test_one_process_that_ends_ends_all_within_a_minute(how, script, base, tmp_path):
    env = {"FAIL_RANK": "1"} if how == "bad image" else {}
    process = start(script, *base, "--steps", 5000, "--save-every", 5000, "--out-dir", tmp_path, ranks=3, env=env)
    wait_for(process, 1)
    if how == "killed":
        os.kill(int((script.parent / "1").read_text()), signal.SIGKILL)
    _, err = finish(process, ok=False, seconds=60)
    words = re.findall("^error: .*", err, re.M)
    if how == "killed":
        assert "SIGKILL" in err, err  # the launcher's own report
    else:
        assert any(re.search(r"train_\d+\.(jpg|png) .*Is a directory", word) for word in words), err
    assert not any(Path(f"/proc/{(script.parent / rank).read_text()}").exists() for rank in "012")


def test_two_launchers_without_a_shared_folder(script, base, whole, tmp_path):
    """torchrun --nnodes 2 as on two machines, over loopback: a signal to one process stops both; only the first writes,
    and only it needs the run."""
    def launch(*more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=7"]
        return [start(script, *base, *more, "--out-dir", "out", launcher=launcher, cwd=folder) for folder in folders]

    folders = [tmp_path / "first", tmp_path / "second"]
    for folder in folders:
        folder.mkdir()
    nodes = launch()
    wait_for(nodes[0], 4)
    os.kill(int((script.parent / "1").read_text()), signal.SIGTERM)  # on the second
    texts = [finish(node)[0] for node in nodes]
    assert "stopped after step 10" in texts[0] and not texts[1]
    texts = [finish(node)[0] for node in launch("--resume")]
    assert "hIoU" in texts[0] and not texts[1] and not list(folders[1].iterdir())
    assert (parts(folders[0] / "out") - parts(whole)).abs().max() < 1e-5


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_memory_does_not_grow(script, base, tmp_path):
    process, memory = start(script, *base, "--steps", 10 ** 6, "--save-every", 40, "--out-dir", tmp_path), []
    for _ in range(SOAK_STEPS):
        wait_for(process, 1)
        memory.append(int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]))  # pages
    process.send_signal(signal.SIGTERM)
    finish(process)
    assert max(memory) < 1.02 * max(memory[:SOAK_STEPS // 5])
