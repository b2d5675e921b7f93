"""Checkpoints: written whole or not at all, read as data, resumed exactly.

    last.pt     the newest state of a run
    former.pt   the one before it, offered where last.pt is damaged

There is no best.pt: only a score could choose it, and the one score is the test's; the last state is the result.
Order, crops and every draw follow from the seed, the step and the rank, so that no random state has to be saved.
"""
import json
import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist

from support.archive import check_tensors, read_archive
from bodies import ModelError
from losses import world_size

MAY_CHANGE = ("data_root", "lr", "clip", "precision")  # by --resume, with a remark; others would make another run
KINDS = {"model": dict, "optimizer": dict, "step": int, "bank": torch.Tensor, "gamma": float | None, "config": dict}
SETTINGS = {"clip": str, "clip_hash": str, "dataset": str, "data_root": str | None, "body": str, "head": str,
            "stride": int | None, "frozen_blocks": int, "attention": str, "crop": int,
            "temperature": float | None, "classes": list, "unseen": list, "templates": list, "test": dict}


def atomic(path, write):
    """Calls write(temporary path beside `path`), syncs, renames: readers see the old file or the whole new one.

    Where writing fails, as on a full disk, the temporary file is taken away again; after a kill, by `clear`."""
    path = Path(path)
    partial = path.with_name(f".partial.{os.getpid()}.{path.name}")  # of this process: others may write here too
    try:
        write(partial)
        with open(partial, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def clear(out):
    """Takes away what processes that were killed in the middle of `atomic` left in the run folder."""
    for partial in out.glob(".partial.*"):
        partial.unlink(missing_ok=True)


def save(out, model, optimizer, step, bank, gamma, config):
    """Writes out/last.pt, the state before `step`, and keeps the last.pt before it as former.pt. Raises ModelError.

    Tensors and plain types only, so that `weights_only` loads it; nothing of CLIP, no value that is not finite."""
    state = model.trained_state()
    if spoilt := [name for name, tensor in [*state.items(), ("the bank", bank)] if not tensor.isfinite().all()]:
        raise ModelError(f"{spoilt[0]} is no longer finite before step {step}: not saved, {out}/last.pt is as it was")
    checkpoint = {"model": state, "optimizer": optimizer.state_dict(), "step": step, "bank": bank, "gamma": gamma,
                  "config": config, "processes": world_size()}
    last = out / "last.pt"

    def write(partial):
        torch.save(checkpoint, partial)
        if last.exists():  # only now that the new one is on the disk
            atomic(out / "former.pt", lambda name: link(last, name))

    try:
        atomic(last, write)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).strip().split("\n")[0][:100]
        raise ModelError(f"step {step} could not be saved in {out} ({reason}): is the disk full? last.pt is as it was, "
                         "--resume goes on from it") from None


def link(source, target):
    """A second name for the same bytes, or a copy where the file system has no such names."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def read_checkpoint(path):
    """last.pt of train.py -> dict of plain values and tensors; nothing in the file is run. Raises ModelError."""
    path = Path(path)
    former = path.with_name("former.pt")
    try:
        return _read(path)
    except ModelError as error:
        if path.name != "last.pt" or not path.is_file() or not former.is_file():  # without it former is an older run's
            raise
        step = _read(former)["step"]
        raise ModelError(f"{error}; the one before it, {former} of step {step}, is whole: rename it to last.pt to go "
                         "on from there") from None


def _read(path):
    if not path.is_file():
        raise ModelError(f"no checkpoint {path}: train one with python train.py")
    try:
        saved = read_archive(path)
        for key, kind in KINDS.items():
            if not isinstance(saved[key], kind):
                raise TypeError(f"its {key} is of type {type(saved[key]).__name__}")
        for key, kind in SETTINGS.items():
            if not isinstance(saved["config"].get(key), kind):
                raise TypeError(f"its setting {key} is {str(saved['config'].get(key))[:40]!r}")
        json.dumps(saved["config"])  # plain values, and lists and dicts of them
        for key in ("classes", "templates"):
            if not saved["config"][key] or not all(isinstance(text, str) for text in saved["config"][key]):
                raise TypeError(f"its setting {key} is no list of texts")
        test = saved["config"]["test"]
        if not all(isinstance(n, int) and n > 0 for n in (*test["sides"], test["window"], test["stride"])):
            raise TypeError(f"its setting test is {str(test)[:60]}")
        check_tensors({**saved["model"], "bank": saved["bank"]}, path)
    except Exception as error:  # a torn zip, a foreign pickle, a picture: all the same to the user
        with open(path, "rb") as file:
            what = "is truncated or damaged, or no checkpoint" if file.read(2) == b"PK" else "is no checkpoint"
        reason = str(error).strip().split("\n")[0][:100]
        raise ModelError(f"{path} {what} of train.py ({type(error).__name__}: {reason})") from None
    return saved


def resume(out, model, optimizer, config):
    """Loads out/last.pt, which only the first process must have -> (next step, CLS bank, remarks). Raises ModelError.

    The log loses the lines of steps that are run again."""
    path = out / "last.pt"
    saved = from_first_process(lambda: read_checkpoint(path))
    remarks, refused = [], []
    for key in config:
        if (was := saved["config"].get(key)) != config[key]:
            change = f"{key} was {str(was)[:60]}, is {config[key]}"
            if key in MAY_CHANGE:
                remarks.append(f"resume  allowed: {change}")
            else:
                refused.append(change)
    if refused:
        raise ModelError(f"{path} cannot be resumed with other settings: {', '.join(refused)}: use the former ones, "
                         "or train anew into another --out-dir")
    if (was := saved.get("processes", 1)) != world_size():
        remarks.append(f"resume  allowed: {was} processes before, {world_size()} now: the same batches, other rounding")
    model.load_trained_state(saved["model"])
    try:
        optimizer.load_state_dict(saved["optimizer"])
        fits = all(x.shape in (p.shape, ()) for p, state in optimizer.state.items() for x in state.values())
    except Exception:  # another program's: load_state_dict trusts what it is given
        fits = False
    if not fits or saved["step"] < 0 or saved["bank"].shape[1:] != model.t.shape[1:]:
        raise ModelError(f"{path}: its optimiser, step or bank is not of this model: is it of another version?")
    log = out / "log.jsonl"
    if world_size() == 1 or dist.get_rank() == 0:
        lines = log.read_text(errors="replace").splitlines(keepends=True) if log.exists() else []
        lines = [line for line in lines if before(line, saved["step"])]
        atomic(log, lambda partial: partial.write_text("".join(lines)))
    return saved["step"], saved["bank"], remarks


def before(line, step):
    """Is this a whole line of the log, of an earlier step?"""
    try:
        return json.loads(line)["step"] < step
    except (ValueError, TypeError, KeyError):  # torn by a full disk
        return False


def from_first_process(make):
    """make() of the first process, given to all: the others may lack its files. Its errors end them all."""
    if world_size() == 1:
        return make()
    value = [make() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(value)
    return value[0]


def newest_run(root="runs"):
    found = sorted(Path(root).glob("*/last.pt"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise ModelError(f"no run under {root}/: train one with python train.py, or name --checkpoint FILE")
    return found[-1]
