"""Names of options: those of before, those of other programs, and those that nobody knows."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

from opt8bit.warning import warn

RENAMED = {"correct": "bias_correction"}  # what options were called before, and are now
# What other programs call it, and what to say here.
ELSEWHERE = {
    **dict.fromkeys(("sym", "w_sym"), "symmetric"),
    **dict.fromkeys(("desc_act", "actorder"), "act_order"),
    **dict.fromkeys(("wbits", "w_bits", "num_bits", "nbits"), "bits"),
    **dict.fromkeys(("groupsize", "group", "q_group_size"), "group_size"),
    **dict.fromkeys(("ignore", "targets", "dynamic", "modules_to_not_convert"), "overrides={pattern: None}"),
    **dict.fromkeys(("damping", "damp_percent", "percdamp", "dampening_frac"), "method=GPTQ(damping=...)"),
    "scheme": "bits, group_size and symmetric",
    "observer": "range",
    "dataset": "calibration, which is no part of a recipe",
}
Owner = TypeVar("Owner", bound=type)


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options by their names of today.

    Raises:
        ValueError: an option has two of its names.

    Warns:
        DeprecationWarning: an option has a name of before.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        today = RENAMED.get(name, name)
        if today != name:
            warn(f"{name} is called {today} now", DeprecationWarning)
        if today in found:
            before = next(old for old, new in RENAMED.items() if new == today)
            raise ValueError(f"{before} and {today} are one option: give {today} only")
        found[today] = value
    return found


def unknown(name: object, allowed: Iterable[str], whose: str = "") -> str:
    """Returns what to say of an option that does not exist: which there are, and what it is called here, if known."""
    there = ELSEWHERE.get(name) if isinstance(name, str) else None
    hint = "" if there is None else f"; here it is {there}"
    return f"{name!r} is none of {whose}{', '.join(allowed)}{hint}"


def with_checked_names(owner: Owner) -> Owner:
    """Makes a dataclass accept its fields' earlier names, with a warning, and explain unknown ones."""
    create: Any = owner.__init__  # type: ignore[misc]
    allowed = [each.name for each in fields(owner)]

    @functools.wraps(create)
    def __init__(self: Any, *args: Any, **options: Any) -> None:
        options = renamed(options)
        for name in options:
            if name not in allowed:
                raise TypeError(unknown(name, allowed, f"a {owner.__name__.lower()}'s "))
        create(self, *args, **options)

    owner.__init__ = __init__  # type: ignore[misc]
    return owner
