"""The study's runs, refusals and report; the figures; the benchmark's counts against published and hand-made ones."""
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, run_inside
from PIL import Image
from scipy.stats import t

import clip
import losses
import train
from experiments import benchmark, dense_clip, figures, study
from support import UserError
from toy import world


@pytest.fixture
def places(tmp_path, monkeypatch):
    """All that the study reads and writes lies in a folder, worlds are small, no run takes place -> their words."""
    runs = []

    whole = subprocess.run

    def fake(words, env=None, **how):
        if words[0] == "git":
            return whole(words, env=env, **how)
        runs.append(words[1:-2])
        assert env["OMP_NUM_THREADS"] == "1" and words[0] == sys.executable and words[-2] == "--out-dir"
        iou = dict.fromkeys(world.CLASSES, 20.0) | dict.fromkeys(world.unseen(0), 5.0) | {"dog": None}
        Path(words[-1]).mkdir()
        Path(words[-1], "metrics.json").write_text(json.dumps({"precision": "fp32", "gamma_0": {"IoU": iou}}))
        return SimpleNamespace(returncode=int("--lr" in words), stderr="error: no such rate")

    for name, path in {"DATA": "data", "RESULTS": "results/study.jsonl", "REPORT": "a.md", "README": "b.md"}.items():
        monkeypatch.setattr(study, name, tmp_path / path)
    study.README.write_text("before\n<!-- table: python … -->\nold\n<!-- end -->\nafter\n")
    study.REPORT.write_text(f"# Ours\n\nA verdict.\n\n{study.MARK}\nold")
    monkeypatch.setattr(study.subprocess, "run", fake)
    monkeypatch.setattr(study, "product", lambda: "c1")
    write = world.write
    monkeypatch.setattr(world, "write", lambda root, seed: write(root, seed, train=12, val=4))
    return runs


def line(row, seed, *scores, **more):
    return {"row": row, "world": seed, "commit": "c1", "device": "CPU, fp32", "seconds": 1800, "command":
            f"python train.py --{row} --data-root data/toy"} | dict(zip(study.SCORES, scores)) | more


LINES = [line("full", 0, 70, 50, 60), line("full", 1, 80, 40, 53), line("full", 2, 75, 45, 55),
         line("linear", 1, 80, 30, 44), line("linear", 2, 75, 36, 46), line("linear", 0, 68, 44, 50),
         line("random", 1, 80, 41, 54), line("random", 2, 75, 40, 53), line("linear images=100", 1, 60, 18, 28),
         line("full images=100", 1, 60, 20, 30), line("seg", 3, 7, 0, 0), line("full --k-end 1", 1, 1, 1, 50)]


@pytest.mark.parametrize("text", [
    "| `full`: L_seg, SGD and SAM: the defaults | 3 | 75.0 ± 5.0 | 45.0 ± 5.0 | 56.0 ± 3.6 |  | `train.py --full` |",
    "| 74.3 ± 6.0 | 36.7 ± 7.0 | 46.7 ± 3.1 | **+9.3 [+7.9, +10.8]** | `",  # 10, 9, 9: std 0.577; ± 4.303 · 0.577 / √3
    "weights | 2 | 77.5 ± 3.5 | 40.5 ± 0.7 | 53.5 ± 0.7 | +0.5 [-18.6, +19.6] | ",  # −1, 2: ± 12.706 · 1.5
    "| `linear images=100` | 1 | 60.0 | 18.0 | 28.0 | +2.0 |", "| `full images=100` | 1 | 60.0 | 20.0 | 30.0 | +23.0 |",
    "L_seg alone | 1 | 7.0 | 0.0 | 0.0 |  |", "| `full --k-end 1` | 1 | 1.0 | 1.0 | 50.0 | +3.0 |"])
def test_the_table_by_hand(text):
    assert text in study.table(LINES, study.rows_of(LINES))


def test_the_report_is_what_readme_does_not_have():
    text = study.report(LINES, 7)
    assert "Commit c1 (7 lines of others are left out), CPU, fp32, 12 runs of one thread, 6.0 hours" in text
    rows = [row.split("`")[1] for row in text.splitlines() if row.startswith("| `")]
    assert rows == ["full images=100", "linear images=100", "full --k-end 1"] and text.endswith("(results.png)\n")


