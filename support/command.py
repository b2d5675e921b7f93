"""How a command ends early: errors in one line, signals that save first. Several processes end at the same step."""
import atexit
import multiprocessing
import os
import re
import signal
import sys

import torch
import torch.distributed as dist

from support import UserError, first_line
from support.processes import world_size

EVERY = 10  # steps between two looks at the other processes' signals


def run_command(main, parse):
    """Runs main(parse()); errors that the user can fix are printed in one line, without a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # not in notebooks
            stream.reconfigure(errors="replace")  # no output fails for a letter that a terminal or log file lacks
    args = parse()
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
            message += " (if another process of this run ended before, its own message says why)"
        else:
            raise
    sys.exit(f"error: {message}")


def end_loaders():
    """At exit Python sends the loader processes SIGTERM, which they ignore, and would wait for them for ever."""
    if hasattr(signal, "SIGCHLD"):  # not on Windows
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # else PyTorch reports the kill as an error
    for process in multiprocessing.active_children():
        process.kill()


class Signals:
    """Until `restore`, Ctrl-C and SIGTERM only raise a flag, which `heard` shows to all processes at the same step.

    Launchers repeat signals, so only a second Ctrl-C in a run of one process ends it at once."""

    KINDS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, device):
        self.device, self.noted = device, []
        self.former = {number: signal.signal(number, self.note) for number in self.KINDS}

    def note(self, number, _):
        self.noted.append(number)
        if number == signal.SIGINT and world_size() == 1:
            signal.signal(number, signal.default_int_handler)

    def heard(self, step):
        """Did any process get a signal? Several processes ask each other at every tenth step."""
        if world_size() == 1:
            return bool(self.noted)
        if step % EVERY:
            return False
        count = torch.tensor(len(self.noted), device=self.device)
        dist.all_reduce(count)
        return bool(count)

    def restore(self):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    @classmethod
    def ignore(cls, _):
        """worker_init_fn of loaders, which get the terminal's and the scheduler's signals too."""
        for number in cls.KINDS:
            signal.signal(number, signal.SIG_IGN)
