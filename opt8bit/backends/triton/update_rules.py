"""The rules of kernels/update_rules.h for a GPU, by the same names: steps of elements in float32, a file per family."""

from __future__ import annotations

import functools
import importlib.util
import inspect

from opt8bit.backends.rule import Rule, check_alike
from opt8bit.backends.triton.rules.rule import Functions


@functools.cache
def functions_of(rule: Rule) -> Functions | None:
    """Returns what a rule has here, or None if nothing.

    Raises:
        TypeError: its hyper-parameters are others, or in another order.
    """
    name = f"{__package__}.rules.{rule.family}"
    if importlib.util.find_spec(name) is None:
        return None
    functions: Functions | None = importlib.import_module(name).RULES.get(rule.name)
    if functions is not None:
        *hyper, _, _ = inspect.signature(functions.constants.fn).parameters
        check_alike(rule, "hyper", tuple(hyper), "the function in Triton")
    return functions
