"""The study's statistics, its refusals and its report; the benchmark's counts against published and hand-made ones."""
import json
import math
import re
import statistics
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import run_inside
from PIL import Image

import clip
import data
import losses
import model as models
import train
from experiments import benchmark, dense_clip, figures, study
from support import UserError, checkpoint
from toy import world

# ---------------------------------------------------------------- study


@pytest.fixture
def places(tmp_path, monkeypatch):
    """All that the study writes goes into a folder; worlds have few scenes; no run takes place -> the flags of each."""
    runs = []

    def fake(flags, out):
        runs.append(flags)
        score = 40.0 + len(runs)
        return {"gamma_0": {"mIoU_seen": score, "mIoU_unseen": score / 2, "hIoU": score / 4,
                            "IoU": dict.fromkeys(world.CLASSES, score)}}

    for name in ("DATA", "RUNS"):
        monkeypatch.setattr(study, name, tmp_path / name.lower())
    monkeypatch.setattr(study, "RESULTS", tmp_path / "results/study.jsonl")
    monkeypatch.setattr(study, "REPORT", tmp_path / "docs/results.md")
    monkeypatch.setattr(study, "README", tmp_path / "README.md")
    study.README.write_text("before\n<!-- table: python … -->\nold\n<!-- end -->\nafter\n")
    monkeypatch.setattr(study, "train", fake)
    write = world.write
    monkeypatch.setattr(world, "write", lambda root, seed: write(root, seed, train=12, val=4))
    return runs


def line(row, world_seed, seed, seen, unseen, hiou, kinds=(0, 0), **more):
    iou = {name: value for names, value in zip(world.unseen_kinds(world_seed).values(), kinds) for name in names}
    return {"row": row, "world": world_seed, "seed": seed, "precision": "fp32", "method": "m1", "commit": "c1",
            "command": f"python train.py --seed {seed}", "seconds": 1800, "IoU": iou,
            "scores": {"mIoU_seen": seen, "mIoU_unseen": unseen, "hIoU": hiou}} | more


def write(*lines):
    study.RESULTS.parent.mkdir(parents=True, exist_ok=True)
    study.RESULTS.write_text("".join(json.dumps(entry) + "\n" for entry in lines))


