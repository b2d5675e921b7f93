"""The controlled comparison on the embedded default: every row trained with several seeds by train.py's own main.

    python -m experiments.study                     # every row, 3 seeds, the main rows first; finished runs are not run again
    python -m experiments.study --rows full linear  # some rows
    python -m experiments.study --rows full linear --world 1   # another world: other scenes, other unseen classes
    python -m experiments.study --render            # only write results/toy.md and toy.png from results/toy.jsonl

A finished run is a line of results/toy.jsonl, so the study can be done in several goes and on several machines, all in
PRECISION. CRITERIA were written down before these runs, but for the last one, which came after its first seed; the two
before it had held on world 0 in an earlier study in fp32. results/toy.md says of each whether it holds.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageDraw

from support import command as guard
import losses
import model as models
from support import pictures
import sources
import train
from toy import world
from experiments.diagnose import Probe

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "toy.jsonl"
PRECISION = "bf16"  # of every run; where the CPU has no such instructions it is emulated

SEG_ONLY = ["--sgd-weight", "0", "--sam-weight", "0"]
CONSTANT = ["--k-schedule", "constant", "--k-end"]
# one-sided 95 % points of Student's t, by the number of values in a mean
T95 = {2: 6.31, 3: 2.92, 4: 2.35, 5: 2.13, 6: 2.02, 7: 1.94, 8: 1.89, 9: 1.86, 10: 1.83}
MAIN = {  # row: (what it is, flags of train.py); the default, then it without a part or with another one
    "full": ("the default: CSH, n = 1, SGD and SAM", []),
    "seg": ("segmentation loss alone", SEG_ONLY),
    "linear": ("control: linear projection behind the same adapter and LayerNorm", ["--head", "linear"]),
    "linear-seg": ("the same control, segmentation loss alone", ["--head", "linear", *SEG_ONLY]),
    "random": ("control: frozen random weights of CSH's shape", ["--head", "random"]),
    "all-k": ("k = N throughout: every position distilled", [*CONSTANT, "1"]),
    "no-sgd": ("without SGD", ["--sgd-weight", "0"]),
    "no-sam": ("without SAM", ["--sam-weight", "0"]),
}
ROWS = MAIN | {
    "linear-plain": ("the linear control without the LayerNorm", ["--head", "linear"]),
    "linear-plain-seg": ("the same, segmentation loss alone", ["--head", "linear", *SEG_ONLY]),
    "unfrozen": ("CSH with its CLIP part trained", []),
    "n0": ("n = 0: adapter, ln_post and proj only", ["--frozen-blocks", "0"]),
    "n2": ("n = 2", ["--frozen-blocks", "2"]),
    "n4": ("n = 4: all blocks of the tiny CLIP", ["--frozen-blocks", "4"]),
    "attention-vv": ("attention between like values", ["--attention", "vv"]),
    "attention-self": ("each token attends to itself", ["--attention", "self"]),
    "positional": ("CLIP's positions added to the tokens", []),
    "gain-1": ("tokens enter the frozen block at unit scale", []),
    "fixed-k-0.4": ("k = 0.4 N throughout", [*CONSTANT, "0.4"]),
    "fixed-k-0.1": ("k = 0.1 N throughout", [*CONSTANT, "0.1"]),
    "k-end-0.4": ("k falls to 0.4 N", ["--k-end", "0.4"]),
    "k-end-0.03": ("k falls to 0.03 N", ["--k-end", "0.03"]),
    "k-cosine": ("k falls along a cosine", ["--k-schedule", "cosine"]),
    "random-k": ("k positions at random, not the most similar", []),
    "per-feature": ("1 − cosine of each of the k features, no contrast; about 1/τ_g = 14 times less gradient", []),
    "no-bank": ("no bank of earlier CLS embeddings", []),
    "sam-bce": ("SAM by binary cross-entropy, same τ, no bias", []),
    "nel": ("focal + dice instead of cross-entropy, same τ, no bias", ["--seg-loss", "nel"]),
    "tau-0.07": ("τ = 0.07 instead of CLIP's own", ["--temperature", "0.07"]),
    "sgd-0.5": ("λ_sgd = 0.5", ["--sgd-weight", "0.5"]),
    "sgd-1": ("λ_sgd = 1", ["--sgd-weight", "1"]),
    "strict": ("images that hold unseen classes dropped", ["--strict"]),
}
CRITERIA = (  # (what the paper's claim asks for here, row above, row below, score, by how many points)
    ("the method beats a linear head with the segmentation loss alone", "full", "linear-seg", "mIoU_unseen", 20),
    ("selecting features beats distilling all", "full", "all-k", "mIoU_unseen", 5),
    ("a part of CLIP beats a linear projection", "full", "linear", "hIoU", 0),
    ("CLIP's part beats random frozen weights", "full", "random", "hIoU", 0),
    ("the most similar positions beat as many random ones", "full", "random-k", "mIoU_unseen", 0),
)


# ---------------------------------------------------------------- rows that no flag of train.py makes


def of_built(change):
    """A change of the model that train.py has built."""
    build = models.build

    def changed(*args, **config):
        model = build(*args, **config)
        change(model)
        return model
    models.build = changed


def random_selection():
    select = losses.select
    losses.select = lambda a, *args: select(torch.rand_like(a), *args)


def per_feature_loss(z, c, k, bank=None, tau=None, inside=None):
    a = torch.einsum("bdn,bd->bn", z.flatten(2), c)
    chosen = losses.select(a.detach(), k, inside)
    return 1 - (a * chosen).sum() / chosen.sum()


def without_norm(_):
    of_built(lambda model: setattr(model.head.adapter, "norm", torch.nn.Identity()))


VARIANTS = {  # row: what it does before train.main(args)
    "positional": lambda args: setattr(args, "positional", True),  # saved with the run's settings
    "linear-plain": without_norm,
    "linear-plain-seg": without_norm,
    "unfrozen": lambda _: of_built(lambda model: model.head.clip.requires_grad_(True)),
    "gain-1": lambda _: of_built(lambda model: torch.nn.init.ones_(model.head.adapter.norm.weight)),
    "no-bank": lambda _: setattr(losses, "BANK", 0),
    "random-k": lambda _: random_selection(),
    "per-feature": lambda _: setattr(losses, "sgd_loss", per_feature_loss),
    "sam-bce": lambda _: setattr(losses, "sam_loss", partial(losses.sam_loss, kind="bce")),
}


# ---------------------------------------------------------------- running


def finished():
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    runs = [(line["row"], line["world"], line["seed"]) for line in lines]
    if len(set(runs)) < len(runs) or any(line["precision"] != PRECISION for line in lines):
        sys.exit(f"error: {RESULTS} has a run twice, or one in another precision than {PRECISION}: take it out")
    first = {}  # row: the settings of its first run that noted them
    for line in lines:
        if (settings := line.get("settings")) and first.setdefault(line["row"], settings) != settings:
            differ = sorted({key for key, _ in settings.items() ^ first[line["row"]].items()})
            sys.exit(f"error: {RESULTS} has runs of {line['row']} that differ in {', '.join(differ)}: take out those "
                     "of the former defaults")
    return lines


def run(row, world_seed, seed, steps):
    """One run of train.py in a process of one thread -> its line for results/toy.jsonl, which a trial does not get."""
    out = ROOT / "runs" / "study" / f"{row}-world{world_seed}-seed{seed}{'-trial' * bool(steps)}"
    (out / "metrics.json").unlink(missing_ok=True)
    flags = [*ROWS[row][1], *(["--data-root", f"data/toy-{world_seed}"] if world_seed else []), "--seed", str(seed)]
    flags += ["--steps", str(steps)] if steps else []
    place = ["--out-dir", str(out), "--workers", "0", "--device", "cpu", "--precision", PRECISION]
    git = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True)
    commit = git(["git", "rev-parse", "--short", "HEAD"]).stdout.strip()
    commit += " and changes" if git(["git", "status", "--porcelain", "--", "*.py"]).stdout else ""
    start = time.time()
    done = subprocess.run([sys.executable, "-m", "experiments.study", "--train", row, *flags, *place], cwd=ROOT, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    program = f"-m experiments.study --train {row}" if row in VARIANTS else "train.py"
    command = " ".join(["python", program, *flags])
    if done.returncode or not (out / "metrics.json").exists():
        raise RuntimeError(f"{command} did not finish:\n{done.stdout[-300:]}{done.stderr}")
    result = json.loads((out / "metrics.json").read_text())
    keep = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU")
    config = json.loads((out / "config.json").read_text())
    settings = {key: config[key] for key in vars(train.parse([])) if key in config and key not in ("seed", "data_root")}
    line = {"row": row, "world": world_seed, "seed": seed, "command": command, "commit": commit,
            "precision": PRECISION, "settings": settings, "seconds": round(time.time() - start),
            "gamma_0": {k: round(result["gamma_0"][k], 2) for k in keep},
            "calibrated": {k: round(result["calibrated"][k], 2) for k in (*keep, "gamma")},
            "IoU": {name: round(result["gamma_0"]["IoU"][name], 1) for name in world.unseen(world_seed)},
            "probe": [json.loads(entry) for entry in (out / "probe.jsonl").read_text().splitlines()]}
    if not steps:
        with open(RESULTS, "a") as file:
            file.write(json.dumps(line) + "\n")
    return line


def train_row(row, argv):
    """What `run` starts: train.py's main with the row's variant, watched by a probe, which changes nothing."""
    args = train.parse(argv)
    if row in VARIANTS:
        VARIANTS[row](args)
    Probe(args).watch()
    guard.run_command(train.main, lambda: args)


# ---------------------------------------------------------------- tables


def mean_std(values, sign=""):
    return f"{statistics.mean(values):{sign}.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")


def runs_of(lines, row, world_seed):
    return [line for line in lines if (line["row"], line["world"]) == (row, world_seed)]


def score_of(run, key):
    """At γ = 0; of one of world.unseen_kinds its mean IoU."""
    if key in run["gamma_0"]:
        return run["gamma_0"][key]
    return statistics.mean(run["IoU"][name] for name in world.unseen_kinds(run["world"])[key])


def scores(lines, row, world_seed, key):
    """{seed: score}"""
    return {run["seed"]: score_of(run, key) for run in runs_of(lines, row, world_seed)}


def differences(lines, above, below, world_seed, key):
    """[score of row above − score of row below], one for each seed that both have"""
    high, low = scores(lines, above, world_seed, key), scores(lines, below, world_seed, key)
    return [high[seed] - low[seed] for seed in sorted(high.keys() & low.keys())]


def world_gains(lines, above, below, key):
    """[mean of those differences], one for each world that has any"""
    worlds = sorted({line["world"] for line in lines})
    return [statistics.mean(each) for w in worlds if (each := differences(lines, above, below, w, key))]


def verdict(gains, least):
    """Gains, one a seed or one a world -> in a word, by a one-sided t test at 95 % that their mean is `least`."""
    gain, t = statistics.mean(gains), T95.get(len(gains), T95[10])  # of more values: a little too strict
    if len(gains) < 2 or abs(gain - least) < t * statistics.stdev(gains) / len(gains) ** 0.5:
        return "undecided"
    return "holds" if gain > least else "**does not hold**"


def judged(gains, least):
    """Cells of a criterion: measured, how often, verdict"""
    return f"{mean_std(gains, sign='+')} | {len(gains)} | {verdict(gains, least)}"


def ahead(gains):
    """Scores of full − those of a row, by how much the default is the better choice; bold where a t test can tell."""
    cell = mean_std(gains, sign="+")
    return cell if verdict(gains, 0) == "undecided" else f"**{cell}**"


def render(lines):
    """results/toy.jsonl -> results/toy.md, tables of mean ± standard deviation over seeds, and toy.png."""
    text = ["# The embedded default under controls", "",
            "mIoU in percent over all classes together, γ = 0 unless it says calibrated; mean ± std over n seeds. "
            f"All in {PRECISION}, one thread. Written by `python -m experiments.study`. Holds, does not hold: by a one-sided t "
            "test at 95 % over the n differences.", "",
            "Unseen taken for seen: share of unseen dense positions labelled as a seen class, on 100 of the test "
            "images just before the last step. Differences are of the same seeds; full − row is bold where such a "
            "test tells it from 0, upwards or downwards (by chance alone in one row of ten).", ""]
    for world_seed in sorted({line["world"] for line in lines}):
        drawn = f" (`python -m toy.world --root data/toy-{world_seed} --seed {world_seed}`)" * bool(world_seed)
        text += [f"## World {world_seed}", "", f"Unseen: {', '.join(world.unseen(world_seed))}{drawn}.", "",
                 "| row | what | n | seen | unseen | hIoU | full − row, hIoU | hIoU, calibrated | unseen taken for "
                 "seen, % | command | commit |", "|---" * 11 + "|"]
        for row, (what, _) in ROWS.items():
            if runs := runs_of(lines, row, world_seed):
                command = runs[0]["command"].replace(f" --seed {runs[0]['seed']}", "")
                cells = [mean_std([r["gamma_0"][key] for r in runs]) for key in ("mIoU_seen", "mIoU_unseen", "hIoU")]
                gains = differences(lines, "full", row, world_seed, "hIoU")
                cells += [ahead(gains) if gains and row != "full" else "–",
                          mean_std([r["calibrated"]["hIoU"] for r in runs]),
                          mean_std([r["probe"][-1]["unseen_as_seen"] for r in runs])]
                commits = ", ".join(sorted({line["commit"] for line in runs}))
                text.append(f"| {' | '.join([row, what, str(len(runs)), *cells, f'`{command}`', commits])} |")
        text += ["", "| criterion | asked | measured | n | |", "|---|---|---|---|---|"]
        for what, above, below, key, least in CRITERIA:
            if gains := differences(lines, above, below, world_seed, key):
                text.append(f"| {what}: {key} of {above} − {below} | > {least} | {judged(gains, least)} |")
        order = sorted((row for row in MAIN if scores(lines, row, world_seed, "hIoU")),
                       key=lambda row: -statistics.mean(scores(lines, row, world_seed, "hIoU").values()))
        names = world.unseen(world_seed)
        text += ["", f"Main rows by hIoU: {' > '.join(order)}.", "", "IoU of each unseen class, mean over seeds:", "",
                 f"| row | {' | '.join(names)} |", "|---" * (1 + len(names)) + "|"]
        for row in ROWS:
            if runs := runs_of(lines, row, world_seed):
                cells = [f"{statistics.mean(run['IoU'][name] for run in runs):.0f}" for name in names]
                text.append(f"| {row} | {' | '.join(cells)} |")
        text.append("")
    text += over_worlds(lines) + probe_table(lines)
    (RESULTS.parent / "toy.md").write_text("\n".join(text) + "\n")
    plot(lines).save(RESULTS.parent / "toy.png")


def over_worlds(lines):
    """Rows that ran in several worlds side by side, and the criteria with each world's mean gain counted once."""
    worlds = sorted({line["world"] for line in lines})
    text = ["## Over worlds", "", "hIoU, mean of n seeds. Each world has other scenes and other unseen classes.", "",
            f"| row | {' | '.join(f'world {w}' for w in worlds)} | mean of worlds |", "|---" * (2 + len(worlds)) + "|"]
    for row in ROWS:
        each = {w: list(scores(lines, row, w, "hIoU").values()) for w in worlds}
        if sum(map(bool, each.values())) > 1:
            cells = [f"{statistics.mean(each[w]):.1f} (n {len(each[w])})" if each[w] else "–" for w in worlds]
            cells.append(mean_std([statistics.mean(v) for v in each.values()]) if all(each.values()) else "–")
            text.append(f"| {row} | {' | '.join(cells)} |")
    text += ["", "Differences of the same seeds, each world's mean counted once, ± over worlds. World 0 is where "
             "settings were chosen; the others are the cleaner test.", "",
             "| criterion | asked | all worlds | n | | without world 0 | n | |", "|---" * 8 + "|"]
    others = [line for line in lines if line["world"]]
    for what, above, below, key, least in CRITERIA:
        gains, elsewhere = (world_gains(some, above, below, key) for some in (lines, others))
        if len(gains) > 1:
            text.append(f"| {what}: {key} of {above} − {below} | > {least} | {judged(gains, least)} | "
                        f"{judged(elsewhere, least)} |")
    keys = ("hIoU", "mIoU_seen", *world.unseen_kinds())
    text += ["", "full − row without world 0, counted in the same way; the last three in mean IoU of unseen classes by "
             "what is new of them: a word that no mask has (the 4 things of one colour), a pair of known words (4 "
             "things), a ground. Bold where the t test tells it from 0 (by chance in one cell of ten). The kinds were "
             "thought of after the runs.", "",
             f"| row | worlds | {' | '.join(keys)} |", "|---" * (2 + len(keys)) + "|"]
    for row in list(ROWS)[1:]:  # all but full
        gains = [world_gains(others, "full", row, key) for key in keys]
        if len(gains[0]) > 1:
            text.append(f"| {row} | {len(gains[0])} | {' | '.join(map(ahead, gains))} |")
    return [*text, ""]


