"""The controlled comparison on the embedded default: every row trained with several seeds by train.py itself.

    python -m toy.study                     # every row, 3 seeds; finished runs are not run again
    python -m toy.study --rows full linear  # some rows
    python -m toy.study --render            # only write results/toy.md from results/toy.jsonl

A finished run is a line of results/toy.jsonl, so the study can be done in several goes and on several machines.
"""
import argparse
import json
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

import guard
import losses
import model as models
import train

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results" / "toy.jsonl"

SEG_ONLY = ["--sgd-weight", "0", "--sam-weight", "0"]
ROWS = {  # row: (what it is, flags of train.py); every row but the first changes the default in one respect
    "full": ("the default: CSH, n = 1, SGD and SAM", []),
    "seg": ("segmentation loss alone", SEG_ONLY),
    "linear": ("control: linear projection behind the same adapter and LayerNorm", ["--head", "linear"]),
    "linear-seg": ("the same control, segmentation loss alone", ["--head", "linear", *SEG_ONLY]),
    "linear-plain": ("the linear control without the LayerNorm", ["--head", "linear"]),
    "random": ("control: frozen random weights of CSH's shape", ["--head", "random"]),
    "unfrozen": ("CSH with its CLIP part trained", []),
    "no-sgd": ("without SGD", ["--sgd-weight", "0"]),
    "no-sam": ("without SAM", ["--sam-weight", "0"]),
    "n0": ("n = 0: adapter, ln_post and proj only", ["--frozen-blocks", "0"]),
    "n2": ("n = 2", ["--frozen-blocks", "2"]),
    "n4": ("n = 4: all blocks of the tiny CLIP", ["--frozen-blocks", "4"]),
    "attention-vv": ("attention between like values", ["--attention", "vv"]),
    "attention-self": ("each token attends to itself", ["--attention", "self"]),
    "positional": ("CLIP's positions added to the tokens", ["--positional"]),
    "all-k": ("k = N throughout: every position distilled", ["--k-schedule", "constant", "--k-end", "1"]),
    "fixed-k-0.4": ("k = 0.4 N throughout", ["--k-schedule", "constant", "--k-end", "0.4"]),
    "fixed-k-0.1": ("k = 0.1 N throughout", ["--k-schedule", "constant", "--k-end", "0.1"]),
    "k-end-0.1": ("k falls to 0.1 N", ["--k-end", "0.1"]),
    "k-cosine": ("k falls along a cosine", ["--k-schedule", "cosine"]),
    "random-k": ("k positions at random, not the most similar", []),
    "per-feature": ("1 − cosine of each of the k features, no contrast", []),
    "no-bank": ("no bank of earlier CLS embeddings", ["--bank", "0"]),
    "sam-bce": ("SAM by binary cross-entropy", []),
    "nel": ("focal + dice instead of cross-entropy", ["--seg-loss", "nel"]),
    "tau-0.07": ("τ = 0.07 instead of CLIP's own", ["--temperature", "0.07"]),
    "sgd-0.5": ("λ_sgd = 0.5", ["--sgd-weight", "0.5"]),
    "strict": ("images that hold unseen classes dropped", ["--strict"]),
}


def of_built(change):
    """A change of the model that train.py has built."""
    build = models.build

    def changed(*args, **config):
        model = build(*args, **config)
        change(model)
        return model
    models.build = changed


def random_prototype(z, c, k):
    z = z.flatten(2)  # (B, D, N)
    chosen = torch.rand(z[:, 0].shape, device=z.device).topk(k, dim=1).indices
    return F.normalize(z.gather(2, chosen[:, None].expand(-1, z.shape[1], -1)).mean(2), dim=1)


def per_feature_loss(z, c, k, bank=None, tau=None):
    return 1 - torch.einsum("bdn,bd->bn", z.flatten(2), c).topk(k, dim=1).values.mean()


VARIANTS = {  # rows that no flag of train.py makes
    "linear-plain": lambda: of_built(lambda model: setattr(model.head.adapter, "norm", torch.nn.Identity())),
    "unfrozen": lambda: of_built(lambda model: model.head.clip.requires_grad_(True)),
    "random-k": lambda: setattr(losses, "global_prototype", random_prototype),
    "per-feature": lambda: setattr(losses, "sgd_loss", per_feature_loss),
    "sam-bce": lambda: setattr(losses, "sam_loss", partial(losses.sam_loss, kind="bce")),
}


