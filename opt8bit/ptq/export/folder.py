"""A folder that appears under its name when everything in it is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder beside ``path`` to write into; it takes that name at the end, or disappears with an error.

    Raises:
        FileExistsError: there is something at ``path``.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: give the name of a folder that does not")
    missing = [parent for parent in path.parents if not parent.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):  # somebody else has put something there by now
            for parent in missing:
                parent.rmdir()
        raise
