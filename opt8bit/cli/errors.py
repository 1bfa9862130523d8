"""What the command says in place of a traceback."""


class CommandError(Exception):
    """Something the user can mend."""
