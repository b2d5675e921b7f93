"""One process or many: torchrun's environment, the device, and what all processes agree on.

Without a launcher there is one process, and the functions here do nothing special.
"""
import contextlib
import os
import subprocess
import warnings
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torchvision

from support import UserError

TIMEOUT = timedelta(hours=1)  # how long a process waits for the others: the first one may be downloading


def start(name=None):
    """Joins torchrun's process group if there is one -> this process's device.

    name: cpu, cuda or mps; by default a GPU where there is one. Raises UserError."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    if name not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: expected cpu, cuda or mps")
    if name == "cuda" and not torch.cuda.is_available() or name == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {name}, but PyTorch finds no GPU of that kind that it can use: drop --device")
    device = torch.device(name)
    if name == "cuda":
        local, gpus = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(f"process {local + 1} of this machine has no GPU of its own, as PyTorch sees {gpus} there: "
                            f"start torchrun with --nproc-per-node {gpus}, or let each process see all GPUs "
                            "(CUDA_VISIBLE_DEVICES)")
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        if missing := {"RANK", "MASTER_ADDR", "MASTER_PORT"} - os.environ.keys():
            raise UserError(f"WORLD_SIZE is set in the environment, {max(missing)} is not: start with torchrun, which "
                            "sets both, or unset WORLD_SIZE")
        dist.init_process_group("nccl" if name == "cuda" else "gloo", timeout=TIMEOUT)
    return device


PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def fast_precision(device):
    """The fastest one: on CUDA bf16 since Ampere, fp16 before; on CPUs bf16 with AMX. Else fp32. One answer for all."""
    if device.type == "cuda":
        fast = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    else:  # without AMX a CPU's bf16 is slower than its fp32 here, AVX512-BF16 or not
        amx = device.type == "cpu" and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
        fast = "bf16" if amx else "fp32"
    return from_first(lambda: fast)


def autocast(device, precision):
    """Matrix products in `precision`; on MPS always in fp32, as PyTorch's autocast is not complete there."""
    if precision not in PRECISIONS:
        raise UserError(f"precision {precision!r}: expected {', '.join(PRECISIONS)}")
    return torch.autocast(device.type, PRECISIONS[precision], enabled=precision != "fp32" and device.type != "mps")


def cores():
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def loader_workers():
    """How many loader processes suit each training process: its share of the cores, at most 8."""
    return max(min(cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 8), 1)


def provenance(device):
    """What computes here: the code's commit (None outside of git), versions, the card."""
    describe = "git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"
    try:
        done = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=20)
        commit = done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):  # no git, a slow disk
        commit = None
    return {"commit": commit, "torch": torch.__version__, "torchvision": torchvision.__version__,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type}


def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


def from_first(make):
    """make() of the first process, given to all: the others may lack its files. Its errors end them all."""
    if world_size() == 1:
        return make()
    value = [make() if rank() == 0 else None]
    dist.broadcast_object_list(value)
    return value[0]


def parallel(model, device, compiled):
    """What the loop calls in the model's place: compiled if asked, in DDP with several processes. Same parameters."""
    if world_size() > 1 and device.type == "cuda":
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    student = torch.compile(model) if compiled else model
    if world_size() > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers`")  # newer torch renames it; this name works in all
        student = nn.parallel.DistributedDataParallel(student, broadcast_buffers=False)
    return student


@contextlib.contextmanager
def first_on_machine():
    """The first process of each machine runs the block before the others do: it downloads, they find the file."""
    waits = world_size() > 1 and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if waits:
        dist.barrier()
    try:
        yield
    finally:
        if world_size() > 1 and not waits:
            dist.barrier()
