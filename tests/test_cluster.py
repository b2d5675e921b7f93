"""What happens on shared machines, by the real commands: kills, signals, full disks, many processes, a long run."""
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import run_inside
from test_support import FLAGS, ROOT, load, own, same  # noqa: F401

import train
from support import checkpoint

pytestmark = pytest.mark.slow
STEPS = 20
SOAK_SECONDS = int(os.environ.get("SOAK_SECONDS", 120))
SCRIPT = """
import os, sys
sys.path.insert(0, {root!r})
from PIL import Image
import train
from support import command
train.LOG_EVERY = 1
rank, opened, really = os.environ.get("RANK", "0"), [], Image.open
open(os.path.join({pids!r}, rank), "w").write(str(os.getpid()))
def fail(path, *more, **how):
    opened.append(path)
    if len(opened) > 60:
        raise OSError("made up")
    return really(path, *more, **how)
if os.environ.get("FAIL_RANK") == rank:
    Image.open = fail
command.run_command(train.main, train.parse)
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """train.py that logs each step and leaves its processes' ids; FAIL_RANK's images turn bad after a while."""
    folder = tmp_path_factory.mktemp("script")
    (folder / "logs_all.py").write_text(SCRIPT.format(root=str(ROOT), pids=str(folder)))
    return folder / "logs_all.py"


def start(script, *args, ranks=1, launcher=(), **more):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", **more.pop("env", {})}
    front = [sys.executable]
    if ranks > 1 or launcher:
        front += ["-m", "torch.distributed.run", *(launcher or ["--standalone"]), f"--nproc-per-node={ranks}"]
    return subprocess.Popen([*map(str, front), str(script), *map(str, args)], text=True, env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True, **more)


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


def log(out):
    """The log's lines, without the time they took."""
    lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def parts(out):
    steps = [line for line in log(out) if "loss" in line]  # the last line has the scores
    return torch.tensor([[line[key] for key in ("loss", "loss_seg", "loss_sgd", "loss_sam")] for line in steps])


@pytest.fixture(scope="module")
def base(own, tiny_clip_file):  # noqa: F811
    return ["--dataset", own, "--clip", tiny_clip_file, *FLAGS, "--steps", STEPS, "--save-every", 1]


@pytest.fixture(scope="module")
def whole(script, base, tmp_path_factory):
    """The uninterrupted run: folder, seconds of its loop."""
    out = tmp_path_factory.mktemp("whole") / "out"
    process = start(script, *base, "--out-dir", out)
    wait_for(process, 1)
    begin = time.time()
    wait_for(process, STEPS - 1)
    seconds = time.time() - begin
    finish(process)
    return out, seconds


def go_on(base, out, whole, *again):
    """Runs the command to its end -> what it printed; the run must then equal the uninterrupted one."""
    status, text, words = run_inside(train, *base, "--out-dir", out, *again)
    assert status == 0, text + words
    assert same(load(out / "last.pt"), load(whole / "last.pt")) and log(out) == log(whole)
    assert not list(out.glob(".*"))
    return text


@pytest.fixture(autouse=True)
def log_each_step(monkeypatch):
    monkeypatch.setattr(train, "LOG_EVERY", 1)


def test_killed_at_random_moments(script, base, whole, tmp_path):
    """kill -9, twenty times, a save at every step; then --resume: tensors, optimiser, bank and log as if never."""
    rng, resumed, during = random.Random(0), 0, 0
    for i in range(20):
        out = tmp_path / str(i)
        process = start(script, *base, "--out-dir", out)
        wait_for(process, 1)
        time.sleep(rng.uniform(0, whole[1]))
        process.kill()
        process.communicate()
        during += any(out.glob(".partial.*.last.pt"))
        again = ["--resume"] if (out / "last.pt").exists() else []
        if again:
            checkpoint.read_checkpoint(out / "last.pt")
            resumed += 1
        go_on(base, out, whole[0], *again)
    assert resumed >= 15 and during >= 1, (resumed, during)


@pytest.mark.parametrize("how", ["tmpfs", "quota"])
def test_full_disk(how, script, base, whole, tmp_path):
    size = (whole[0] / "last.pt").stat().st_size
    out, free, limit, more = tmp_path / "out", tmp_path / "free", None, []
    out.mkdir()
    free.mkdir()
    mounted = how == "tmpfs" and not subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={int(2.5 * size)}", "tmpfs", out], capture_output=True).returncode
    if how == "tmpfs" and not mounted:
        pytest.skip("needs the right to mount")
    try:
        if how == "quota":  # a first save, then no file larger than half a checkpoint
            process = start(script, *base, "--out-dir", out)
            wait_for(process, 4)
            process.send_signal(signal.SIGTERM)
            finish(process)
            limit, more = (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2,) * 2)), ["--resume"]
        _, err = finish(start(script, *base, "--out-dir", out, *more, preexec_fn=limit), ok=False)
        assert re.fullmatch(r"error: step \d+ could not be saved in [^\n]*is the disk full\?[^\n]*\n", err), err
        assert 0 < checkpoint.read_checkpoint(out / "last.pt")["step"] < STEPS and not list(out.glob(".*"))
        for name in ("last.pt", "log.jsonl"):
            (free / name).write_bytes((out / name).read_bytes())
    finally:
        if mounted:
            subprocess.run(["umount", "-l", out], check=True)
    go_on(base, free, whole[0], "--resume")


# ---------------------------------------------------------------- several processes


