"""The controlled comparison on the toy data set: train.py with and without a part, on several worlds.

    python -m experiments.study                                     # README's table: its rows on worlds 0 to 7
    python -m experiments.study --jobs 16                           # on a GPU and 16 cores (H200: 7 runs a minute)
    python -m experiments.study --rows "full --steps 300" "linear --steps 300"                  # shorter runs
    python -m experiments.study --worlds 0 --seeds 0 1 2 --rows full                            # the noise of a run
    python -m experiments.study --worlds 8 9 10 11 --rows "full --steps 300" "full --steps 300 --k-end 1" # a search
    python -m experiments.study --worlds 0 1 --rows "full images=250" "linear images=250"       # a hypothesis
    python -m experiments.study --report      # docs/results.md and .png and README's table, from what is there

To run rows of your own, first move experiments/results/study.jsonl away: its lines are of older commits and one GPU.

A row is a name of ROWS. It may be followed by flags of train.py and changes of the data: images=N keeps the first N
training images, seen=N keeps N seen classes and makes all others unseen. `frozen-body`: the body is that of the row
linear-seg with the same data and steps, and learns no more. Each world has other scenes and other unseen classes;
world N is in data/toy-N (0 in data/toy) and is drawn if it is missing.
Each run is a process of one thread, on the GPU if there is one; two run at a time. A finished run is a line of
experiments/results/study.jsonl, so the study goes on where it was interrupted. Rows with the same world and number of
steps are compared. They must have the same METHOD files (ignoring comments), precision and device: others are refused.
"""
import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import numpy as np
import torch
from PIL import Image, ImageDraw

from sources.files import read_lines
from support import UserError, pictures
from support.checkpoint import atomic
from support.command import run_command
from toy import world

PINNED = ["--sam-weight", "1"]  # λ_sam was 1 when README's table was run; the search then found the default, 0.3
ROWS = {  # name: (what it is, flags of train.py); a flag that comes later wins
    "full": ("CSH, SGD, SAM", PINNED),
    "linear": ("a trained linear layer in the place of CLIP's part; same adapter, LayerNorm and losses",
               [*PINNED, "--head", "linear"]),
    "linear-seg": ("the same with L_seg alone", ["--head", "linear", "--sgd-weight", "0", "--sam-weight", "0"]),
    "random": ("CSH's shape with random frozen weights", [*PINNED, "--head", "random"]),
    "all-k": ("SGD distils all positions throughout", [*PINNED, "--k-end", "1"]),
}
README_ROWS = {**{name: what for name, (what, _) in ROWS.items()},
               "full --strict": "`full` without the training images that show unseen classes",
               "linear --strict": "`linear` without them, against `full --strict`",
               "full images=100 --steps 300": "`full` with 100 training images, against `full --steps 300`",
               "random images=100 --steps 300": "`random` with 100 training images, against `full` with these"}
ROOT = Path(__file__).parent.parent
DATA, RUNS = ROOT / "data", ROOT / "runs/study"
RESULTS, REPORT, README = ROOT / "experiments/results/study.jsonl", ROOT / "docs/results.md", ROOT / "README.md"
METHOD = ("train.py", "evaluate.py", "model.py", "clip_head.py", "losses.py", "data.py", "bodies/small.py",
          "clip/model.py", "clip/tokenizer.py", "sources/toy.py", "toy/world.py", "toy/sprites.py", "toy/sprites.txt",
          "toy/sprites.png", "toy/clip.pt")  # what the scores depend on
SHOWN = ("table", "preview", "report")  # of evaluate.py: what people see of the scores
SCORES = {"mIoU_seen": "seen", "mIoU_unseen": "unseen", "hIoU": "hIoU"}
# Student's t: 95 % of the values lie between -t and t, by the number of values in the mean
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262, 11: 2.228, 12: 2.201}
SEARCH = 8  # worlds from here on are for choosing settings
MARK = "<!-- below: python -m experiments.study --report -->"  # what stands above it in the report is kept
TABLE = re.compile("(<!-- table: .*? -->\n).*?(<!-- end -->)", re.DOTALL)  # README's


# ---------------------------------------------------------------- runs


