"""Needed by every command, but not part of the method: checkpoints, errors, signals, processes, pictures."""


class UserError(ValueError):
    """Something that the user can mend: a command prints the message in one line, without a traceback."""


def first_line(error, length=100):
    return str(error).strip().split("\n")[0][:length]