def test_the_plot_by_its_pixels():
    """Linear and random, at rows 60 and 86: the axis from −20 to 20, points, and the bars' ends of the report."""
    image = np.array(study.plot(LINES[:8]))
    start, *_, end = np.flatnonzero((image[50] != 255).all(1))
    for y, want in ((60, [9.33, 7.9, 10.77]), (86, [0.5, -18.56, 19.56])):
        red, blue = (np.flatnonzero((image[y] == colour).all(1)) for colour in study.pictures.LINES[:2])
        found = np.array([red.mean(), min(red.min(), blue.min()), max(red.max(), blue.max())])
        assert (found - start) / (end - start) * 40 - 20 == pytest.approx(want, abs=0.15)


def test_t_table_is_scipys():
    assert study.T95 == {n: round(t.ppf(0.975, n - 1), 3) for n in study.T95}


def test_published_tables_are_those_of_the_lines():
    every = [entry for entry in study.finished() if entry["world"] in study.REPORTED]
    lines = [entry for entry in every if entry["commit"] == every[-1]["commit"]]
    assert f" -->\n{study.table(lines, study.README_ROWS)}\n<!-- end -->" in study.README.read_text()
    assert study.REPORT.read_text().endswith(study.report(lines, len(every) - len(lines)))
    for row, score, page in (("seg-sgd", "seen", study.README), ("seg-sgd", "unseen", study.README),  # in sentences
                             ("all-k", "unseen", study.README), ("all-k", "unseen", study.REPORT),
                             ("low-k", "seen", study.REPORT)):
        middle, half = study.gain(lines, row, score)
        assert re.search(rf"{score} \(?{re.escape(f'{middle:+.1f} [{middle - half:.1f}, {middle + half:.1f}]')}",
                         page.read_text()), (row, score)


def test_the_table_of_the_search_is_that_of_the_lines():
    text = (ROOT / "docs/choices.md").read_text()
    table = dict(re.findall(r"^\| `(\S.*?)`.* \| ([+-].*) \|$", text, re.MULTILINE))
    lines = [entry for entry in study.finished() if entry["world"] in range(8, 12) and entry["commit"] == "ea1b179"]
    full, *trials = ({entry["world"]: entry["hIoU"] for entry in lines if entry["row"] == row}
                     for row in ("full", *(f"full {name}" if name != "values" else name for name in table)))
    assert {entry["row"] for entry in lines if entry["row"].startswith("full ")} <= {f"full {name}" for name in table}
    for trial, row in zip(trials, table.values()):
        assert list(trial) == [8, 9, 10, 11][:len(trial)]
        assert row == ", ".join(f"{trial[w] - full[w]:+.1f}" for w in trial)


def test_it_runs_what_is_missing_and_reports(places, monkeypatch):
    study.RESULTS.parent.mkdir()
    study.RESULTS.write_text(json.dumps(line("full", 0, 1, 1, 1, commit="older")) + "\n")
    monkeypatch.setattr(study, "DEFAULT", ["full", "all-seen"])
    monkeypatch.setattr(study, "SEEDS", ["full --seed 1"])
    study.main(study.parse([]))
    lines = study.finished()
    assert [entry["world"] for entry in lines if entry["row"] == "full --seed 1"] == [0]
    assert len(places) == len(lines) - 1 == 17 and {entry["commit"] for entry in lines[1:]} == {"c1"}
    one = next(entry for entry in lines[1:] if (entry["row"], entry["world"]) == ("full", 0))
    words = shlex.split(one["command"])
    assert words == ["python", "train.py", "--data-root", words[3], "--device", "cpu", "--workers", "0"]
    assert (study.ROOT / words[3]).samefile(study.DATA / "toy") and words[1:] in places
    assert [one[key] for key in study.SCORES] == [20, 5, 8]
    text, readme = study.REPORT.read_text(), study.README.read_text()
    assert text.startswith("# Ours\n\nA verdict.\n\n" + study.MARK) and "(1 lines of others" in text
    assert readme.startswith("before\n<!-- table: python … -->\n| row | worlds | seen") and "old" not in readme
    assert readme.endswith(" |\n<!-- end -->\nafter\n") and study.REPORT.with_suffix(".png").exists()
    study.RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in lines[:-1]))  # as if it had been interrupted
    out = run_inside(study, "--worlds", 0, 7, "--rows", "full", "all-seen")[1]
    assert len(places) == 18 and "1 runs to go" in out and "| `full`: " in out and study.REPORT.read_text() == text