def test_nothing_depends_on_the_number_of_processes(script, base, whole, tmp_path):
    """Losses of training, and the scores of one checkpoint."""
    for n in (2, 3):
        finish(start(script, *base, "--out-dir", tmp_path / str(n), ranks=n))
        assert parts(tmp_path / str(n)).shape == (STEPS, 4)
        assert (parts(tmp_path / str(n)) - parts(whole[0])).abs().max() < 1e-5
    for n in (1, 2, 3):
        finish(start(ROOT / "evaluate.py", "--checkpoint", whole[0] / "last.pt", "--out-dir", tmp_path / f"test{n}",
                     "--device", "cpu", "--precision", "fp32", ranks=n))
        scores = json.loads((tmp_path / f"test{n}" / "metrics.json").read_text())
        assert scores["gamma_0"] == json.loads((whole[0] / "metrics.json").read_text())["gamma_0"]


def test_a_batch_that_does_not_divide(script, base, tmp_path):
    _, err = finish(start(script, *base, "--batch-size", 5, "--out-dir", tmp_path / "out", ranks=2), ok=False)
    assert re.findall("^error: .*", err, re.M) == ["error: --batch-size 5 cannot be divided among 2 processes: use 4"]


@pytest.mark.parametrize("whom", ["one", "all"])
def test_a_signal_to_one_process_or_to_all_saves_soon(whom, script, base, whole, tmp_path):
    """`all`: launcher, processes and their loaders at once, as a scheduler does before it takes the machine away."""
    out = tmp_path / "out"
    process = start(script, *base, "--save-every", 500, "--workers", 2, "--out-dir", out, ranks=2)
    wait_for(process, 4)
    if whom == "one":
        os.kill(int((script.parent / "1").read_text()), signal.SIGTERM)
    else:
        os.killpg(process.pid, signal.SIGTERM)
    text, err = finish(process, ok=whom == "one")  # the launcher itself reports a signal as such
    assert "stopped after step 10" in text and "error:" not in err, text + err
    assert load(out / "last.pt")["step"] == 11
    status, text, words = run_inside(train, *base, "--out-dir", out, "--resume")
    assert status == 0 and "allowed: 2 processes before, 1 now" in text, words
    assert (parts(out) - parts(whole[0])).abs().max() < 1e-5


@pytest.mark.parametrize("how", ["killed", "bad image"])
def test_one_process_that_ends_ends_all_within_a_minute(how, script, base, tmp_path):
    env = {"FAIL_RANK": "1"} if how == "bad image" else {}
    process = start(script, *base, "--steps", 5000, "--save-every", 5000, "--out-dir", tmp_path / "out", ranks=3,
                    env=env)
    wait_for(process, 1)
    if how == "killed":
        os.kill(int((script.parent / "1").read_text()), signal.SIGKILL)
    begin = time.time()
    _, err = finish(process, ok=False, seconds=60)
    words = re.findall("^error: .*", err, re.M)
    if how == "killed":
        assert not words and "SIGKILL" in err, err  # the launcher's own report
    else:
        assert len(words) == 1 and re.search(r"n\d\.(jpg|png)", words[0]) and "made up" in words[0], err
    assert time.time() - begin < 60
    for rank in "012":
        assert not Path(f"/proc/{(script.parent / rank).read_text()}").exists()


def test_two_launchers_without_a_shared_folder(script, base, whole, tmp_path):
    """torchrun --nnodes 2 as on two machines, over loopback; only the first writes, and only it needs the run."""
    def launch(*more):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        launcher = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=7"]
        return [start(script, *base, *more, "--out-dir", "out", launcher=launcher, cwd=tmp_path / name)
                for name in ("first", "second")]

    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    nodes = launch()
    wait_for(nodes[0], 4)
    os.kill(int((script.parent / "1").read_text()), signal.SIGTERM)  # on the second
    texts = [finish(node)[0] for node in nodes]
    assert "stopped after step" in texts[0] and not texts[1]
    texts = [finish(node)[0] for node in launch("--resume")]
    assert "hIoU" in texts[0] and not texts[1] and not list((tmp_path / "second").iterdir())
    assert (parts(tmp_path / "first/out") - parts(whole[0])).abs().max() < 1e-5


# ---------------------------------------------------------------- a long run


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")
def test_long_training_keeps_memory_pace_and_files(tmp_path):
    """Two minutes; SOAK_SECONDS=3600 makes it an hour."""
    out, seen, files = tmp_path / "run", [], None
    process = subprocess.Popen([sys.executable, ROOT / "train.py", "--steps", "1000000", "--workers", "0", "--device",
                                "cpu", "--save-every", "40", "--out-dir", out], cwd=ROOT, stdout=subprocess.DEVNULL,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})

    def sizes():
        return {path.name: path.stat().st_size for path in out.iterdir() if not path.name.startswith(".")}

    end = time.time() + SOAK_SECONDS
    while time.time() < end and process.poll() is None:
        lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
        if len(lines) > len(seen):
            fields = Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1].split()
            cpu = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
            seen.append((json.loads(lines[-1])["step"], cpu, int(fields[21]) * os.sysconf("SC_PAGE_SIZE") / 1e6))
        if files is None and (out / "former.pt").exists():
            files = sizes()
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 0
    pace = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in zip(seen, seen[1:])]  # CPU seconds a step
    first, last, memory = median(pace[1:11]), median(pace[-10:]), [mb for _, _, mb in seen[10:]]
    print(f"\n{seen[-1][0]} steps in {SOAK_SECONDS} s: CPU {first:.4f} s a step at the start, {last:.4f} at the end; "
          f"memory {memory[0]:.0f} MB after {seen[10][0]} steps, {min(memory):.0f} to {max(memory):.0f} since")
    assert len(pace) > 20 and last < 1.05 * first and max(memory) < 1.02 * memory[0]
    now = sizes()
    assert now.keys() == files.keys()  # since the second save
    assert {name for name in files if now[name] > files[name] + 1000} <= {"log.jsonl", "curves.png"}
