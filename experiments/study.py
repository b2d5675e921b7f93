"""The ablation on the toy data set: train.py with and without each part, on eight worlds.

    python -m experiments.study                    # all rows on worlds 0 to 7; goes on where it was interrupted
    python -m experiments.study --report           # docs/results.md and .png and README's table, from what is there
    python -m experiments.study --worlds 8 9 10 --rows full "full --sgd-weight 0.5"    # a search: table on the screen

A row is a name of ROWS. Flags of train.py may follow it, and images=N: the first N training images alone. Worlds, other
scenes and unseen classes, from 8 on are for choosing settings: no report has them. A run is a process of one thread on
a CPU, and a line of experiments/results/study.jsonl, which names the last commit that touched the product.
"""
import argparse
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import numpy as np
from PIL import Image, ImageDraw

from sources.files import read_lines
from support import UserError, pictures
from support.checkpoint import atomic
from support.command import run_command
from toy import world

ROWS = {  # name: (what it is, its command)
    "full": ("L_seg, SGD and SAM: the defaults", "train.py"),
    "seg": ("L_seg alone", "train.py --sgd-weight 0 --sam-weight 0"),
    "seg-sam": ("without SGD", "train.py --sgd-weight 0"),
    "seg-sgd": ("without SAM", "train.py --sam-weight 0"),
    "all-k": ("SGD on all positions throughout", "train.py --k-end 1"),
    "low-k": ("SGD on the fewest positions throughout", "-c 'import losses, train; k_at = losses.k_at; "
              "losses.k_at = lambda step, steps, *more: k_at(steps - 1, steps, *more); train.main(train.parse())'"),
    "student": ("the student's own features select", "train.py --select student"),
    "linear": ("a trained linear layer in the place of CLIP's part", "train.py --head linear"),
    "random": ("CLIP's part with random frozen weights", "train.py --head random"),
    "values": ("no attention in CLIP's frozen block", "train.py --head-attention values"),
    "strict": ("without the training images that show unseen classes", "train.py --strict"),
    "all-seen": ("full supervision, `unseen.txt` is empty; means of the same classes", "train.py"),
    "clip": ("CLIP alone, with its own attention", "-m experiments.dense_clip --attention clip"),
    "clip-values": ("CLIP alone, without attention in its last block", "-m experiments.dense_clip --attention values"),
}
SEEDS = ["full --seed 1", "full --seed 2"]  # the noise of a run, on world 0 alone
DEFAULT = [*ROWS, *(f"{name} images={n}" for n in (100, 1000) for name in ("full", "linear", "random"))]
README_ROWS = ["full", "seg", "seg-sam", "seg-sgd", "all-k", "student", "linear", "random", "all-seen", "clip-values"]
REPORTED = list(range(8))  # worlds
ROOT = Path(__file__).parent.parent
DATA, RESULTS = ROOT / "data", ROOT / "experiments/results/study.jsonl"
REPORT, README = ROOT / "docs/results.md", ROOT / "README.md"
NO_PRODUCT = ("tests", "docs", "assets", "experiments/results", "experiments/study.py", "*.md", ".*",
              "CITATION.cff", "LICENSE")
SCORES = ("seen", "unseen", "hIoU")
# Student's t: 95 % of the values lie between -t and t, by the number of values in the mean
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228, 12: 2.201}
MARK = "<!-- below: python -m experiments.study --report -->"  # what stands above it in the report is kept
TABLE = re.compile("(<!-- table: .*? -->\n).*?(<!-- end -->)", re.DOTALL)  # README's


# ---------------------------------------------------------------- runs


