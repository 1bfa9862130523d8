"""``opt8bit run``: a script or module as Python would run it, after bitsandbytes' optimizers have been replaced."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

from opt8bit.cli.errors import CommandError
from opt8bit.integrations.bitsandbytes import install


def run(target: str, arguments: Sequence[str], is_module: bool) -> None:
    """Runs a script or a module in this process as ``__main__``, with :func:`install` before it.

    Args:
        target: path of a script, or name of a module.
        arguments: what it finds in ``sys.argv``.
        is_module: whether ``target`` is a module.

    Raises:
        CommandError: there is no such script.
    """
    if not is_module and not Path(target).exists():
        raise CommandError(f"no such script: {target}")
    install()
    sys.argv = [target, *arguments]
    sys.path.insert(0, os.getcwd() if is_module else str(Path(target).resolve().parent))
    if is_module:
        runpy.run_module(target, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(target, run_name="__main__")
