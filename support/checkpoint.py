"""Runs on the disk: a folder for each, checkpoints written whole or not at all, read as data, resumed exactly.

There is no best.pt: choosing it needs the test set. No random state is saved: the order of the images, the crops and
every other draw follow from the seed, the step and the process.
"""
import contextlib
import itertools
import json
import os
import re
from pathlib import Path

import torch

from support import UserError, first_line
from support.archive import ArchiveError, check_tensors, read_archive
from support.lock import take_lock
from support.processes import from_first, rank, world_size

FORMAT = 3  # of the file; raise it when older ones can no longer be read
KINDS = {"model": dict, "optimizer": dict, "scaler": dict, "step": int, "bank": torch.Tensor, "config": dict,
         "processes": int}  # what it holds
RUNS = Path("runs")
LOCKS = []  # open files; closing one would give its lock back


class CheckpointError(UserError):
    """A run or checkpoint that is missing, damaged, in use, of other settings, or that cannot be written."""


# ---------------------------------------------------------------- writing


def atomic(path, write):
    """Calls write(temporary path beside `path`), syncs, renames: a reader sees the old file or the whole new one.

    Makes the folder if need be. If writing fails, the temporary file is removed; after a kill, `open_run` does it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        write(partial)
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path, content):
    atomic(path, lambda partial: partial.write_text(json.dumps(content, indent=1) + "\n"))  # in ASCII


def save(out, config, model, optimizer, scaler, step, bank):
    """Writes out/last.pt, the state before `step`. Only the first process writes. Raises CheckpointError if a value is
    not finite or the disk takes no more: last.pt then stays as it was.

    Tensors and plain values only, so that `weights_only` loads it; no weight of CLIP."""
    if rank():
        return
    state, last = model.trained_state(), out / "last.pt"
    if bad := [name for name, tensor in [*state.items(), ("the bank", bank)] if not tensor.isfinite().all()]:
        raise CheckpointError(f"{bad[0]} is not finite before step {step}: not saved, {last} is as it was; go on from "
                              "there with --resume and a lower --lr")
    checkpoint = {"format": FORMAT, "model": state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
                  "step": step, "bank": bank, "config": config, "processes": world_size()}

    def write(partial):
        with open(partial, "wb") as file:  # a file of Python's own names the cause of an error
            torch.save(checkpoint, file)

    try:
        atomic(last, write)
    except (OSError, RuntimeError) as error:
        cause = error if isinstance(error, OSError) else error.__context__ or error
        kept = "--resume continues from the last save" if last.is_file() else "nothing was saved before"
        raise CheckpointError(f"step {step} could not be saved as {last} ({first_line(cause)}): {kept}") from None


# ---------------------------------------------------------------- reading


def read_checkpoint(path):
    """last.pt of train.py -> its dict of plain values and tensors; nothing in the file is run.

    Raises CheckpointError."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: train one with python train.py")
    try:
        saved = read_archive(path)
    except ArchiveError as error:
        raise CheckpointError(f"no checkpoint of train.py: {error}") from None
    found = saved.get("format") if isinstance(saved, dict) else None
    if found != FORMAT:
        raise CheckpointError(f"{path} has format {str(found)[:20]}, this code reads {FORMAT}: it is of another "
                              "version, or no checkpoint of train.py. Train anew, or use that version")
    for key, kind in KINDS.items():
        if not isinstance(saved.get(key), kind):
            raise CheckpointError(f"{path} is no checkpoint of train.py: its {key} is {str(saved.get(key))[:40]!r}")
    check_tensors({**saved["model"], "bank": saved["bank"]}, path)
    return saved


