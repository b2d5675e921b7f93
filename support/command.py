"""How a command ends before its time: errors in one line, signals that save first, numbers that are not finite.

With several processes all of them end at the same step, and only the one with the cause speaks.
"""
import math
import os
import re
import signal
import sys
import time
from datetime import timedelta

import torch
import torch.distributed as dist

import bodies
import clip
import sources
from losses import world_size

ERRORS = (clip.CLIPError, sources.DataError, bodies.ModelError)
TIMEOUT = timedelta(hours=1)  # of processes that wait for another: --strict reads every mask
SIGNALS = []  # those that Signals took note of


def run_command(main, parse):
    """Runs main(parse()); what the user can mend ends in one line instead of a traceback.

    torchrun ends the other processes as soon as one has ended, so that each but the first waits for that before it
    speaks; those that only lost a connection wait longest, or not at all where its signal came before the loss."""
    args, patience = parse(), 5 if int(os.environ.get("RANK", 0)) else 0  # seconds
    try:
        result = main(args)
        if world_size() > 1:  # none leaves while another still talks to it
            dist.barrier()
            dist.destroy_process_group()
        return result
    except KeyboardInterrupt:
        message = "interrupted"
    except (*ERRORS, OSError) as error:  # OSError: a full disk, a folder that may not be written
        message = str(error).strip()
        if "Traceback" in message:  # from a loader process: the message itself is the last line
            message = message.split("\n")[-1].split("Error: ", 1)[-1]
    except RuntimeError as error:
        message = str(error).strip().split("\n")[0]
        if message.startswith("DataLoader worker"):
            message += ": out of memory? try fewer --workers"
        elif "WORLD_SIZE" in os.environ and re.search("gloo|nccl|connection|peer", message, re.IGNORECASE):
            message, patience = f"{message} (if another process of this run ended before, its own message says why)", 15
            if SIGNALS:
                sys.exit(1)
        else:
            raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    time.sleep(patience)
    sys.exit(f"error: {message}")


class Signals:
    """Until `restore`, Ctrl-C and SIGTERM are only taken note of; `heard` tells all ranks alike.

    Launchers repeat signals; only a second Ctrl-C that somebody typed ends the run at once."""

    KINDS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, device):
        def note(number, _):
            SIGNALS.append(number)
            if number == signal.SIGINT and world_size() == 1:
                signal.signal(number, signal.default_int_handler)

        SIGNALS.clear()
        apart = world_size() > 1 and device.type == "cuda"
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT) if apart else None
        self.former = {number: signal.signal(number, note) for number in self.KINDS}

    def restore(self):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def heard(self):
        count = torch.tensor(len(SIGNALS))
        if world_size() > 1:  # through gloo, so that no GPU is waited for
            dist.all_reduce(count, group=self.group)
        return bool(count)

    @classmethod
    def ignore(cls, _):
        """For loader processes, which get the terminal's and the scheduler's signals too: they must outlive a step."""
        for number in cls.KINDS:
            signal.signal(number, signal.SIG_IGN)


class Finite:
    """A step whose losses or gradient are not finite changes no weight, nor does any later one, until `look` says so.

    So the host need not look, that is wait for the GPU, at every step."""

    def __init__(self, optimizer, device):
        self.optimizer, self.numbers = optimizer, torch.zeros(6, device=device)
        optimizer.found_inf = torch.zeros((), device=device)  # AdamW's own switch (fused): 1 skips its step

    def admit(self, step, parts, norm):
        """Before optimizer.step(). parts: loss, L_seg, L_sgd, L_sam of this rank; norm of the gradient."""
        now = torch.stack([x.detach().float() for x in parts])
        if world_size() > 1:
            dist.all_reduce(now)
        now = torch.cat([now / world_size(), norm.float()[None], torch.full((1,), step, device=now.device)])
        self.numbers = torch.where(self.optimizer.found_inf > 0, self.numbers, now)
        self.optimizer.found_inf = (~self.numbers.isfinite().all()).float()

    def look(self):
        """-> loss, L_seg, L_sgd, L_sam, means over ranks. Raises NotFinite of the first bad step."""
        *parts, norm, step = self.numbers.tolist()
        if not all(map(math.isfinite, (*parts, norm))):
            raise NotFinite(int(step), *parts, norm)
        return parts


class NotFinite(Exception):
    def __init__(self, step, loss, seg, sgd, sam, norm):
        super().__init__(f"step {step} is not finite: loss {loss}, seg {seg}, sgd {sgd}, sam {sam}, norm {norm}")
        self.step = step
