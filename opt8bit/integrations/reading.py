"""Options that configurations and command lines write as strings, read before an optimizer sees them."""

from __future__ import annotations

import ast
from math import inf, nan
from typing import Any, TypeGuard

from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.plain import PLAIN

WORDS = {"true": True, "false": False, "none": None, "null": None, "nan": nan, "inf": inf, "-inf": -inf}
NAMED = {kind.__name__.lower(): kind for kind in PLAIN}


def read(value: Any) -> Any:
    """Returns the number, the flag or the numbers that a string writes.

    Args:
        value: anything. What is neither a string nor a list is returned as it is.

    Returns:
        The value of a Python literal, or of ``true``, ``false``, ``none``, ``null``, ``nan``, ``inf`` and ``-inf`` in
        any case; a list as a tuple. Other strings are returned as they are: options have strings among their values,
        too.

    Example:
        >>> read("256"), read("(0.9, 0.95)"), read("1e-3"), read("true"), read("backward")
        (256, (0.9, 0.95), 0.001, True, 'backward')
    """
    if isinstance(value, str):
        word = value.strip()
        if word.lower() in WORDS:
            return WORDS[word.lower()]
        try:
            value = ast.literal_eval(word)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return value
    return tuple(value) if isinstance(value, list) else value


def read_options(text: str) -> dict[str, Any]:
    """Returns options by name from one string, as ``--optim_args`` holds them.

    Args:
        text: ``name=value`` pairs between commas; commas inside of brackets belong to a value.

    Raises:
        ValueError: the string is not of that form, or has a name twice.

    Example:
        >>> read_options("block_size=128, betas=(0.9, 0.95), stochastic_rounding=true")
        {'block_size': 128, 'betas': (0.9, 0.95), 'stochastic_rounding': True}
    """
    source = f"options({text})"
    try:
        call = ast.parse(source, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        call = None
    if not _names_each_once(call) or ast.get_source_segment(source, call) != source:
        raise ValueError(f"options must be written as name=value, name=value, got {text!r}")
    return {str(each.arg): read(ast.get_source_segment(source, each.value)) for each in call.keywords}


def _names_each_once(call: ast.expr | None) -> TypeGuard[ast.Call]:
    """Tells whether it is a call of a function by name, whose arguments all have names that differ."""
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        return False
    names = [keyword.arg for keyword in call.keywords]
    return None not in names and len(set(names)) == len(names)


def optimizer_named(name: str) -> type[Optimizer8bit]:
    """Returns an optimizer of :mod:`opt8bit.optim.plain` by its name in any case, with ``8bit`` at its end or without.

    Raises:
        ValueError: there is none of that name.
    """
    found = NAMED.get(name.lower().removesuffix("8bit").removesuffix("_"))
    if found is None:
        raise ValueError(f"optimizer must be one of {', '.join(kind.__name__ for kind in PLAIN)}, got {name!r}")
    return found