def probe_table(lines):
    """Where the k most similar positions fall and where dense features point, as training goes on."""
    text = ["## What is selected, and where dense features point", "",
            "100 test images of world 0, means over seeds. Of the k positions most similar to the CLS token: share on "
            "things and grounds, seen and unseen, in percent. Lift: that of unseen things over their share of all "
            "positions. Cosine: of dense features to their own class's text.", "",
            "| row | step | k | unseen things | lift | seen things | unseen ground | seen grounds | cosine, seen | "
            "cosine, unseen | unseen taken for seen, % |", "|---" * 11 + "|"]
    for row in ROWS:
        for entries in zip(*(run["probe"] for run in runs_of(lines, row, 0))):
            mean = {key: statistics.mean(entry[key] for entry in entries) for key in entries[0]}
            text.append(f"| {row} | {mean['step']:.0f} | {mean['k']:.0f} | {mean['unseen_things']:.1f} | "
                        f"{mean['unseen_things'] / mean['all_unseen_things']:.2f} | {mean['seen_things']:.1f} | "
                        f"{mean['unseen_grounds']:.1f} | {mean['seen_grounds']:.1f} | {mean['cosine_seen']:.2f} | "
                        f"{mean['cosine_unseen']:.2f} | {mean['unseen_as_seen']:.1f} |")
    return text


