"""Checkpoints: written whole or not at all, read as data, resumed exactly.

    last.pt     the newest state of the run
    former.pt   the previous save; until a new run's second save, the last state of the previous run

There is no best.pt: choosing it needs the test set. No random state is saved: the order of the images, the crops and
every other draw follow from the seed, the step and the process.
"""
import json
import os
import shutil
from pathlib import Path

import torch

from support import UserError, first_line
from support.archive import check_tensors, read_archive
from support.processes import from_first, rank, world_size

FORMAT = 2  # of the file; raise it when older ones can no longer be read
MAY_CHANGE = ("data_root", "lr", "clip", "precision", "departures")  # by --resume; anything else is another run
KINDS = {"model": dict, "optimizer": dict, "step": int, "bank": torch.Tensor, "config": dict, "processes": int}
SETTINGS = {"clip": str, "clip_hash": str, "dataset": str, "data_root": str | None, "body": str,
            "body_weights": str, "head": str, "frozen_blocks": int, "steps": int, "crop": int,
            "temperature": float | None, "departures": str, "classes": list, "unseen": list, "templates": list,
            "test": dict}  # what evaluate.py and predict.py need of the config
TEST = {"short_side": int, "window": int, "stride": int}


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, of another run, or that cannot be written."""


# ---------------------------------------------------------------- writing


def atomic(path, write):
    """Calls write(temporary path beside `path`), syncs, renames: a reader sees the old file or the whole new one.

    Makes the folder if need be. If writing fails, the temporary file is removed; after a kill, `begin` removes it."""
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


def save(out, model, optimizer, step, bank, config):
    """Writes out/last.pt, the state before `step`; the last.pt before it becomes former.pt. Only the first process
    writes. Raises CheckpointError if a value is not finite or the disk is full: last.pt then stays as it was.

    Tensors and plain values only, so that `weights_only` loads it; no weight of CLIP."""
    if rank():
        return
    state, last = model.trained_state(), out / "last.pt"
    if bad := [name for name, tensor in [*state.items(), ("the bank", bank)] if not tensor.isfinite().all()]:
        raise CheckpointError(f"{bad[0]} is not finite before step {step}: not saved, {last} is as it was")
    checkpoint = {"format": FORMAT, "model": state, "optimizer": optimizer.state_dict(), "step": step, "bank": bank,
                  "config": config, "processes": world_size()}

    def write(partial):
        torch.save(checkpoint, partial)
        if last.exists():  # only now that the new one is on the disk
            atomic(out / "former.pt", keep)

    def keep(partial):
        try:
            os.link(last, partial)
        except OSError:  # a file system without links
            shutil.copyfile(last, partial)

    try:
        atomic(last, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        raise CheckpointError(f"step {step} could not be saved in {out} ({first_line(error)}): is the disk full? "
                              "last.pt is unchanged, --resume continues from it") from None


# ---------------------------------------------------------------- reading


def read_checkpoint(path):
    """last.pt of train.py -> its dict of plain values and tensors; nothing in the file is run.

    Raises CheckpointError, which offers former.pt if that one is whole."""
    path = Path(path)
    former = path.with_name("former.pt")
    try:
        return read(path)
    except CheckpointError as error:
        if path.name != "last.pt" or not former.is_file():
            raise
        step = read(former)["step"]
        if path.exists():
            raise CheckpointError(f"{error}; the save before it, {former} of step {step}, is whole: rename it to "
                                  "last.pt to go on from there") from None
        raise CheckpointError(f"no {path}: the newest run in this folder ended before its first save. {former} of step "
                              f"{step} is of the previous run: rename it to last.pt to use it, or train again without "
                              "--resume") from None


def read(path):
    if not path.is_file():
        raise CheckpointError(f"no checkpoint {path}: train one with python train.py")
    try:
        saved = read_archive(path)
        if saved.get("format") == FORMAT:
            check(saved, path)
            return saved
    except Exception as error:  # a torn zip, a foreign pickle, a picture: all the same to the user
        with open(path, "rb") as file:
            what = "is truncated or damaged, or no checkpoint" if file.read(2) == b"PK" else "is no checkpoint"
        reason = first_line(str(error).replace(f"{path} ", "it "))  # a long path would push the rest out
        raise CheckpointError(f"{path} {what} of train.py ({type(error).__name__}: {reason})") from None
    raise CheckpointError(f"{path} was written by an older version of this code (or is no checkpoint of train.py): "
                          "train anew, or use that version")


def check(saved, path):
    """Raises an error, of any type, unless all that is read later is there and of the right type."""
    config = saved["config"]
    for holder, kinds in ((saved, KINDS), (config, SETTINGS), (config["test"], TEST)):
        for key, kind in kinds.items():
            if not isinstance(holder[key], kind):
                raise TypeError(f"its {key} is {str(holder[key])[:40]!r}")
    for key in ("classes", "templates"):
        if not config[key] or not all(isinstance(text, str) for text in config[key]):
            raise TypeError(f"its {key} are no list of texts")
    if not set(config["unseen"]) <= set(range(len(config["classes"]))):
        raise ValueError("its unseen classes are none of its classes")
    if saved["step"] < 0 or min(config["test"].values()) < 1:
        raise ValueError("its step or a test size is too small")
    json.dumps(config)  # plain values, and lists and dicts of them
    check_tensors({**saved["model"], "bank": saved["bank"]}, path)


def newest_run(root="runs"):
    """-> path of the last.pt that was written last."""
    found = sorted(Path(root).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise CheckpointError(f"no run under {root}/: train one with python train.py, or name --checkpoint FILE")
    return found[-1]


# ---------------------------------------------------------------- the start of a run


def begin(out, model, optimizer, bank, config, again):
    """Readies the run folder, and goes on from its last.pt if `again` -> first step, bank (M, D), remarks.

    All processes call it; only the first needs the folder and writes into it. Call it when nothing else can fail, as
    a new run moves the previous run's files. bank: the empty one of a new run, (0, D)."""
    step, remarks = 0, []
    if again:
        step, bank, remarks = resume(out / "last.pt", model, optimizer, bank, config)
    if rank():
        return step, bank, remarks
    if not again:
        if (out / "last.pt").exists():
            os.replace(out / "last.pt", out / "former.pt")
            remarks.append(f"{out}/last.pt of the previous run is now former.pt, until this run's second save")
        for name in ("metrics.json", "preview.png", "curves.png"):
            (out / name).unlink(missing_ok=True)
    atomic(out / "config.json", lambda path: path.write_text(json.dumps(config, indent=1) + "\n"))
    for partial in out.glob(".partial.*"):  # of processes that were killed in `atomic`
        partial.unlink(missing_ok=True)
    log, kept = out / "log.jsonl", []
    if again and log.exists():
        kept = [line for line in log.read_text(errors="replace").splitlines(keepends=True) if earlier(line, step)]
    atomic(log, lambda path: path.write_text("".join(kept)))
    return step, bank, remarks