def method_hash():
    """Of METHOD's files; of Python files without what changes no score: comments, docstrings, help texts, errors, and
    the functions in SHOWN."""
    digest = hashlib.sha256()
    for name in METHOD:
        content = (ROOT / name).read_bytes()
        if name.endswith(".py"):
            tree = ast.parse(content)
            tree.body = [node for node in tree.body if getattr(node, "name", None) not in SHOWN]
            for node in ast.walk(tree):
                if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node):
                    node.body = node.body[1:]
                elif isinstance(node, ast.Call):
                    node.keywords = [keyword for keyword in node.keywords if keyword.arg != "help"]
                elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                    node.exc = node.exc.func
            content = repr(plain(tree)).encode()
        digest.update(name.encode() + content)
    return digest.hexdigest()[:12]


def plain(node):
    """A syntax tree as tuples, which are the same in every version of Python; ast.unparse's text is not."""
    if isinstance(node, list):
        return tuple(map(plain, node))
    if not isinstance(node, ast.AST):
        return node
    fields = ((name, value) for name, value in ast.iter_fields(node) if value not in (None, []))
    return type(node).__name__, *((name, plain(value)) for name, value in fields)


def length(row):
    """["--steps", "300"] of a row that has it, else []."""
    words = row.split()
    return words[words.index("--steps"):][:2] if "--steps" in words else []


def split_row(row):
    """"linear images=250 --lr 1e-3" -> {"images": 250}, all its flags for train.py"""
    name, *more = row.split()
    if name not in ROWS:
        raise UserError(f"no row {name!r}: choose {', '.join(ROWS)}")
    more = [word for word in more if word != "frozen-body"]
    changes = [re.fullmatch(r"(images|seen)=(\d+)", word) for word in more]
    return {c[1]: int(c[2]) for c in changes if c}, ROWS[name][1] + [word for word, c in zip(more, changes) if not c]


def body_of(row):
    """The row whose body a frozen-body row takes, else None: L_seg alone, on the same images and seen classes."""
    words = row.split()
    if "frozen-body" in words:
        data = [word for word in words if word == "--strict" or re.match("(images|seen)=", word)]
        return " ".join(["linear-seg", *data, *length(row)])


def draw(seed, changes):
    """Folder of world `seed` with its changes, drawn where it is missing."""
    root = DATA / (f"toy-{seed}" if seed else "toy")
    if not root.exists():
        world.write(root, seed)
    first = world.draw(np.random.RandomState(seed))[0]
    if read_lines(root / "unseen.txt") != world.unseen(seed) or not np.array_equal(
            Image.open(root / "images/train_00000.png"), first):
        raise UserError(f"{root} is not world {seed} as it is drawn now: delete it")
    if not changes:
        return root
    changed = DATA / "-".join([f"toy-{seed}", *(f"{key}{n}" for key, n in changes.items())])
    changed.mkdir(exist_ok=True)
    for part in ("images", "masks"):
        if not (changed / part).exists():
            (changed / part).symlink_to((root / part).resolve())
    lists = {name: read_lines(root / name) for name in ("train.txt", "val.txt", "classes.txt", "unseen.txt")}
    lists["train.txt"] = lists["train.txt"][:changes.get("images")]
    if "seen" in changes:  # the first ones of a shuffled list, so that 4 of them are among 8
        seen = [name for name in lists["classes.txt"] if name not in lists["unseen.txt"]]
        lists["unseen.txt"] += list(np.random.RandomState(seed).permutation(seen)[changes["seen"]:])
    for name, lines in lists.items():
        (changed / name).write_text("\n".join(lines) + "\n")
    return changed


def run_folder(row, seed_of_world, seed):
    return RUNS / re.sub(r"[^\w.=-]+", "_", f"{row}-world{seed_of_world}-seed{seed}")