def plot(lines):
    """A bar a row of world 0: seen, unseen and hIoU, with a mark of ± std."""
    rows = [row for row in ROWS if scores(lines, row, 0, "hIoU")]
    left, wide, high = 150, 520, 46  # pixels: names, 100 %, a row
    canvas = Image.new("RGB", (left + wide + 20, high * len(rows) + 50), "white")
    pen = ImageDraw.Draw(canvas)
    for share in range(0, 101, 20):
        x = left + wide * share / 100
        pen.line((x, 30, x, canvas.height - 12), fill="lightgrey")
        pictures.write(pen, (x, 12), f"{share} %", 12, fill="black", anchor="mt")
    for i, row in enumerate(rows):
        top = 34 + high * i
        pictures.write(pen, (left - 8, top + 18), row, 13, fill="black", anchor="rm")
        for j, (key, colour) in enumerate(zip(("mIoU_seen", "mIoU_unseen", "hIoU"), pictures.LINES)):
            values = list(scores(lines, row, 0, key).values())
            mean, std = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0
            y, x = top + 12 * j, left + wide * mean / 100
            pen.rectangle((left, y, x, y + 9), fill=colour)
            pen.line((x - wide * std / 100, y + 4, x + wide * std / 100, y + 4), fill="black", width=2)
    for j, (name, colour) in enumerate(zip(("seen", "unseen", "hIoU"), pictures.LINES)):
        pictures.write(pen, (8 + 48 * j, 12), name, 13, fill=colour)
    return canvas


