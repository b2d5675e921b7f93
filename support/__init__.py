"""What every command needs and no reader of the method must know: checkpoints, errors, signals, processes, pictures."""


class UserError(ValueError):
    """Something that the user can mend: a command prints the message in one line, without a traceback."""
