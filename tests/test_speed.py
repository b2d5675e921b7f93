"""benchmark.py: the counts of its table against published and hand-made ones, and the command itself."""
import argparse
import json
import subprocess
import sys
import time

import pytest
import torch

from experiments import benchmark
import clip
import data
from toy import world


@pytest.fixture(scope="module")
def counted():
    return benchmark.counts(clip.CLIP(**benchmark.VIT_B16).visual, torch.device("cpu"), ["resnet50"])


def test_zegclip_graph_costs_what_its_authors_publish(counted):
    assert counted[1]["ZegCLIP 20"] / 2 == pytest.approx(benchmark.ZEGCLIP_GMACS, rel=0.01)


def test_dense_clip_and_head_by_hand(counted):
    """Multiply-adds of ViT-B/16 at 32×32 patches, term by term."""
    N, W, D, C, K = 32 * 32, 768, 512, 256, 20

    def block(n):
        return n * W * 12 * W + 2 * n * n * W  # qkv, out, MLP's two; q·k and its product with v

    tower = N * 3 * 16 * 16 * W + 12 * block(N + 1) + (N + 1) * W * D
    bodies, peers = counted
    assert peers["DenseCLIP 20"] == pytest.approx(2 * (tower + N * D * K) / 1e9, rel=1e-6)
    assert bodies["resnet50"]["head"] == pytest.approx(2 * (N * C * W + block(N) + N * W * D) / 1e9, rel=1e-6)


def test_the_command_measures_and_writes(tmp_path):
    out = tmp_path / "cost.md"
    run = subprocess.run([sys.executable, "benchmark.py", "--parts", "train", "--bodies", "mobilenet-v2",
                          "--batch", "1", "--repeats", "1", "--device", "cpu", "--out", str(out)],
                         capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert out.read_text().count("| mobilenet-v2 |") == 1
    seconds = json.loads(out.with_suffix(".json").read_text())["train"]["seconds"]
    assert seconds["mobilenet-v2 csh"] > seconds["mobilenet-v2 linear"]  # the teacher alone costs more than this


def test_memory_is_what_a_call_takes_and_what_is_held():
    before = torch.zeros(10 ** 6)
    peak = benchmark.peak_memory(torch.device("cpu"), lambda: torch.ones(8 * 10 ** 6), benchmark.megabytes([before]))
    assert peak is None or 34 < peak < 40  # 4 MB and 32 MB


def test_waiting_for_data_is_seen(monkeypatch, tmp_path):
    """Reading made slow on purpose must show as waiting."""
    read = data.TrainSet.__getitem__

    def slow(self, at):
        time.sleep(0.1)
        return read(self, at)

    monkeypatch.setattr(data.TrainSet, "__getitem__", slow)
    monkeypatch.setattr(benchmark.train.evaluate, "evaluate", lambda *_: {"gamma_0": dict.fromkeys(
        ("mIoU_seen", "mIoU_unseen", "hIoU"), 0.0)})
    monkeypatch.setattr(benchmark.train.evaluate, "report", lambda *_: None)
    args = argparse.Namespace(dtype="fp32", repeats=1)
    world.write(tmp_path / "toy", train=40, val=4)
    numbers, _ = benchmark.loop(args, None, torch.device("cpu"), None, 6, 3, ["--data-root", str(tmp_path / "toy")])
    assert 32 * 0.1 < numbers["reading"][0] < numbers["step"] * 4
    assert 0.2 < numbers["waiting"] < 1  # two loader processes: 1.6 s a step against the step's own work