def train(command, out):
    """One run of train.py in a process of one thread -> its metrics.json."""
    (out / "metrics.json").unlink(missing_ok=True)
    command = [sys.executable, *command, "--out-dir", str(out), "--workers", "0"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{' '.join(command)} did not finish: {done.stderr.strip()[-300:]}")
    return json.loads((out / "metrics.json").read_text())


def device_name():
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def commit():
    def git(*words):
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    return git("rev-parse", "--short", "HEAD") + " and changes" * bool(git("status", "--porcelain", "--", "*.py"))


def run(row, seed_of_world, seed, folder, precision):
    """One run, whose line is written into RESULTS."""
    start, method = time.time(), method_hash()
    flags, script = split_row(row)[1], ["train.py"]
    if trained := body_of(row):
        body = run_folder(trained, seed_of_world, seed) / "last.pt"
        if (trained, seed_of_world, seed) not in map(key_of, finished()) or not body.exists():
            raise UserError(f"{row} needs the body of a finished run in {body.parent}: first run --rows '{trained}'")
        script = ["-m", "experiments.frozen_body", os.path.relpath(body, ROOT)]
    command = [*script, *flags, "--data-root", os.path.relpath(folder, ROOT), "--seed", str(seed),
               "--precision", precision]
    result = train(command, run_folder(row, seed_of_world, seed))["gamma_0"]
    if method_hash() != method:
        raise UserError(f"the method's files changed during a run of {row}, whose result is not kept: start again")
    line = {"row": row, "world": seed_of_world, "seed": seed, "precision": precision, "device": device_name(),
            "method": method, "commit": commit(), "command": " ".join(["python", *command]),
            "seconds": round(time.time() - start), "scores": {key: round(result[key], 2) for key in SCORES},
            "IoU": {name: result["IoU"][name] for name in world.unseen(seed_of_world)}}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    scores = "  ".join(f"{name} {line['scores'][key]:5.1f}" for key, name in SCORES.items())
    print(f"{row:<28} world {seed_of_world:2d}  seed {seed}  {scores}  {line['seconds']} s", flush=True)


def finished():
    """Lines of the finished runs. Raises UserError as `comparable` does."""
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    comparable(lines)
    return lines


def key_of(line):
    return line["row"], line["world"], line["seed"]


def comparable(lines):
    """Raises UserError unless lines of one world and as many steps, which are compared, are of one method, precision
    and device."""
    groups = {}
    for line in lines:
        which = f"world {line['world']}, {' '.join(length(line['row'])) or 'the default number of steps'}"
        groups.setdefault(which, {})[line["method"], line["precision"], line.get("device", "CPU")] = line["commit"]
    for which, found in groups.items():
        if len(found) > 1:
            listed = "; ".join(f"{' '.join(kind)} ({at})" for kind, at in found.items())
            raise UserError(f"{RESULTS} and the runs to come have more than one method, precision or device for "
                            f"{which}: {listed}. Their scores are not comparable: keep the lines of one only, or move "
                            "the file away")


# ---------------------------------------------------------------- statistics


def mean_std(values):
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def interval(values):
    """Differences, one a world -> "mean [95 % interval]", bold where 0 lies outside of it."""
    if len(values) < 2:
        return f"{values[0]:+.1f}" if values else "–"
    middle, half = mean(values), T95.get(len(values), T95[12]) * stdev(values) / len(values)**0.5
    cell = f"{middle:+.1f} [{middle - half:+.1f}, {middle + half:+.1f}]"
    return f"**{cell}**" if abs(middle) > half else cell


def table_of(lines, row, key):
    """{world: {seed: score}}; key: a score, or one of world.unseen_kinds, whose classes' mean IoU it is then."""
    table = {}
    for line in lines:
        if line["row"] == row:
            kinds = world.unseen_kinds(line["world"])
            value = line["scores"][key] if key in SCORES else mean(line["IoU"][name] or 0 for name in kinds[key])
            table.setdefault(line["world"], {})[line["seed"]] = value
    return table


def by_world(lines, row, key):
    """[mean score over seeds], one for each world that the row has."""
    return [mean(seeds.values()) for seeds in table_of(lines, row, key).values()]


def full_of(row):
    """The row of full that a row is compared with: with the same changes and flags. For a row that is full with
    changes it is full without them, at the same number of steps; itself with seen=N, which has other unseen classes."""
    name, *more = row.split()
    if name == "full" and "seen=" not in row:
        more = length(row)
    return " ".join(["full", *more])


def gains(lines, row, key):
    """[score of `full_of(row)` − score of the row, mean over the seeds that both have], one for each world."""
    high, low = table_of(lines, full_of(row), key), table_of(lines, row, key)
    pairs = {w: [high[w][seed] - low[w][seed] for seed in high[w].keys() & low[w]] for w in high.keys() & low}
    return [mean(pairs[w]) for w in sorted(pairs) if pairs[w]]


# ---------------------------------------------------------------- report


def report(lines):
    """-> Markdown"""
    origins = {}
    for line in lines:
        origin = (line["commit"], line["method"], line["precision"], line.get("device", "CPU"),
                  (length(line["row"]) or ["default"])[-1])
        origins.setdefault(origin, []).append(line)
    search, lines = [line for line in lines if line["world"] >= SEARCH], reported(lines)
    rows, kinds = rows_of(lines), list(world.unseen_kinds())
    first = {line["row"]: line for line in reversed(lines)}
    parts = [
        "Runs, each a process of one thread (OMP_NUM_THREADS=1, --workers 0), and their hours added up:",
        markdown(("commit", "method", "precision", "device", "steps", "worlds", "runs", "hours"), [
            (*origin, " ".join(map(str, sorted({line["world"] for line in its}))), len(its),
             f"{sum(line['seconds'] for line in its) / 3600:.1f}") for origin, its in origins.items()]),
        "All classes together, γ = 0, in percent. Mean ± standard deviation over worlds; a world counts once, with the "
        "mean of its seeds. The columns *new thing* and *new ground* are mean IoU of the world's unseen things and "
        "grounds; with `seen=N` more classes than these are unseen. Worlds differ in scenes and unseen classes; CLIP "
        "and the drawings are the same in all.",
        markdown(("row", "what it is", "worlds", *SCORES.values(), *kinds, "first command"), [
            (row, ROWS[row][0] if row in ROWS else "the same with these changes", len(by_world(lines, row, "hIoU")),
             *(mean_std(by_world(lines, row, key)) for key in (*SCORES, *kinds)), f"`{first[row]['command']}`")
            for row in rows]),
        "Full − row (negative: the row is better), pairs of one world and seed, with the 95 % interval of Student's t "
        "over worlds; bold where 0 lies outside.",
        markdown(("full − row", "worlds", *SCORES.values(), *kinds), [
            (row, len(gains(lines, row, "hIoU")), *(interval(gains(lines, row, key)) for key in (*SCORES, *kinds)))
            for row in rows if row != full_of(row) and gains(lines, row, "hIoU")])]
    noise = [(row, w, len(seeds), mean_std(list(seeds.values()))) for row in rows
             for w, seeds in table_of(lines, row, "hIoU").items() if len(seeds) > 1]
    if noise:
        parts += ["The noise of a run: hIoU, mean ± standard deviation over the seeds of one world.",
                  markdown(("row", "world", "seeds", "hIoU"), noise)]
    if search:
        parts += [f"The search for the defaults, on worlds from {SEARCH} on, of which nothing above is reported.",
                  markdown(("row", "worlds", *SCORES.values(), "full − row, hIoU"), [
                      (row, " ".join(map(str, sorted(table_of(search, row, "hIoU")))),
                       *(mean_std(by_world(search, row, key)) for key in SCORES),
                       interval(gains(search, row, "hIoU")) if row != full_of(row) else "")
                      for row in rows_of(search)])]
    return "\n\n".join([*parts, f"![seen, unseen and hIoU of each row]({REPORT.stem}.png)\n"])


def readme_table(lines):
    """README_ROWS, as far as there are runs."""
    lines, kinds = reported(lines), list(world.unseen_kinds())
    return markdown(("row", "worlds", *SCORES.values(), *(f"{kind}s" for kind in kinds), "full − row, hIoU"), [
        (f"`{row}`: {what}", len(by_world(lines, row, "hIoU")),
         *(mean_std(by_world(lines, row, key)) for key in (*SCORES, *kinds)),
         interval(gains(lines, row, "hIoU")) if row != full_of(row) else "")
        for row, what in README_ROWS.items() if by_world(lines, row, "hIoU")])


def reported(lines):
    return [line for line in lines if line["world"] < SEARCH]


def rows_of(lines):
    """Those with the same changes together, in the order of ROWS."""
    return sorted({line["row"] for line in lines}, key=lambda row: (row.split()[1:], [*ROWS].index(row.split()[0])))


def markdown(header, rows):
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, ["---"] * len(header), *rows))