def finished():
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def run(row, seed, steps):
    """One run of train.py in a process of one thread -> its line for results/toy.jsonl."""
    out = ROOT / "runs" / "study" / f"{row}-{seed}"
    (out / "metrics.json").unlink(missing_ok=True)
    program = ["-m", "toy.study", "--train", row] if row in VARIANTS else ["train.py"]
    command = [*program, *ROWS[row][1], "--seed", str(seed), *(["--steps", str(steps)] if steps else [])]
    start = time.time()
    place = ["--out-dir", str(out), "--workers", "0", "--device", "cpu"]
    environment = {"OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, *command, *place], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode or not (out / "metrics.json").exists():
        raise RuntimeError(f"{' '.join(command)} did not finish:\n{done.stdout[-300:]}{done.stderr}")
    result = json.loads((out / "metrics.json").read_text())
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True).stdout
    keep = ("pAcc", "mIoU_seen", "mIoU_unseen", "hIoU")
    line = {"row": row, "seed": seed, "command": "python " + " ".join(command), "commit": commit.strip(),
            "seconds": round(time.time() - start), "gamma_0": {k: round(result["gamma_0"][k], 2) for k in keep},
            "calibrated": {k: round(result["calibrated"][k], 2) for k in (*keep, "gamma")}}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")
    return line


def render(lines):
    """results/toy.jsonl -> results/toy.md: mean ± standard deviation over the seeds of each row."""
    def cell(runs, part, key):
        values = [run[part][key] for run in runs]
        return f"{statistics.mean(values):.1f}" + (f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else "")

    table = ["| row | what | n | seen | unseen | hIoU | hIoU, calibrated | command | commit |", "|---" * 9 + "|"]
    for row, (what, _) in ROWS.items():
        if runs := [line for line in lines if line["row"] == row]:
            command = runs[0]["command"].replace(f" --seed {runs[0]['seed']}", "")
            commits = ", ".join(sorted({line["commit"] for line in runs}))
            cells = [cell(runs, "gamma_0", key) for key in ("mIoU_seen", "mIoU_unseen", "hIoU")]
            cells = [row, what, str(len(runs)), *cells, cell(runs, "calibrated", "hIoU"), f"`{command}`", commits]
            table.append(f"| {' | '.join(cells)} |")
    text = ("# The embedded default under controls\n\nmIoU in percent, γ = 0 unless it says calibrated; mean ± std "
            "over n seeds.\nWritten by `python -m toy.study`.\n\n" + "\n".join(table) + "\n")
    (RESULTS.parent / "toy.md").write_text(text)


def main(args):
    RESULTS.parent.mkdir(exist_ok=True)
    have = {(line["row"], line["seed"]) for line in finished()}
    todo = [(row, seed) for seed in range(args.seeds) for row in args.rows if (row, seed) not in have]
    if not args.render:
        start = time.time()
        with ThreadPoolExecutor(args.jobs) as pool:
            for done, line in enumerate(pool.map(lambda job: run(*job, args.steps), todo), 1):
                left = (time.time() - start) / done * (len(todo) - done) / 60
                print(f"{done}/{len(todo)}  {line['row']:<18} seed {line['seed']}  hIoU {line['gamma_0']['hIoU']:5.1f}"
                      f"  {left:.0f} min left", flush=True)
    render(finished())
    print(f"wrote {RESULTS.parent / 'toy.md'}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--train"]:  # one run of a row that is in VARIANTS
        VARIANTS[sys.argv[2]]()
        guard.run_command(train.main, lambda: train.parse(sys.argv[3:]))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW",
                        help=f"of {', '.join(ROWS)} (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="0 to SEEDS − 1 of each row (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="a trial: printed, not kept (default: the recipe's number)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each (default: %(default)s)")
    parser.add_argument("--render", action="store_true", help="only render what is there")
    main(parser.parse_args())