def product():
    """The last commit that touched the product, " and changes" behind it if some are not committed; "" without git."""
    def git(*words):
        paths = ["--", ".", *(f":(exclude){path}" for path in NO_PRODUCT)]
        return subprocess.run(["git", *words, *paths], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git("log", "-1", "--format=%h", "--abbrev=7") + " and changes" * bool(git("diff", "HEAD", "--name-only"))


def draw(seed, row):
    """Folder of world `seed`, with the row's change of its lists. It is drawn where it is missing."""
    root = DATA / (f"toy-{seed}" if seed else "toy")
    if not root.exists():
        world.write(root, seed)
    first, there = world.draw(np.random.RandomState(seed))[0], Image.open(root / "images/train_00000.png")
    if read_lines(root / "unseen.txt") != world.unseen(seed) or not np.array_equal(first, there):
        raise UserError(f"{root} is not world {seed} as it is drawn now: delete it")
    if not (change := re.search(r"images=(\d+)|^all-seen", row)):
        return root
    changed, other = DATA / f"toy-{seed}-{change[0]}", "train.txt" if change[1] else "unseen.txt"
    shutil.rmtree(changed, ignore_errors=True)
    changed.mkdir()
    for name in {"images", "masks", "train.txt", "val.txt", "classes.txt", "unseen.txt"} - {other}:
        (changed / name).symlink_to((root / name).resolve())
    lines = read_lines(root / other)[:int(change[1] or 0)]
    (changed / other).write_text("".join(f"{line}\n" for line in lines))
    return changed


def command(row, folder):
    """The words behind `python` of a row's run on this data."""
    name, *flags = [word for word in shlex.split(row) if not word.startswith("images=")]
    if name not in ROWS:
        raise UserError(f"no row {name!r}: choose {', '.join(ROWS)}")
    loader = [] if name.startswith("clip") else ["--workers", "0"]
    data = ["--data-root", os.path.relpath(folder, ROOT), "--device", "cpu", *loader]
    return [*shlex.split(ROWS[name][1]), *flags, *data]


def run(row, seed, words, commit):
    """One run, whose line is written into RESULTS."""
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run([sys.executable, *words, "--out-dir", f"{folder}/run"], cwd=ROOT, text=True,
                              env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        if done.returncode:
            raise UserError(f"python {shlex.join(words)} did not finish: {done.stderr.strip()[-300:]}")
        result = json.loads(Path(folder, "run/metrics.json").read_text())
    if product() != commit:
        raise UserError(f"the product was changed during a run of {row}, whose result is not kept: start again")
    line = {"row": row, "world": seed, "commit": commit, "device": f"CPU, {result['precision']}",
            "command": shlex.join(["python", *words]), "seconds": round(time.time() - start),
            **scores(result["gamma_0"]["IoU"], world.unseen(seed))}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{row:<28} world {seed:2d}  " + "  ".join(f"{key} {line[key]:5.1f}" for key in SCORES), flush=True)


def scores(iou, unseen):
    """{class: IoU} -> means over the world's seen and unseen classes, hIoU: also where no class was unseen."""
    s, u = (mean(value for name, value in iou.items() if value is not None and (name in unseen) == which)
            for which in (False, True))
    return {"seen": round(s, 2), "unseen": round(u, 2), "hIoU": round(2 * s * u / ((s + u) or 1), 2)}


def finished():
    """The lines of all runs."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


# ---------------------------------------------------------------- report


def gain(lines, row, score="hIoU"):
    """full − row in this score, of `full` with the same words behind its name, paired by world -> mean, half the width
    of its 95 % interval (0 of one world); None of full itself or where no world has both."""
    name, more = re.match(r"(\S+)(.*)", row).groups()
    full, other = ({line["world"]: line[score] for line in lines if line["row"] == which}
                   for which in ("full" if name == "full" else f"full{more}", row))
    if row == "full" or not (values := [full[w] - other[w] for w in full.keys() & other]):
        return None
    half = T95.get(len(values), T95[12]) * stdev(values) / len(values)**0.5 if len(values) > 1 else 0
    return mean(values), half


def table(lines, rows):
    """These rows, as far as they have lines, in Markdown."""
    text = ["| row | worlds | seen | unseen | hIoU | full − row, hIoU | `python` … |", "|" + " --- |" * 7]
    for row in rows:
        if found := [line for line in lines if line["row"] == row]:
            name = f"`{row}`: {ROWS[row][0]}" if row in ROWS else f"`{row}`"
            command, *rest = found[0]["command"].removeprefix("python ").split(" --data-root")[0].split("\n")
            columns = [[line[key] for line in found] for key in SCORES]
            cells = [f"{mean(c):.1f}" + (f" ± {stdev(c):.1f}" if len(c) > 1 else "") for c in columns]
            text.append(f"| {name} | {len(found)} | {' | '.join(cells)} | {with_interval(gain(lines, row))} | "
                        f"`{command}{' …' * bool(rest)}` |")
    return "\n".join(text)


def with_interval(found):
    """What `gain` gives -> text, bold where 0 lies outside of the interval."""
    if not found:
        return ""
    middle, half = found
    text = f"{middle:+.1f}" + f" [{middle - half:+.1f}, {middle + half:+.1f}]" * (half > 0)
    return f"**{text}**" if abs(middle) > half > 0 else text


def rows_of(lines):
    """Those that have lines, in the order of DEFAULT and SEEDS."""
    return sorted({line["row"] for line in lines}, key=lambda row: ([*DEFAULT, *SEEDS, row].index(row), row))


def report(lines, left_out):
    """-> Markdown: the rows that README does not have, a plot of all. left_out: how many lines are of other commits"""
    rows = [row for row in rows_of(lines) if row not in README_ROWS]
    devices, hours = sorted({line["device"] for line in lines}), sum(line["seconds"] for line in lines) / 3600
    return (f"Commit {lines[-1]['commit']}{f' ({left_out} lines of others are left out)' * bool(left_out)}, "
            f"{' and '.join(devices)}, {len(lines)} runs of one thread, {hours:.1f} hours in all.\n\n"
            f"{table(lines, rows)}\n\n![full − row in hIoU]({REPORT.stem}.png)\n")


def plot(lines):
    """full − row in hIoU: for each row a point, and a bar for its 95 % interval."""
    rows = {row: found for row in rows_of(lines) if (found := gain(lines, row))}
    low = min([0, *(10 * math.floor((middle - half) / 10) for middle, half in rows.values())])
    high = max([10, *(10 * math.ceil((middle + half) / 10) for middle, half in rows.values())])
    place = lambda value: 150 + 650 * (value - low) / (high - low)  # noqa: E731  pixels from the left
    canvas = Image.new("RGB", (820, 60 + 26 * len(rows)), "white")
    pen = ImageDraw.Draw(canvas)
    pictures.write(pen, (150, 4), "full minus row, hIoU, with its 95 % interval (right of 0: full is better)", 14)
    for number in range(low, high + 1, 10):
        pen.line((place(number), 46, place(number), canvas.height - 8), fill="lightgrey" if number else "black")
        pictures.write(pen, (place(number), 28), str(number), 12, anchor="mt")
    for y, (row, (middle, half)) in zip(range(60, canvas.height, 26), rows.items()):
        pictures.write(pen, (140, y), row[:20], 14, anchor="rm")
        pen.line((place(middle - half), y, place(middle + half), y), fill=pictures.LINES[1], width=3)
        pen.ellipse((place(middle) - 4, y - 4, place(middle) + 4, y + 4), fill=pictures.LINES[0])
    return canvas


def main(args):
    if not args.report:
        commit = product()
        if not commit or " " in commit:
            raise UserError(f"the product is at {commit or 'no commit'}: commit them, or use a clean `git worktree`, "
                            "as a line names the commit at which its run can be repeated")
        have = {(line["row"], line["world"]) for line in finished() if line["commit"] == commit}
        jobs = [(row, w, command(row, draw(w, row)), commit) for w in args.worlds
                for row in args.rows or (DEFAULT if w else [*DEFAULT, *SEEDS]) if (row, w) not in have]
        print(f"{len(jobs)} runs to go", flush=True)
        RESULTS.parent.mkdir(exist_ok=True)
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: run(*job), jobs))
    every = [line for line in finished() if line["world"] in args.worlds]
    lines = [line for line in every if line["commit"] == every[-1]["commit"]]
    if args.worlds != REPORTED or not lines:
        print(table(lines, rows_of(lines)))
        return
    text, readme = report(lines, len(every) - len(lines)), table(lines, README_ROWS)
    atomic(REPORT, lambda path: path.write_text(f"{REPORT.read_text().split(MARK)[0]}{MARK}\n\n{text}"))
    pictures.save(plot(lines), REPORT.with_suffix(".png"))
    whole = TABLE.sub(lambda part: f"{part[1]}{readme}\n{part[2]}", README.read_text())
    atomic(README, lambda path: path.write_text(whole))
    print(f"wrote {REPORT} and {REPORT.stem}.png, and the table of {README.name}")


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", metavar="ROW", help=f"{', '.join(ROWS)} (default: these "
                        "and, with images=100 and images=1000, full, linear, random; on world 0 full --seed 1 and 2)")
    parser.add_argument("--worlds", nargs="+", type=int, default=REPORTED, metavar="N", help="(default: 0 to 7)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="run nothing, only report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