def test_changes_of_the_data(places):
    study.DATA.mkdir()
    root, few, seen = (study.draw(1, row) for row in ("full", "full images=5 --lr 1", "all-seen"))
    trained, unseen = ([(folder / name).read_text().split("\n")[:-1] for folder in (root, few, seen)]
                       for name in ("train.txt", "unseen.txt"))
    assert len(trained[0]) == 12 and trained == [trained[0], trained[0][:5], trained[0]]
    assert unseen == [world.unseen(1), world.unseen(1), []] and study.draw(1, "full images=5") == few
    assert (few / "images" / f"{trained[1][0]}.png").exists()
    (study.DATA / "toy-2").symlink_to(root)
    with pytest.raises(UserError, match="toy-2 is not world 2 as it is drawn now"):
        study.draw(2, "full")


@pytest.mark.parametrize("row", [*study.DEFAULT, *study.SEEDS])
def test_commands_are_understood(row, monkeypatch):
    words = study.command(row, study.DATA / "toy-3")
    module, start = (dense_clip, 2) if row.startswith("clip") else (train, 2 if words[0] == "-c" else 1)
    args = module.parse(words[start:])
    assert args.data_root == "data/toy-3" and args.device == "cpu"
    if words[0] == "-c":  # k stands at its end from the first step on
        k_at, inside = losses.k_at, torch.ones(1, 10, 10, dtype=torch.bool)
        for module, name, value in ((train, "main", id), (train, "parse", list), (losses, "k_at", k_at)):
            monkeypatch.setattr(module, name, value)
        exec(words[1], {})
        assert torch.equal(losses.k_at(0, 300, inside, 0.1), k_at(299, 300, inside, 0.1))


@pytest.mark.parametrize("row, state, said", [
    ("csh", ["c1"], "no row 'csh': choose full"),
    ("full --lr 1", ["c1"], "python train.py --lr 1 .* did not finish: error: no such rate"),
    ("full", ["c1 and changes"], "the product is at c1 and changes: commit them"),
    ("full", [""], "the product is at no commit"),
    ("full", ["c1", "c2"], "the product was changed during a run of full"),
])
def test_refusals(row, state, said, places, monkeypatch):
    states = iter(state)
    monkeypatch.setattr(study, "product", lambda: next(states))
    with pytest.raises(UserError, match=said):
        study.main(study.parse(["--rows", row, "--worlds", "0"]))
    assert not study.finished()


def test_the_commit_of_the_product(tmp_path, monkeypatch):
    """In a repository of its own: what is no product may change, the answer stays."""
    monkeypatch.setattr(study, "ROOT", tmp_path)
    git, found = ["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b"], [study.product()]
    subprocess.run([*git, "init", "-q"], check=True)
    (tmp_path / "docs").mkdir()
    for name in ("model.py", "docs/a.png", "README.md", "losses.py"):
        (tmp_path / name).write_text(name)
        subprocess.run([*git, "add", "-A"], check=True)
        subprocess.run([*git, "commit", "-qm", name], check=True)
        found.append(study.product())
    first, last = found[1], found[-1]
    assert found == ["", first, first, first, last] and first != last
    (tmp_path / "losses.py").write_text("changed")
    assert study.product() == f"{last} and changes"


def test_the_figures_of_a_run(tmp_path, monkeypatch):
    world.write(tmp_path / "toy", train=12, val=2)
    run_inside(train, "--data-root", tmp_path / "toy", "--out-dir", tmp_path / "run", "--device", "cpu", "--workers", 0,
               "--steps", 5, "--batch-size", 2, "--k-end", 0.2)
    chosen = []
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setattr(figures, "outline", lambda image, cells: chosen.append(cells))
    assert "wrote preview.png" in run_inside(figures, "--run", tmp_path / "run")[1]
    assert [int(cells.sum()) for cells in chosen] == [256, 154, 52] * 3  # steps 0, 2 and 4: shares 1, 0.6, 0.2
    image = torch.from_numpy(np.array(Image.open(tmp_path / "toy/images/train_00004.png"))).permute(2, 0, 1)
    c, d = clip.load("toy/clip.pt").visual.cls_and_patches(image[None] / 255)
    a = F.interpolate(F.cosine_similarity(d, c[:, None], dim=2).view(1, 1, 8, 8), (16, 16), mode="bilinear")[0, 0]
    assert torch.equal(chosen[5], a >= a.flatten().sort().values[-52])  # of the second of the three images
    assert Image.open(tmp_path / "selection.png").size == (992, 616)
    assert Image.open(tmp_path / "words.png").size == (792, 216)