def test_the_report_by_hand():
    lines = [line("full", 0, 0, 70, 50, 58, (60, 90)), line("full", 0, 1, 70, 54, 62, (60, 90)),
             line("full", 1, 0, 80, 40, 53, (50, 80)), line("full", 2, 0, 75, 45, 55, (50, 70)),
             line("linear", 0, 1, 68, 44, 52, (58, 90)), line("linear", 1, 0, 80, 30, 44, (52, 81)),
             line("linear", 2, 0, 75, 36, 46, (50, 73)), line("linear", 3, 0, 0, 0, 0),
             line("full", 8, 0, 1, 2, 3), line("full --k-end 1", 8, 0, 4, 5, 6), line("full --k-end 1", 9, 0, 6, 5, 6),
             line("full seen=4", 1, 0, 30, 10, 15), line("linear seen=4", 1, 0, 30, 9, 14),
             line("full images=9", 1, 0, 60, 20, 30), line("linear images=9", 1, 0, 60, 18, 28),
             line("full --steps 300", 0, 0, 50, 30, 37), line("linear --steps 300", 0, 0, 49, 31, 36),
             line("full --strict --steps 300", 0, 0, 48, 8, 13), line("linear --strict --steps 300", 0, 0, 47, 6, 10),
             line("full --strict", 4, 0, 48, 8, 12), line("linear --strict", 4, 0, 47, 6, 10),
             line("full images=100 --steps 300", 0, 0, 20, 9, 14),
             line("random images=100 --steps 300", 0, 0, 20, 8, 11)]
    text = study.report(lines)
    # worlds 60, 53, 55: world 0 counts once, with the mean of its seeds
    assert ("| full | CSH, SGD, SAM | 3 | 75.0 ± 5.0 | 45.7 ± 6.0 | 56.0 ± 3.6 | 53.3 ± 5.8 | "
            "80.0 ± 10.0 | `python train") in text
    # hIoU: 62 − 52 of the seed that both have, 9, 9; ± 4.303 · 0.577 / √3. World 3 has no full
    assert ("| linear | 3 | +0.7 [-2.2, +3.5] | **+9.7 [+8.2, +11.1]** | **+9.3 [+7.9, +10.8]** | "
            "+0.0 [-5.0, +5.0] | -1.3 [-5.1, +2.5] |") in text
    assert "| linear images=9 | 1 | +0.0 | +2.0 | +2.0 |" in text  # against full of as many pictures
    assert "| full images=9 | 1 | +20.0 | +20.0 | +23.0 |" in text  # against full itself
    assert "| linear seen=4 | 1 | +0.0 | +1.0 | +1.0 |" in text and "| full seen=4 | 1 | +" not in text
    assert "| linear --steps 300 | 1 | +1.0 | -1.0 | +1.0 |" in text  # against full of as many steps
    assert "| linear --strict --steps 300 | 1 | +1.0 | +2.0 | +3.0 |" in text
    assert "| full --strict --steps 300 | 1 | +2.0 | +22.0 | +24.0 |" in text  # against full of as many steps
    assert "| full --steps 300 | 1 | +" not in text
    assert "| full | 0 | 2 | 60.0 ± 2.8 |" in text and "| full | 1 | 1 |" not in text  # the noise of seeds
    assert "| full | 8 | 1.0 | 2.0 | 3.0 |  |" in text
    assert "| full --k-end 1 | 8 9 | 5.0 ± 1.4 | 5.0 ± 0.0 | 6.0 ± 0.0 | -3.0 |" in text
    assert "| c1 | m1 | fp32 | CPU | default | 0 1 2 3 4 8 9 | 17 | 8.5 |" in text
    assert "| c1 | m1 | fp32 | CPU | 300 | 0 | 6 | 3.0 |" in text
    table = study.readme_table(lines).splitlines()[2:]  # its rows alone
    assert table[0] == ("| `full`: CSH, SGD, SAM | 3 | 75.0 ± 5.0 | 45.7 ± 6.0 | 56.0 ± 3.6 | 53.3 ± 5.8 | "
                        "80.0 ± 10.0 |  |")
    assert [row.split(" | ")[-1] for row in table] == [" |", "**+9.3 [+7.9, +10.8]** |", "– |", "+2.0 |", "+23.0 |",
                                                     "+3.0 |"]
    assert table[3].startswith("| `linear --strict`: `linear` without them, against `full --strict` | 1 | 47.0 |")
    assert table[5].startswith("| `random images=100 --steps 300`: ") and table[5].count(" | 20.0 | 8.0 | 11.0 | ") == 1
    rows = study.parse([]).rows
    assert {*study.README_ROWS} < {*rows} and {study.full_of(row) for row in rows} <= {*rows}


def test_t_table_holds_95_percent():
    for n, t in study.T95.items():  # Student's density with n − 1 degrees of freedom, integrated from 0 to t
        df = n - 1
        peak = math.gamma((df + 1) / 2) / math.gamma(df / 2) / math.sqrt(df * math.pi)
        middles = [(i + 0.5) * t / 2000 for i in range(2000)]
        share = 2 * t * statistics.mean(peak * (1 + x * x / df)**(-n / 2) for x in middles)
        assert share == pytest.approx(0.95, abs=1e-3)


