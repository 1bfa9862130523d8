"""Flags of the command line for the options of a dataclass. Needs no torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Container, Mapping
from typing import Any

from opt8bit.recipe.options import Option, options_of


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Prints the defaults that say something."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        silent = action.default in (None, False, argparse.SUPPRESS)
        return action.help if silent else super()._get_help_string(action)


def add_flags(parser: argparse._ActionsContainer, owner: type[Any], names: Container[str] | None = None) -> None:
    """Adds a flag for each option of a dataclass, or for those of some names.

    Flags that are not given leave no attribute behind.
    """
    for name, option in options_of(owner).items():
        if names is None or name in names:
            _add_flag(parser, name, option, getattr(owner, name))


def _add_flag(parser: argparse._ActionsContainer, name: str, option: Option, default: Any) -> None:
    flag, words = f"--{option.flag or name.replace('_', '-')}", option.help
    if default and "(default:" not in words:
        words = f"{words} (default: {default})"
    about: dict[str, Any] = {"help": words, "default": argparse.SUPPRESS}
    if option.several:  # one for each flag: a list behind a flag would swallow what the command itself takes
        about |= {"action": "append", "help": f"{words}; may be given several times"}
    if option.kind is bool:
        parser.add_argument(flag, dest=name, action=argparse.BooleanOptionalAction, **about)
        for word, help in option.besides.items():
            parser.add_argument(
                f"{flag}-{word}", dest=name, action="store_const", const=word, default=argparse.SUPPRESS, help=help
            )
    elif not isinstance(option.kind, type):
        parser.add_argument(flag, dest=name, choices=tuple(option.kind), **about)
    else:
        parser.add_argument(flag, dest=name, type=number(option), metavar=option.metavar, **about)


def add_old_flags(parser: argparse.ArgumentParser, renamed: Mapping[str, str]) -> None:
    """Adds flags under the names that options had before, without a word in the help."""
    for name in renamed:
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, help=argparse.SUPPRESS)


def given(options: argparse.Namespace, names: Container[str]) -> dict[str, Any]:
    """Returns the values of options that the command line has."""
    return {name: value for name, value in vars(options).items() if name in names}


def number(option: Option) -> Callable[[str], float]:
    """Returns what reads a number that an option can have."""

    def parse(text: str) -> float:
        value = int(text) if option.kind is int else float(text)
        try:
            option.check_size("it", value)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix("it ")) from error
        return value

    parse.__name__ = "whole number" if option.kind is int else "number"  # in argparse's messages
    return parse


def at_least(least: int) -> Callable[[str], float]:
    """Returns what reads a whole number that is no smaller."""
    return number(Option(int, "", least=least))