def resume(path, model, optimizer, empty, config):
    """Loads the checkpoint, which only the first process must have -> next step, bank, remarks.

    Raises CheckpointError, also if the settings are not those of the run."""
    saved = from_first(lambda: read_checkpoint(path))
    remarks, refused = [], []
    for key in config:
        if (was := saved["config"].get(key)) != config[key]:
            (remarks if key in MAY_CHANGE else refused).append(f"{key} was {str(was)[:60]}, is {str(config[key])[:60]}")
    if refused:
        raise CheckpointError(f"{path} cannot be resumed with other settings: {', '.join(refused)}. Use the old "
                              "ones, or start a new run in another --out-dir")
    if (was := saved["processes"]) != world_size():
        remarks.append(f"{was} processes before, {world_size()} now: the same batches, other rounding")
    model.load_trained_state(saved["model"])
    try:
        optimizer.load_state_dict(saved["optimizer"])
        fits = all(x.shape in (p.shape, ()) for p, state in optimizer.state.items() for x in state.values())
    except Exception:  # load_state_dict trusts what it is given
        fits = False
    if not fits or saved["bank"].shape[1:] != empty.shape[1:]:
        raise CheckpointError(f"{path}: its optimiser or bank is not of this model: train anew")
    remarks = [f"resume  allowed: {remark}" for remark in remarks]
    return saved["step"], saved["bank"], [f"resume  continues at step {saved['step']}", *remarks]


def earlier(line, step):
    """Is this a whole line of the log, of a step before `step`?"""
    try:
        return json.loads(line)["step"] < step
    except (ValueError, TypeError, KeyError):  # torn by a full disk
        return False