def test_it_runs_what_is_missing_and_reports(places):
    argv = ["--worlds", "0", "3", "--rows", "full", "linear  seen=6 --strict", "--jobs", "1"]
    study.main(study.parse(argv))
    assert len(places) == 4 and places[1][:6] == [
        "train.py", "--sam-weight", "1", "--head", "linear", "--strict"]
    kept = study.RESULTS.read_text()
    assert json.loads(kept.splitlines()[0]) | {"seconds": 0} == {
        "row": "full", "world": 0, "seed": 0, "precision": "fp32", "device": study.device_name(),
        "method": study.method_hash(), "commit": study.commit(), "seconds": 0,
        "command": " ".join(["python", *places[0]]),
        "scores": {"mIoU_seen": 41.0, "mIoU_unseen": 20.5, "hIoU": 10.25}, "IoU": dict.fromkeys(world.unseen(0), 41.0)}
    study.RESULTS.write_text("".join(kept.splitlines(True)[:-1]))  # the last run was interrupted
    study.REPORT.write_text("# Ours\n\nA verdict.\n\n" + study.REPORT.read_text().partition("\n\n")[2])
    study.main(study.parse([*argv, "--seeds", "0"]))
    assert len(places) == 5 and places[4] == places[3]
    assert study.REPORT.read_text().startswith("# Ours\n\nA verdict.\n\n" + study.MARK)
    assert "| linear seen=6 --strict |" in study.REPORT.read_text()
    assert Image.open(study.REPORT.with_suffix(".png")).width > 600
    before, table, after = study.README.read_text().partition("| `full`: CSH")
    assert before.startswith("before\n<!-- table: python … -->\n| row") and "old" not in before
    assert table and after.endswith(" |\n<!-- end -->\nafter\n")


def test_the_body_of_another_row():
    assert study.body_of("full --steps 9") is None
    assert study.body_of("random seen=4 --frozen-blocks 2 frozen-body --strict --steps 9 --lr 1") == (
        "linear-seg seen=4 --strict --steps 9")


def test_a_frozen_body_needs_a_finished_run_and_comes_after_it(places):
    argv = ["--worlds", "0", "--rows", "random frozen-body --steps 9"]
    for folder in (study.RUNS / "nothing", study.run_folder("linear-seg --steps 9", 0, 0)):
        folder.mkdir(parents=True)
        (folder / "last.pt").touch()  # of an unfinished run
        with pytest.raises(UserError, match="needs the body of a finished run .*: first run --rows 'linear-seg --ste"):
            study.main(study.parse(argv))
    study.main(study.parse([*argv, "linear-seg --steps 9"]))
    assert places[0][1:3] == ["--head", "linear"] and places[1][1] == "experiments.frozen_body"
    assert (study.ROOT / places[1][2]).samefile(folder / "last.pt")
    assert places[1][3:9] == ["--sam-weight", "1", "--head", "random", "--steps", "9"]


