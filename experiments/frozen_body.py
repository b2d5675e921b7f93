"""train.py with the body of another run, frozen: the adapter learns, and with --head linear the linear layer too.

    python -m experiments.frozen_body runs/other/last.pt [flags of train.py]
"""
import argparse
from pathlib import Path

import model as models
import train
from support.checkpoint import read_checkpoint
from support.command import run_command
from support.processes import from_first


def with_body(build, checkpoint):
    """model.build, whose body then gets its weights from this checkpoint and stays as it is."""
    def built(*args, **settings):
        model = build(*args, **settings)
        state, prefix = from_first(lambda: read_checkpoint(checkpoint))["model"], "body."
        model.load_trained_state({name: state[name] if name.startswith(prefix) else x
                                  for name, x in model.trained_state().items()})
        model.body.eval().requires_grad_(False)
        model.body.train = lambda mode=True: model.body  # batch norm's statistics stay, too
        return model
    return built


def main(args):
    models.build = with_body(models.build, args.checkpoint)
    return train.main(train.parse(args.flags))


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m experiments.frozen_body", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="last.pt of a run with the same body")
    args, args.flags = parser.parse_known_args(argv)
    return args


if __name__ == "__main__":
    run_command(main, parse)
