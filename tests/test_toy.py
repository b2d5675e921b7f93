"""The embedded default: its tiny CLIP, as committed; the study's rows, tables and probe."""
import argparse
import json
import math
import re
import statistics
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import run_inside
from PIL import Image

import clip
import losses
import model as models
import train
from toy import diagnose, pretrain, study, world

FILE = Path(pretrain.__file__).parent / "clip.pt"


def test_zero_shot_of_the_committed_file():
    images, names = pretrain.Scenes(1000, seed=12345).all(workers=0)
    alone = images[::2], names[::2]  # even scenes hold one thing
    assert all(sum(n in world.THINGS for n in held) == 1 for held in alone[1])
    score = pretrain.zero_shot(clip.load(FILE), *alone)
    assert score["all"] >= 95 and score["unseen"] >= 90, score


def test_file_is_small_and_the_one_on_record():
    assert FILE.stat().st_size <= 12 * 2 ** 20
    assert json.loads(FILE.with_suffix(".json").read_text())["sha256"] == clip.file_sha256(FILE)


def test_captions_never_need_a_mask_and_name_what_is_there():
    import numpy as np
    rng = np.random.RandomState(0)
    for _ in range(200):
        _, _, names = world.draw(rng)
        words = pretrain.caption(names, rng)
        assert any(name in words for name in names)
        assert not any(other in words for other in world.CLASSES if other not in names)


# ---------------------------------------------------------------- the study and its probe


@pytest.fixture(scope="module")
def small_world(tmp_path_factory):
    root = tmp_path_factory.mktemp("world") / "toy"
    world.write(root, seed=2, train=12, val=4)
    return root


def test_the_probe_counts_as_a_loop_does(small_world, tiny_clip, tmp_path):
    torch.manual_seed(0)
    args = train.parse(["--data-root", str(small_world), "--out-dir", str(tmp_path)])
    probe, k = diagnose.Probe(args), 20
    model = models.build(tiny_clip)
    seen = probe.look(model, tiny_clip, k)
    assert model.training and not model.head.clip.training  # as it was
    source = probe.source
    model.eval()
    with torch.no_grad():
        z, c = model(probe.images), train.cls_embeddings(tiny_clip, probe.images)
        t = models.text_embeddings(tiny_clip, source.classes, source.templates)
    counts = dict.fromkeys(("unseen_things", "seen_things", "unseen_grounds", "seen_grounds"), 0)
    wrong, cosines, total = [], [], 0
    for image in range(len(z)):
        cells = [(y, x) for y in range(16) for x in range(16)]
        near = sorted(cells, key=lambda at: -(z[image, :, at[0], at[1]] @ c[image]).item())[:k]
        for y, x in cells:
            truth = int(probe.labels[image, 4 * y + 2, 4 * x + 2])
            hidden = source.classes[truth] in world.unseen(2)
            kind = f"{'un' * hidden}seen_{'things' if source.classes[truth] in world.THINGS else 'grounds'}"
            counts[kind] += (y, x) in near
            if hidden:
                likes = [(z[image, :, y, x] @ t[j]).item() for j in range(len(t))]
                wrong.append(source.classes[max(range(len(t)), key=likes.__getitem__)] not in world.unseen(2))
                cosines.append(likes[truth])
        total += k
    for kind, count in counts.items():
        assert seen[kind] == pytest.approx(100 * count / total, abs=0.01)
    assert seen["unseen_as_seen"] == pytest.approx(100 * sum(wrong) / len(wrong), abs=0.5)  # near ties
    assert seen["cosine_unseen"] == pytest.approx(sum(cosines) / len(cosines), abs=1e-4)


def test_a_watched_run_is_the_same_run(small_world, tiny_clip_file, tmp_path, monkeypatch):
    flags = ["--data-root", small_world, "--clip", tiny_clip_file, "--steps", 3, "--batch-size", 4, "--workers", 0,
             "--device", "cpu"]
    assert run_inside(train, *flags, "--out-dir", tmp_path / "alone")[0] == 0
    for module, name in ((models, "build"), (clip, "load"), (losses, "k_at")):
        monkeypatch.setattr(module, name, getattr(module, name))  # put back afterwards
    diagnose.Probe(train.parse([str(f) for f in flags] + ["--out-dir", str(tmp_path / "seen")])).watch()
    assert run_inside(train, *flags, "--out-dir", tmp_path / "seen")[0] == 0
    states = [torch.load(tmp_path / name / "last.pt", weights_only=True)["model"] for name in ("alone", "seen")]
    assert all(torch.equal(states[0][key], value) for key, value in states[1].items())
    looks = [json.loads(line) for line in (tmp_path / "seen/probe.jsonl").read_text().splitlines()]
    assert [look["step"] for look in looks] == [0, 2] and looks[-1]["k"] == 26