def find_checkpoint(path=None):
    """A run's folder, a checkpoint, or None, which means the last.pt under runs/ that was written last -> the file."""
    if path:
        return Path(path) / "last.pt" if Path(path).is_dir() else Path(path)
    found = sorted(RUNS.glob("*/last.pt"), key=lambda file: file.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no run under {RUNS}/: train one with python train.py, or name one with --run")
    return found[-1]


# ---------------------------------------------------------------- the start of a run


def open_run(out, name, config, may_change, again):
    """The folder of a run, made or found again, and its checkpoint -> folder, what was saved or None, remarks.

    out    --out-dir: a new folder, or with `again` (--resume) a run's or a new one. None: a new folder runs/NAME,
           runs/NAME-2, … or with `again` the newest run of this name and these settings
    All processes call it; only the first needs the folder and reads and writes in it. The folder is locked until that
    process ends. Call it when nothing else can fail. What the steps before departed from is added to config's
    departures. Raises CheckpointError."""
    return from_first(lambda: _open_run(out, name, config, may_change, again))


def _open_run(out, name, config, may_change, again):
    if out is None:
        out = newest_like(name, config, may_change) if again else new_folder(name)
    out.mkdir(parents=True, exist_ok=True)
    lock(out)
    if not again and any((out / name).exists() for name in ("config.json", "last.pt")):
        raise CheckpointError(f"{out} holds a run: --resume continues it, another --out-dir starts a new one")
    for partial in out.glob(".partial.*"):  # of processes that were killed in `atomic`
        partial.unlink(missing_ok=True)
    saved, remarks = None, ["resume  nothing was saved there yet: the run starts at step 0"] if again else []
    if again and (out / "last.pt").exists():
        saved = read_checkpoint(out / "last.pt")
        departures = [saved["config"].get("departures", ""), config["departures"]]
        config["departures"] = ", ".join(dict.fromkeys(filter(None, ", ".join(departures).split(", "))))
        refused, remarks = differences(saved["config"] | {"departures": config["departures"]}, config, may_change)
        if refused:
            raise CheckpointError(f"{out} cannot be resumed with other settings: {', '.join(refused)}. Use the old "
                                  "ones, or start a new run without --resume")
        done = " (its end: it is tested again)" if saved["step"] >= config["steps"] else ""
        remarks = [f"resume  continues {out} at step {saved['step']}{done}", *(f"resume  {r}" for r in remarks)]
        if (was := saved["processes"]) != world_size():
            remarks.append(f"resume  {was} processes before, {world_size()} now: the same batches, other rounding")
    write_json(out / "config.json", config)
    cut_log(out / "log.jsonl", saved["step"] if saved else 0)
    return out, saved, remarks


def new_folder(name):
    """runs/NAME, or runs/NAME-2, …: the first that no other process has made."""
    RUNS.mkdir(exist_ok=True)
    for ending in itertools.chain([""], (f"-{n}" for n in itertools.count(2))):
        with contextlib.suppress(FileExistsError):
            (RUNS / f"{name}{ending}").mkdir()
            return RUNS / f"{name}{ending}"


def newest_like(name, config, may_change):
    """The newest of runs/NAME, runs/NAME-2, … whose settings allow it to be resumed with `config`."""
    own = re.compile(re.escape(name) + r"(-\d+)?")
    found = [path for path in RUNS.glob("*/config.json") if own.fullmatch(path.parent.name)]
    if not found:
        raise CheckpointError(f"no run {RUNS}/{name} to resume: drop --resume to start one, or name its --out-dir")
    refused = []
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            refused.append(differences(json.loads(path.read_text()), config, may_change)[0])
        except (ValueError, AttributeError):  # edited by hand, or torn by a full disk
            refused.append(["its config.json cannot be read"])
        if not refused[-1]:
            return path.parent
    raise CheckpointError(f"none of the {len(found)} runs {RUNS}/{name}… has these settings; the newest differs in "
                          f"{', '.join(refused[0])}. Use its settings, or drop --resume to start a new run")


def differences(was, now, may_change):
    """Two configs -> what forbids to go on, and what does not, in words."""
    was, now = flat(was, may_change), flat(now, may_change)
    words = {key: f"{key} was {str(was.get(key))[:60]}, is {str(now[key])[:60]}" for key in now
             if was.get(key) != now[key]}
    return ([text for key, text in words.items() if key not in may_change],
            [text for key, text in words.items() if key in may_change])


def flat(config, whole):
    """{"model": {"head": x}} -> {"head": x}, but for the keys in `whole`."""
    found = {}
    for key, value in config.items():
        found |= value if isinstance(value, dict) and key not in whole else {key: value}
    return found


def lock(folder):
    """Until this process ends, no other may train in `folder`."""
    if not (file := take_lock(folder / ".lock")):
        raise CheckpointError(f"{folder} is in use by another training: let it end, or give another --out-dir")
    LOCKS.append(file)


def cut_log(log, step):
    """Leaves the lines of steps before `step`, as the others are run again."""
    lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
    atomic(log, lambda path: path.write_text("".join(line for line in lines if earlier(line, step))))


def earlier(line, step):
    try:
        return json.loads(line)["step"] < step
    except (ValueError, TypeError, KeyError):  # torn by a full disk
        return False


def restore(saved, model, optimizer, scaler):
    """What `open_run` found -> the next step, the bank (M, D)."""
    model.load_trained_state(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    if scaler.is_enabled() and saved["scaler"]:
        scaler.load_state_dict(saved["scaler"])
    return saved["step"], saved["bank"]
