"""Options that had other names before."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opt8bit.warning import warn

RENAMED = {"correct": "bias_correction"}  # what options were called before, and are now


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options by their names of today.

    Warns:
        DeprecationWarning: an option has a name of before.
    """
    found = {}
    for name, value in values.items():
        if name in RENAMED:
            warn(f"{name} is called {RENAMED[name]} now", DeprecationWarning)
        found[RENAMED.get(name, name)] = value
    return found