def test_the_study_gives_mean_std_and_verdicts(tmp_path, monkeypatch):
    monkeypatch.setattr(study, "RESULTS", tmp_path / "toy.jsonl")

    def line(row, seed, unseen, hiou, world_seed=0):
        score = {"pAcc": 90, "mIoU_seen": 70, "mIoU_unseen": unseen, "hIoU": hiou}
        look = dict.fromkeys(("step", "k", "unseen_things", "all_unseen_things", "seen_things", "unseen_grounds",
                              "seen_grounds", "cosine_seen", "cosine_unseen", "unseen_as_seen"), 1)
        return {"row": row, "world": world_seed, "seed": seed, "command": f"python train.py --seed {seed}",
                "commit": "abc", "precision": "bf16",
                "gamma_0": score, "calibrated": score, "probe": [look],
                "IoU": dict.fromkeys(world.unseen(world_seed), 10 * seed)}

    def by_kind(word, pair, ground, world_seed):
        words, pairs, grounds = {
            1: ("yellow circle, yellow square, yellow cross, yellow ring",
                "red square, green cross, blue circle, purple ring", "light grass"),
            2: ("red circle, red square, red cross, red ring",
                "green ring, blue circle, yellow cross, purple square", "light water")}[world_seed]
        return {"IoU": dict.fromkeys(words.split(", "), word) | dict.fromkeys(pairs.split(", "), pair)
                | {grounds: ground}}

    study.render([line("full", 0, 50, 60), line("full", 1, 54, 64), line("full", 2, 20, 30), line("full", 3, 20, 40),
                  line("linear-seg", 0, 25, 40), line("linear-seg", 1, 28.8, 40), line("all-k", 0, 49, 58),
                  line("all-k", 1, 52.8, 58), line("linear", 0, 40, 63), line("linear", 3, 40, 43),
                  line("random-k", 7, 40, 50),
                  line("random", 0, 40, 70), line("random", 1, 40, 40), line("random-k", 0, 40, 50),
                  line("full", 0, 10, 20, world_seed=1) | by_kind(40, 20, 8, 1),
                  line("linear", 0, 5, 10, world_seed=1) | by_kind(10, 25, 6, 1),
                  line("full", 0, 10, 20, world_seed=2) | by_kind(10, 20, 8, 2),
                  line("linear", 0, 5, 22, world_seed=2) | by_kind(0, 21, 4, 2)])
    text = (tmp_path / "toy.md").read_text()
    assert "| full | the default: CSH, n = 1, SGD and SAM | 4 | 70.0 ± 0.0 | 36.0 ± 18.5 | 48.5 ± 16.2 | – |" in text
    assert "| 2 | 70.0 ± 0.0 | 40.0 ± 0.0 | 53.0 ± 14.1 | **-3.0 ± 0.0** |" in text  # linear: -3 and -3
    assert "| 55.0 ± 21.2 | +7.0 ± 24.0 |" in text  # random
    assert re.search(r"full − linear-seg \| > 20 \| \+25.1 ± 0.1 \| 2 \| holds", text)  # 25 and 25.2: the same seeds
    assert re.search(r"full − all-k \| > 5 \| \+1.1 ± 0.1 \| 2 \| \*\*does not hold", text)  # 1 and 1.2
    assert re.search(r"full − linear \| > 0 \| -3.0 ± 0.0 \| 2 \| \*\*does not hold", text)
    assert re.search(r"full − random \| > 0 \| \+7.0 ± 24.0 \| 2 \| undecided", text)  # -10 and 24
    assert re.search(r"full − random-k \| > 0 \| \+10.0 \| 1 \| undecided", text)
    assert f"| linear |{' 15 |' * 9}" in text  # seeds 0 and 3
    assert "> random > linear > " in text.split("## World 1")[0] and "## World 1" in text
    together = text.split("## Over worlds")[1].split("## ")[0]  # each world's mean counts once
    assert "| full | 48.5 (n 4) | 20.0 (n 1) | 20.0 (n 1) | 29.5 ± 16.5 |" in together and "| random |" not in together
    assert "full − linear | > 0 | +1.7 ± 7.2 | 3 | undecided | +4.0 ± 8.5 | 2 | undecided |" in together  # −3, 10, −2
    assert "| +20.0 ± 14.1 | -3.0 ± 2.8 | +3.0 ± 1.4 |" in together  # without world 0: 30, 10; −5, −1; 2, 4
    twice, other = [line("full", 0, 1, 1)] * 2, [line("full", 0, 1, 1) | {"precision": "fp32"}]
    mixed = [line("full", seed, 1, 1) | {"settings": {"lr": 1, "k_end": k}} for seed, k in enumerate((0.4, 0.4, 0.1))]
    for bad, words in ((twice, "a run twice"), (other, "in another precision"), (mixed, "full that differ in k_end")):
        (tmp_path / "toy.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in bad))
        with pytest.raises(SystemExit, match=words):
            study.finished()
    assert Image.open(tmp_path / "toy.png").width > 600


def test_verdicts_are_a_t_test_at_95_percent():
    for n, t in study.T95.items():  # Student's density with n − 1 degrees of freedom, integrated
        df = n - 1
        peak = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        middles = [(i + 0.5) * t / 2000 for i in range(2000)]
        between = t * statistics.mean(peak * (1 + x * x / df) ** (-(df + 1) / 2) for x in middles)  # 0 and t
        assert 0.5 + between == pytest.approx(0.95, abs=0.001)
    assert study.verdict([21, 23], 20) == "undecided" and study.verdict([21, 22, 23], 20) == "holds"  # 2.0 ± 1.7
    assert study.verdict([17, 18, 19], 20) == "**does not hold**" and study.verdict([30], 20) == "undecided"


def test_a_world_that_is_another_one_is_refused(small_world, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "ROOT", tmp_path)
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results" / "toy.jsonl")
    monkeypatch.setattr(study, "run", None)  # nothing may start
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "toy-1").symlink_to(small_world)  # of seed 2
    with pytest.raises(SystemExit, match="toy-1 is not world 1"):
        study.main(argparse.Namespace(world=1, render=False, rows=["full"], seeds=1, steps=None, jobs=1))
    with pytest.raises(FileExistsError, match="is there already"):
        world.write(small_world)