def test_a_frozen_body_stays_as_it_was(places, tiny_clip_file, tmp_path):
    """Batch norm's statistics too; the adapter moves."""
    flags = ["--clip", tiny_clip_file, "--data-root", study.draw(0, {}), "--batch-size", 4, "--crop", 32, "--body",
             "mobilenet-v2", "--body-weights", "none", "--device", "cpu", "--workers", 0, "--sgd-weight", 0]

    def trained(out, steps, *front):
        done = subprocess.run([sys.executable, *map(str, (*front, *flags, "--steps", steps, "--out-dir", out))],
                              cwd=study.ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return checkpoint.read_checkpoint(out / "last.pt")["model"]

    body = trained(tmp_path / "body", 2, "train.py")
    runs = [trained(tmp_path / str(steps), steps, "-m", "experiments.frozen_body", tmp_path / "body/last.pt",
                    "--head", "random") for steps in (1, 3)]
    for name, x in runs[1].items():
        if name.startswith("body."):
            assert torch.equal(x, body[name]), name
        elif name.startswith("head.adapter."):
            assert not torch.equal(x, runs[0][name]), name


def test_changes_of_the_data(places):
    study.DATA.mkdir()
    read = lambda folder, name: (folder / name).read_text().splitlines()  # noqa: E731
    root = study.draw(1, {})
    few, fewer = study.draw(1, {"seen": 8}), study.draw(1, {"images": 5, "seen": 4})
    assert read(fewer, "train.txt") == read(root, "train.txt")[:5] and read(few, "train.txt") == read(root, "train.txt")
    seen = [set(world.CLASSES) - set(read(folder, "unseen.txt")) for folder in (root, few, fewer)]
    assert [len(names) for names in seen] == [21, 8, 4] and seen[0] > seen[1] > seen[2]
    assert (fewer / "images" / (read(fewer, "train.txt")[0] + ".png")).exists()
    (study.DATA / "toy-2").symlink_to(root)
    with pytest.raises(UserError, match="toy-2 is not world 2 as it is drawn now"):
        study.draw(2, {})


def test_it_refuses_to_mix(places, monkeypatch):
    mixed = [(line("full", 0, 0, 1, 1, 1), line("linear", 0, 0, 1, 1, 1, method="m2", commit="c2")),
             (line("full --steps 9", 0, 0, 1, 1, 1), line("all-k --steps 9", 0, 0, 1, 1, 1, precision="bf16"))]
    for lines, said in zip(mixed, (r"world 0, the default number of steps: m1 fp32 CPU \(c1\); m2 fp32 CPU \(c2\)",
                                   r"world 0, --steps 9: m1 fp32 CPU \(c1\); m1 bf16 CPU \(c1\)")):
        write(*lines)
        with pytest.raises(UserError, match=said):
            study.main(study.parse(["--report"]))
    write(line("full", 0, 0, 1, 1, 1))
    with pytest.raises(UserError, match=rf"m1 fp32 CPU \(c1\); {study.method_hash()} fp32 .* \(now\)"):
        study.main(study.parse(["--worlds", "0", "--rows", "linear"]))
    write(line("full", 0, 0, 1, 1, 1, method=study.method_hash()))
    with pytest.raises(UserError, match=r"fp32 CPU \(c1\); .* bf16 .* \(now\)"):
        study.main(study.parse(["--worlds", "0", "--rows", "linear", "--precision", "bf16"]))
    study.comparable([line("full", 0, 0, 1, 1, 1), line("full", 1, 0, 1, 1, 1, precision="bf16", method="m2"),
                      line("full --steps 9", 0, 0, 1, 1, 1, method="m2")])  # never compared
    assert not places and not study.REPORT.exists()
    study.RESULTS.unlink()
    states = iter(("a", "a", "b"))
    monkeypatch.setattr(study, "method_hash", lambda: next(states))
    with pytest.raises(UserError, match="changed during a run of full"):
        study.main(study.parse(["--worlds", "0", "--rows", "full", "--jobs", "1"]))
    with pytest.raises(UserError, match="no row 'csh': choose full"):
        study.split_row("csh --strict")


def test_the_hash_sees_code_and_passes_over_words(tmp_path, monkeypatch):
    for name in study.METHOD:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((study.ROOT / name).read_bytes())
    before = study.method_hash()
    monkeypatch.setattr(study, "ROOT", tmp_path)
    text = (tmp_path / "losses.py").read_text()
    (tmp_path / "losses.py").write_text(text.replace('"""', '"""More words. ', 1) + "\n# a comment\n")
    flags = (tmp_path / "train.py").read_text()
    for old, new in (('help="λ_sam; 0: no', 'help="weight: no'), ("expected {low} to {high}", "not {low} to {high}")):
        assert old in flags
        (tmp_path / "train.py").write_text(flags.replace(old, new))
        assert study.method_hash() == before
    (tmp_path / "train.py").write_text(flags.replace("default=0.1", "default=0.2"))
    assert study.method_hash() != before
    (tmp_path / "train.py").write_text(flags)
    (tmp_path / "losses.py").write_text(text.replace("TAU_G = 0.07", "TAU_G = 0.08"))
    assert study.method_hash() != before


# ---------------------------------------------------------------- figures


def test_a_heat_map_and_its_outline_pixel_by_pixel():
    image = figures.heat(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), 0, 1)
    assert image.size == (figures.SIDE, figures.SIDE)
    assert image.getpixel((10, 10)) == tuple(figures.RAMP[0]) and image.getpixel((10, 180)) == tuple(figures.RAMP[-1])
    assert image.getpixel((180, 180)) == image.getpixel((10, 180))  # clamped
    half = figures.SIDE // 2
    figures.outline(image, torch.tensor([[True, True], [False, False]]))
    assert image.getpixel((half // 2, half - 1)) == image.getpixel((half // 2, 0)) == figures.EDGE
    assert image.getpixel((half // 2, half)) == tuple(figures.RAMP[-1])
    assert image.getpixel((half, half // 2)) == tuple(figures.RAMP[0])  # no line between two that are both chosen


def test_the_figures_of_a_run(tmp_path, monkeypatch):
    world.write(tmp_path / "toy", train=12, val=2)
    run_inside(train, "--data-root", tmp_path / "toy", "--out-dir", tmp_path / "run", "--device", "cpu", "--workers", 0,
               "--steps", 5, "--save-every", 3, "--batch-size", 2, "--k-end", 0.2)
    chosen = []
    monkeypatch.setattr(figures, "ASSETS", tmp_path)
    monkeypatch.setattr(figures, "outline", lambda image, cells: chosen.append(int(cells.sum())))
    assert "wrote preview.png" in run_inside(figures, "--run", tmp_path / "run")[1]
    assert chosen == [256, 103, 52] * 3  # steps 0, 3 and 4: shares 1, 0.4, 0.2
    assert Image.open(tmp_path / "selection.png").size == (792, 616)
    assert Image.open(tmp_path / "words.png").size == (792, 216)


# ---------------------------------------------------------------- benchmark


@pytest.fixture(scope="module")
def vit():
    return clip.CLIP(**benchmark.VIT_B16).eval().requires_grad_(False)


def test_zegclip_costs_what_its_authors_publish(vit):
    net = benchmark.build("zegclip", vit, 20)
    found = benchmark.cost(net, 512)
    assert found["gflops"] / 2 == pytest.approx(110.4, rel=0.01)
    unused = 3 * (4 * 512 * 512 + 4 * 512 + 2 * 512)  # self-attention and its norm, in their layers but never run
    assert found["trained_m"] + unused / 1e6 == pytest.approx(13.8, abs=0.05)
    assert found["all_m"] - found["trained_m"] == pytest.approx(86.2, abs=0.1)  # ViT-B/16, frozen


def test_dense_clip_and_head_by_hand(vit):
    """Multiply-adds of ViT-B/16 at 32×32 patches, term by term."""
    N, W, D, C, K = 32 * 32, 768, 512, 256, 20

    def block(n):
        return n * W * 12 * W + 2 * n * n * W  # qkv, out, MLP's two; q·k and its product with v

    tower, image = N * 3 * 16 * 16 * W + 12 * block(N + 1) + (N + 1) * W * D, torch.rand(1, 3, 512, 512)
    dense = benchmark.gflops(benchmark.build("dense-clip", vit, K).logits, image)["Global"]
    assert dense == pytest.approx(2 * (tower + N * D * K) / 1e9, rel=1e-6)
    ours = benchmark.gflops(benchmark.build("resnet50", vit, K).logits, image)
    assert ours["ChimeraSeg.head"] == pytest.approx(2 * (N * C * W + block(N) + N * W * D) / 1e9, rel=1e-6)


def test_a_step_is_that_of_train(tiny_clip, tmp_path):
    """Loss, gradients and update of the halfway step, against the loop's own equations written out."""
    source = benchmark.drawn(tmp_path, 5, 32)
    view = data.TrainSet(source, source.recipe, 64)
    batch = [torch.stack(part) for part in zip(*(view[i, i] for i in range(3)))]
    args = train.parse(["--precision", "fp32", "--steps", "11"])
    torch.manual_seed(0)
    model = benchmark.build("small", tiny_clip, 5).train()
    start, marks, bank = [p.detach().clone() for p in model.parameters()], [], torch.randn(4, 128)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    new_bank = benchmark.step(model, tiny_clip, optimizer, batch, bank, args, torch.device("cpu"), marks.append)
    assert tuple(marks) == benchmark.PARTS[1:] and torch.equal(new_bank[3:], bank)
    moved = [p.detach().clone() for p in model.parameters()]
    for p, before in zip(model.parameters(), start):
        p.data, p.grad = before, None
    z, c = model(batch[0] / 255), train.cls_embeddings(tiny_clip, batch[2])
    labels, inside = data.split_padding(batch[1], z.shape[2:])
    k = (0.55 * inside.sum(1)).ceil().long()
    loss = (losses.cross_entropy_loss(z, model.t, labels, model.tau) + 0.2 * losses.sgd_loss(z, c, k, inside, bank)
            + 0.3 * losses.sam_loss(z, model.t, labels, model.tau))
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for p, after in zip(model.parameters(), moved):
        assert torch.allclose(p - 0.1 * p.grad if p.grad is not None else p, after, atol=1e-5)


def test_memory_is_what_is_held_and_what_comes_on_top():
    layer = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB
    with benchmark.Memory(torch.device("cpu"), layer) as peak:
        torch.ones(8 * 10**6)  # 32 MB
    assert peak.mb is None or 34 < peak.mb < 40


def test_the_command_measures_and_writes(tiny_clip_file, tmp_path):
    out = tmp_path / "cost.json"
    flags = (f"--bodies small --clip {tiny_clip_file} --crop 32 --image 40 48 --batch-size 2 --repeats 2 --workers 0 "
             f"--device cpu --classes 171 --out {out}").split()
    done = subprocess.run([sys.executable, "-m", "experiments.benchmark", *flags], cwd=study.ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert list(result["test"]) == list(result["cost"]) == ["dense-clip", "zegclip", "small"]
    assert all(found["images_per_s"] > 0 for found in result["test"].values())
    found = result["train"]["small"]
    assert tuple(found["parts"]) == benchmark.PARTS and sum(found["parts"].values()) == pytest.approx(1)
    assert found["images_per_s"] > 0 and (result["torch"], result["commit"]) == (torch.__version__, study.commit())


def test_label_of_a_peer_is_that_of_a_segmenter(tiny_clip):
    """Peers are labelled by the segmenter's own function; here one window at its own size."""
    picture = torch.randint(256, (3, 64, 64), dtype=torch.uint8)
    net = benchmark.build("dense-clip", tiny_clip, 3)
    logits = torch.nn.functional.interpolate(net.logits(picture[None] / 255), (64, 64), mode="bilinear")
    assert torch.equal(models.ChimeraSeg.label(net, picture, 64, 64, 64)[0], logits[0].argmax(0).byte())


# ---------------------------------------------------------------- CLIP alone


def test_values_are_what_attention_gives_to_a_single_token(tiny_clip):
    """Attention over one token is its value: so each patch passes through the last block alone."""
    visual, images = tiny_clip.visual, torch.rand(2, 3, 64, 64)
    x = visual.embed(images)
    for block in visual.transformer.resblocks[:-1]:
        x = block(x)
    last = visual.transformer.resblocks[-1]
    alone = x[:, 1:].flatten(0, 1)[:, None]  # (B · N, 1, W)
    want = (visual.ln_post(last(alone)) @ visual.proj).view(2, 64, -1)
    got = dense_clip.DenseCLIP(tiny_clip, values=True)(images)
    assert torch.allclose(got, want, atol=1e-5)


def test_clip_alone_is_scored_as_a_run_is(places, tiny_clip_file):
    """By hand: each window of 64 as it is, logits enlarged, argmax, one confusion matrix."""
    root, net = study.draw(0, {}), dense_clip.DenseCLIP(clip.load(tiny_clip_file), values=True)
    net.t, hit, union = models.text_embeddings(clip.load(tiny_clip_file), world.CLASSES, world.TEMPLATES), 0, 0
    for name in (root / "val.txt").read_text().split():
        image, truth = (torch.from_numpy(np.array(Image.open(root / part / f"{name}.png"))) for part in
                        ("images", "masks"))
        logits = net.logits(image.permute(2, 0, 1)[None] / 255)
        labels = torch.nn.functional.interpolate(logits, (64, 64), mode="bilinear")[0].argmax(0)
        labels, truth = (torch.nn.functional.one_hot(x[truth != losses.IGNORE].long(), 28) for x in (labels, truth))
        hit, union = hit + (labels & truth).sum(0), union + (labels | truth).sum(0)
    iou = {name: 100 * (h / u).item() for name, h, u in zip(world.CLASSES, hit, union) if u}
    unseen = statistics.mean(iou[name] for name in world.unseen(0) if name in iou)
    status, text, words = run_inside(dense_clip, "--data-root", root, "--clip", tiny_clip_file, "--values")
    assert status == 0 and re.search(rf"mIoU unseen +{unseen:.1f}\n", text), words + text
