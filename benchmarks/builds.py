"""How a build is run: an interpreter that has one, or a folder that holds its package. Needs no package itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def started_as(place: Path, **variables: str) -> tuple[str, dict[str, str]]:
    """The interpreter that runs a build, and its environment.

    Args:
        place: a Python interpreter, or a folder with a package ``opt8bit``, for the interpreter that runs this.
        variables: more of the environment.
    """
    environment = {**os.environ, **variables}
    if place.is_dir():
        return sys.executable, {**environment, "PYTHONPATH": f"{place.absolute()}"}
    return f"{place.absolute()}", environment
