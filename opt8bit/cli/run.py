"""``opt8bit run``: a script or module as Python would run it, after bitsandbytes' optimizers have been replaced."""

from __future__ import annotations

import os
import pkgutil
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from opt8bit.cli.errors import CommandError
from opt8bit.integrations.bitsandbytes import install


def run(target: str, arguments: Sequence[str], is_module: bool) -> None:
    """Runs a script or a module in this process as ``__main__``, with :func:`install` before it.

    Args:
        target: path of a script, of a folder or zip file with a ``__main__.py``, or name of a module.
        arguments: what it finds in ``sys.argv``.
        is_module: whether ``target`` is a module.

    Raises:
        CommandError: there is no such script.
    """
    path = os.path.abspath(target)
    if not is_module and not os.path.exists(path):
        raise CommandError(f"no such script: {target}")
    install()
    sys.argv = [target, *arguments]
    sys.modules["__main__"] = main = ModuleType("__main__")  # and stays: threads and atexit may look for it later
    if is_module:
        _put_on_path(os.getcwd())
        _run_as_main(target, True)
    elif pkgutil.get_importer(path):
        _put_on_path(path)
        _run_as_main("__main__", False)
    else:
        _put_on_path(str(Path(path).resolve().parent))
        main.__file__ = path
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(main))


def _put_on_path(folder: str) -> None:
    """Puts a folder where modules are looked up first, in place of the one that Python has put there for opt8bit."""
    if not getattr(sys.flags, "safe_path", False):
        del sys.path[0]
    sys.path.insert(0, folder)


def _run_as_main(name: str, is_named: bool) -> None:
    """Runs a module in the ``__main__`` that there is, by the function that ``python -m`` itself calls."""
    runpy._run_module_as_main(name, is_named)  # pyright: ignore[reportAttributeAccessIssue]
