"""A command's settings in one table: the parser, the saved config, --resume and model.build all read it."""
import argparse
from typing import NamedTuple

from support import UserError

RECIPE = "the data set's recipe"  # as a default: filled in when the data set is known


class Setting(NamedTuple):
    name: str  # on the command line --name, with - for _
    default: object  # RECIPE, or a value; None where the help says what happens then
    kind: object  # a type, or the tuple of choices
    part: str  # data, model (what `build` takes), method, run; or machine: not saved
    help: str
    span: tuple = ()  # least and largest value; beyond, nothing sensible can happen
    may_change: bool = False  # by --resume; anything else makes another run


def parser(table, usage, description):
    """-> argparse's parser with a group for each part."""
    whole = argparse.ArgumentParser(usage=usage, description=description,
                                    formatter_class=argparse.RawDescriptionHelpFormatter)
    groups = {}
    for s in table:
        if s.part not in groups:
            groups[s.part] = whole.add_argument_group(s.part)
        default = "" if s.default in (None, False) else f" (default: {s.default})"
        how = dict(help=s.help + default, default=None if s.default == RECIPE else s.default)
        if s.kind is bool:
            how |= dict(action="store_true")
        elif isinstance(s.kind, tuple):
            how |= dict(choices=s.kind, metavar="NAME")
        else:
            how |= dict(type=s.kind, metavar={int: "N", float: "X", str: "NAME"}.get(s.kind, "FOLDER"))
        groups[s.part].add_argument(f"--{s.name.replace('_', '-')}", **how)
    return whole


def check_spans(table, args):
    for s in table:
        value = getattr(args, s.name)
        if s.span and value is not None and not s.span[0] <= value <= s.span[1]:
            raise UserError(f"--{s.name.replace('_', '-')} is {value}: expected {s.span[0]} to {s.span[1]}")


def of_part(table, args, *parts):
    """-> {name: value} of these parts, in the table's order."""
    return {s.name: getattr(args, s.name) for s in table if s.part in parts}
