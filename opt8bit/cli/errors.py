"""Defines what the command says in place of a traceback."""


class CommandError(Exception):
    """Raised for something that the user can mend."""