def main(args):
    RESULTS.parent.mkdir(exist_ok=True)
    root = ROOT / (f"data/toy-{args.world}" if args.world else world.ROOT)
    if not root.exists() and not args.render:
        world.write(root, args.world)
    if root.exists() and sources.read_lines(root / "unseen.txt") != world.unseen(args.world):
        sys.exit(f"error: {root} is not world {args.world}: its unseen classes are others; take it away")
    have = {(line["row"], line["seed"]) for line in finished() if line["world"] == args.world and not args.steps}
    jobs = [(row, seed) for rows in (MAIN, ROWS.keys() - MAIN.keys()) for seed in range(args.seeds)
            for row in args.rows if row in rows and (row, seed) not in have]
    if not args.render:
        start = time.time()
        with ThreadPoolExecutor(args.jobs) as pool:
            todo = pool.map(lambda job: run(job[0], args.world, job[1], args.steps), jobs)
            for done, line in enumerate(todo, 1):
                left = (time.time() - start) / done * (len(jobs) - done) / 60
                score = line["gamma_0"]
                print(f"{done}/{len(jobs)}  {line['row']:<18} seed {line['seed']}  seen {score['mIoU_seen']:5.1f}  "
                      f"unseen {score['mIoU_unseen']:5.1f}  hIoU {score['hIoU']:5.1f}  {left:.0f} min left", flush=True)
    if lines := finished():
        render(lines)
        print(f"wrote {RESULTS.parent / 'toy.md'} and toy.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:  # one run, as the study makes it
        train_row(sys.argv[2], sys.argv[3:])
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, choices=range(1, 11), metavar="N",
                        help="0 to N − 1 of each row (default: %(default)s)")
    parser.add_argument("--world", type=int, default=0, metavar="SEED", help="of scenes and unseen classes (0)")
    parser.add_argument("--steps", type=int, help="a trial: printed, not kept (default: the recipe's number)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only render what is there")
    main(parser.parse_args())
