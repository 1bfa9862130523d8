"""Options that had other names before."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

RENAMED = {"correct": "bias_correction"}  # what options were called before, and are now


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns options by their names of today.

    Warns:
        DeprecationWarning: an option has a name of before.
    """
    found = {}
    for name, value in values.items():
        if name in RENAMED:
            warnings.warn(f"{name} is called {RENAMED[name]} now", DeprecationWarning, stacklevel=4)
        found[RENAMED.get(name, name)] = value
    return found