def test_costs_that_are_published_and_those_by_hand():
    """ZegCLIP's multiply-adds and parameters; dense CLIP's and our head's of ViT-B/16 at 8×8 patches, by terms."""
    vit, (N, W, D, C, K) = clip.CLIP(**benchmark.VIT_B16).requires_grad_(False), (8 * 8, 768, 512, 256, 20)
    peer, dense, ours = (benchmark.build(name, vit, K) for name in ("zegclip", "dense-clip", "resnet50"))
    assert benchmark.gflops(peer, 512)["Global"] / 2 == pytest.approx(110.4, rel=0.01)
    trained = sum(p.numel() for p in peer.parameters() if p.requires_grad)
    unused = 3 * (4 * 512 * 512 + 4 * 512 + 2 * 512)  # self-attention and its norm, in their layers but never run
    assert (trained + unused) / 1e6 == pytest.approx(13.8, abs=0.05)
    block = lambda n: n * W * 12 * W + 2 * n * n * W  # noqa: E731  qkv, out, MLP's two; q·k and its product with v
    tower, head = N * 3 * 16 * 16 * W + 12 * block(N + 1) + (N + 1) * W * D, N * C * W + block(N) + N * W * D
    assert benchmark.gflops(dense, 128)["Global"] == pytest.approx(2 * (tower + N * D * K) / 1e9, rel=1e-6)
    assert benchmark.gflops(ours, 128)["ChimeraSeg.head"] == pytest.approx(2 * head / 1e9, rel=1e-6)


def test_the_benchmark_measures_and_writes(tiny_clip_file, tmp_path):
    flags = ("--bodies small --crop 32 --image 40 48 --batch-size 2 --repeats 2 --workers 0 --device cpu --classes 3 "
             f"--clip {tiny_clip_file} --out {tmp_path}/found.json").split()
    done = subprocess.run([sys.executable, "-m", "experiments.benchmark", *flags], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    result = json.loads((tmp_path / "found.json").read_text())
    assert list(result["test"]) == list(result["cost"]) == ["dense-clip", "zegclip", "small"]
    assert all(found["images_per_s"] > 0 for found in (*result["test"].values(), result["train"]["small"]))
    assert 0 < result["train"]["small"]["loader"] < 1 and result["commit"] == study.product()


@pytest.mark.parametrize("attention", ["clip", "values"])
def test_clip_alone_by_hand(attention, places, tmp_path):
    """Attention over one token is its value, so by the values path each patch passes through the last block alone."""
    clip_model, images, t = clip.load("toy/clip.pt"), torch.rand(2, 3, 64, 64), F.normalize(torch.rand(3, 128), dim=1)
    visual, net = clip_model.visual, dense_clip.DenseCLIP(clip_model, attention)
    net.t, (*blocks, last), x = t, visual.transformer.resblocks, visual.embed(images)
    for block in blocks:
        x = block(x)
    x = last(x)[:, 1:] if attention == "clip" else last(x[:, 1:].reshape(128, 1, -1)).view(2, 64, -1)
    cosine = F.normalize(visual.ln_post(x) @ visual.proj, dim=2) @ t.T  # (B, N, K)
    assert torch.allclose(net.logits(images).flatten(2).mT, cosine * clip_model.logit_scale.exp(), atol=1e-3)
    root = study.draw(0, "full")
    status, text, words = run_inside(dense_clip, "--data-root", root, "--attention", attention, "--out-dir", tmp_path)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert status == 0 and f"{found['gamma_0']['pAcc']:.1f}\nmIoU seen " in text, words + text
