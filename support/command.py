"""How a command ends early: errors in one line, signals that save first, losses that are not finite.

With several processes all of them end at the same step, and only the process that failed prints a message.
"""
import atexit
import math
import multiprocessing
import os
import re
import signal
import sys
import time

import torch
import torch.distributed as dist

from support import UserError, first_line
from support.processes import from_first, world_size

EVERY = 10  # steps between two looks at the other processes' signals
SIGNALS = []  # those that Signals took note of


def run_command(main, parse):
    """Runs main(parse()); errors that the user can fix are printed in one line, without a traceback.

    torchrun ends all processes as soon as one has ended. So the others wait a little before they speak, those that
    only lost a connection longest, or they say nothing if a signal came before."""
    args, lost = parse(), False
    atexit.register(end_loaders)
    try:
        result = main(args)
        if world_size() > 1:  # nobody leaves while another still talks to it
            dist.barrier()
            dist.destroy_process_group()
        return result
    except KeyboardInterrupt:
        message = "interrupted"
    except (UserError, OSError) as error:  # OSError: a full disk, a folder that may not be written
        message = str(error).strip()
        if "Traceback" in message:  # from a loader process: the message itself is the last line
            message = message.split("\n")[-1].split("Error: ", 1)[-1]
    except torch.cuda.OutOfMemoryError as error:
        message = f"{first_line(error, 1000)} Try a smaller --batch-size, --crop or --body; at test, --short-side"
    except RuntimeError as error:
        message = first_line(error, 1000)
        if message.startswith("DataLoader worker"):
            message += ": out of memory? try fewer --workers"
        elif "WORLD_SIZE" in os.environ and re.search("gloo|nccl|connection|peer", message, re.IGNORECASE):
            message, lost = f"{message} (if another process of this run ended before, its own message says why)", True
        else:
            raise
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # first, so that no signal falls between this line and the next
    if lost and SIGNALS:
        sys.exit(1)
    time.sleep(30 if lost else 15 if int(os.environ.get("RANK", 0)) else 0)
    sys.exit(f"error: {message}")


def end_loaders():
    """At exit Python sends the loader processes SIGTERM, which they ignore, and would wait for them for ever."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch reports the kill as an error
    for process in multiprocessing.active_children():
        process.kill()


class Signals:
    """Until `restore`, Ctrl-C and SIGTERM only raise a flag, which `heard` shows to all processes at the same step.

    Launchers repeat signals, so only a second Ctrl-C in a run of one process ends it at once."""

    KINDS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, device):
        def note(number, _):
            SIGNALS.append(number)
            if number == signal.SIGINT and world_size() == 1:
                signal.signal(number, signal.default_int_handler)

        SIGNALS.clear()
        self.device = device
        self.former = {number: signal.signal(number, note) for number in self.KINDS}

    def heard(self, step):
        """Did any process get a signal? Several processes ask each other at every tenth step."""
        if world_size() == 1:
            return bool(SIGNALS)
        if step % EVERY:
            return False
        count = torch.tensor(len(SIGNALS), device=self.device)
        dist.all_reduce(count)
        return bool(count)

    def restore(self):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    @classmethod
    def ignore(cls, _):
        """worker_init_fn of loaders, which get the terminal's and the scheduler's signals too: they must outlive a
        step."""
        for number in cls.KINDS:
            signal.signal(number, signal.SIG_IGN)


class Watch:
    """Ends the run at the first step whose losses or gradient are not finite; nothing of that step is kept.

    A CPU is asked at every step. A GPU is not waited for: fused AdamW's own switch, `found_inf`, makes the bad step
    and all later ones change no weight, until `look` reads the numbers."""

    def __init__(self, optimizer, device, rescue):
        """rescue(bad, now): step `bad` was not finite, which was seen at step `now` (the first process calls it).
        It saves the state before `bad` and returns the names of that step's files."""
        self.optimizer, self.rescue = optimizer, rescue
        self.at_once, self.values = device.type != "cuda", None

    def admit(self, step, parts, norm):
        """Before optimizer.step(). parts {name: scalar of this process}, norm of the gradient."""
        self.now, self.names = step, [*parts, "gradient"]
        values = torch.stack([x.detach().float() for x in parts.values()])
        if world_size() > 1:
            dist.all_reduce(values)
        values = torch.cat([values / world_size(), norm.float()[None], torch.full((1,), step, device=values.device)])
        if self.values is not None:
            values = torch.where(self.values.isfinite().all(), values, self.values)  # the first bad ones stay
        self.values = values
        if self.at_once:
            self.look()
        else:
            self.optimizer.found_inf = (~self.values.isfinite().all()).float()

    def look(self):
        """-> {name: value}, means over processes. Raises UserError if they are not finite."""
        *values, step = self.values.tolist()
        numbers = dict(zip(self.names, values))
        if all(map(math.isfinite, values)):
            return numbers
        step, saved = int(step), from_first(lambda: self.save(int(step)))
        parts = ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        raise UserError(f"step {step} is not finite: {parts}; {saved}")

    def save(self, step):
        try:
            files = self.rescue(step, self.now)
        except UserError as error:  # batch norm's statistics are not finite either, or the disk is full
            return f"{error}; go on with --resume and a lower --lr"
        return f"the state before it is saved: go on with --resume and a lower --lr, or look at its images: " \
               f"{', '.join(files)}"