def plot(lines):
    """Three bars a row, seen, unseen and hIoU; the line at a bar's end is ± the standard deviation over worlds."""
    lines = reported(lines)
    rows = rows_of(lines)
    left = 30 + max((pictures.length(row, 13) for row in rows), default=0)  # pixels of the names
    wide, high = 520, 46  # pixels of 100 %, of a row
    canvas = Image.new("RGB", (left + wide + 20, high * len(rows) + 60), "white")
    pen = ImageDraw.Draw(canvas)
    for share in range(0, 101, 20):
        x = left + wide * share / 100
        pen.line((x, 40, x, canvas.height - 12), fill="lightgrey")
        pictures.write(pen, (x, 24), f"{share} %", 12, anchor="mt")
    for j, ((key, name), colour) in enumerate(zip(SCORES.items(), pictures.LINES)):
        pictures.write(pen, (left + 70 * j, 4), name, 13, fill=colour)
        for i, row in enumerate(rows):
            values, y = by_world(lines, row, key), 44 + high * i + 12 * j
            x, std = left + wide * mean(values) / 100, stdev(values) if len(values) > 1 else 0
            pen.rectangle((left, y, x, y + 9), fill=colour)
            pen.line((x - wide * std / 100, y + 4, x + wide * std / 100, y + 4), fill="black", width=2)
            if j == 1:
                pictures.write(pen, (left - 8, y + 5), row, 13, anchor="rm")
    return canvas


