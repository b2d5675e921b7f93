"""train.py with the body of another run, frozen: only the adapter learns, and in a control the linear layer.

    python -m experiments.frozen_body runs/other/last.pt [flags of train.py]
"""
import sys
from pathlib import Path

import model as models
import train
from support.checkpoint import read_checkpoint
from support.command import run_command


def with_body(build, path):
    """model.build, whose body then gets its weights from this checkpoint and no gradient."""
    def built(*args, **settings):
        model, state = build(*args, **settings), read_checkpoint(path)["model"]
        part = "body."
        model.body.load_state_dict({name[len(part):]: x for name, x in state.items() if name.startswith(part)})
        model.body.requires_grad_(False)
        return model
    return built


if __name__ == "__main__":
    models.build = with_body(models.build, Path(sys.argv.pop(1)))
    run_command(train.main, train.parse)