def test_variants_change_what_they_say(tiny_clip, monkeypatch):
    for module, name in ((models, "build"), (losses, "select"), (losses, "sgd_loss"), (losses, "sam_loss"),
                         (losses, "BANK")):
        monkeypatch.setattr(module, name, getattr(module, name))
    build = models.build
    z, t = F.normalize(torch.randn(3, 8, 4, 4), dim=1), F.normalize(torch.randn(5, 8), dim=1)
    c, labels = F.normalize(torch.randn(3, 8), dim=1), torch.randint(5, (3, 8, 8))
    study.VARIANTS["per-feature"](None)
    by_hand = [1 - sum(sorted((z[b, :, y, x] @ c[b]).item() for y in range(4) for x in range(4))[-5:]) / 5
               for b in range(3)]
    assert losses.sgd_loss(z, c, 5).item() == pytest.approx(sum(by_hand) / 3, abs=1e-5)
    own, inside = losses.global_prototype(z, c, 5), torch.arange(16).expand(3, -1) < 9
    study.VARIANTS["random-k"](None)
    assert not torch.allclose(losses.global_prototype(z, c, 5), own)
    assert torch.allclose(losses.global_prototype(z, c, 16), F.normalize(z.flatten(2).mean(2), dim=1), atol=1e-6)
    a = torch.einsum("bdn,bd->bn", z.flatten(2), c)
    assert all((losses.select(a, 5, inside) * inside).sum(1).eq(5).all() for _ in range(20))
    bce = losses.sam_loss(z, t, labels, kind="bce")
    study.VARIANTS["sam-bce"](None)
    assert losses.sam_loss(z, t, labels, 0.07) == bce
    study.VARIANTS["no-bank"](None)
    assert losses.push(torch.ones(4, 8), c, losses.BANK).shape == (0, 8)
    args = argparse.Namespace()
    study.VARIANTS["positional"](args)
    assert models.build(tiny_clip, **vars(args)).head.clip.positional_embedding is not None
    study.VARIANTS["unfrozen"](None)
    assert all(p.requires_grad for p in models.build(tiny_clip).parameters())
    study.VARIANTS["gain-1"](None)
    assert models.build(tiny_clip).head.adapter.norm.weight.unique().tolist() == [1]
    for row in ("linear-plain", "linear-plain-seg"):
        models.build = build
        study.VARIANTS[row](None)
        assert isinstance(models.build(tiny_clip, head="linear").head.adapter.norm, torch.nn.Identity)