def main(args):
    RESULTS.parent.mkdir(exist_ok=True)
    if not args.report:
        lines = finished()
        have = set(map(key_of, lines))
        now = {"method": method_hash(), "commit": "now", "precision": args.precision, "device": device_name()}
        jobs = [(" ".join(row.split()), w, seed) for w in args.worlds for seed in args.seeds for row in args.rows]
        jobs = [job for job in jobs if job not in have]
        comparable([*lines, *({"row": job[0], "world": job[1], **now} for job in jobs)])
        jobs = [(*job, draw(job[1], split_row(job[0])[0]), args.precision) for job in jobs]
        print(f"{len(jobs)} runs to go, {len(have)} are in {RESULTS}", flush=True)
        for ready in ([job for job in jobs if not body_of(job[0])], [job for job in jobs if body_of(job[0])]):
            with ThreadPoolExecutor(args.jobs) as pool:
                list(pool.map(run, *zip(*ready)))
    if lines := finished():
        kept = REPORT.read_text().split(MARK)[0] if REPORT.exists() else "# Results\n\n"
        atomic(REPORT, lambda path: path.write_text(f"{kept}{MARK}\n\n{report(lines)}"))
        pictures.save(plot(lines), REPORT.with_suffix(".png"))
        table = TABLE.sub(lambda part: f"{part[1]}{readme_table(lines)}\n{part[2]}", README.read_text())
        atomic(README, lambda path: path.write_text(table))
        print(f"wrote {REPORT} and {REPORT.stem}.png, and the table of {README.name}")


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.study", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    default = list(dict.fromkeys(name for row in README_ROWS for name in (full_of(row), row)))
    parser.add_argument("--rows", nargs="+", default=default, metavar="ROW",
                        help=f"{', '.join(ROWS)}, or such a name with flags and changes, in quotes (default: those of "
                        "README's table and what they are compared with)")
    parser.add_argument("--worlds", nargs="+", type=int, default=list(range(8)), metavar="N", help="(default: 0 to 7)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], metavar="N", help="of each run (default: 0)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of all runs (default: fp32)")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="runs at a time (default: 2)")
    parser.add_argument("--report", action="store_true", help="only write the report")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_command(main, parse)
