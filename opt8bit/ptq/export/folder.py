"""A folder that appears under its name when everything in it is written."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

WORK = "work"  # where a run keeps what it has finished; not part of the result
LOCK = "lock"


@contextmanager
def new_folder(path: Path, *, resume: bool = False) -> Iterator[Path]:
    """Yields a folder beside ``path`` to write into; it takes that name at the end.

    With an error it disappears, unless its folder :data:`WORK` has something in it: then a later call may go on.

    Args:
        resume: whether to go on in a folder that an earlier call left, of which only :data:`WORK` is kept.

    Raises:
        FileExistsError: there is something at ``path``, somebody else is writing to it, or an earlier call has left
            something and ``resume`` is not set.
    """
    if path.exists() or path.is_symlink():
        raise FileExistsError(f"{path} exists: give the name of a folder that does not")
    missing = [parent for parent in path.parents if not parent.exists()]
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made = not partial.exists()
        partial.mkdir(exist_ok=True)
    except OSError:
        _remove(missing)
        raise
    with _locked(partial):
        if not made and not resume:
            raise FileExistsError(f"{partial} is an unfinished run's: resume it, or delete that folder")
        for left in partial.iterdir():
            if left.name not in (WORK, LOCK):
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        try:
            yield partial
        except BaseException:
            work = partial / WORK
            if not (work.is_dir() and any(work.glob("block-*"))):
                shutil.rmtree(partial, ignore_errors=True)
                _remove(missing)
            raise
        if path.exists():
            raise FileExistsError(f"somebody else has made {path} meanwhile; the result is in {partial}")
        _readable(partial)
        shutil.rmtree(partial / WORK, ignore_errors=True)
        os.rename(partial, path)  # with the lock still in it: nobody may take the folder before it has its name
        (path / LOCK).unlink()


def _remove(folders: list[Path]) -> None:
    with suppress(OSError):  # somebody else has put something there by now
        for folder in folders:
            folder.rmdir()


def _readable(folder: Path) -> None:
    """Lets everyone read the files that new files let read: safetensors makes its own for their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~mask)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds a lock on a folder, which one process has at a time, and none that has ended.

    Raises:
        FileExistsError: another one holds it.
    """
    with (folder / LOCK).open("a") as file:
        _lock(file, folder)
        if not (folder / LOCK).exists() or (folder / LOCK).stat().st_ino != os.fstat(file.fileno()).st_ino:
            raise FileExistsError(f"another run has just finished with {folder}")
        yield


def _lock(file: IO[str], folder: Path) -> None:
    try:
        import fcntl
    except ImportError:  # Windows: whoever starts a second run there has to know
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise FileExistsError(f"another run is writing {folder}") from None
