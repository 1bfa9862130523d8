"""Arrays to calibrate on, in files of numpy's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from opt8bit.cli.errors import CommandError

SUFFIX = ".npz"
Arrays = Mapping[str, np.ndarray]  # by name; the first dimension counts samples


def array_files(name: str) -> list[Path]:
    """Returns the files of a name: one that ends in .npz, or those in a folder, or none where it is something else."""
    path = Path(name).expanduser()
    return sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path] if path.suffix == SUFFIX else []


def read_arrays(files: list[Path]) -> dict[str, np.ndarray]:
    """Returns the arrays of files, those of one name one behind another.

    Raises:
        CommandError: a file cannot be read, or arrays do not fit each other.
    """
    parts = [_read(file) for file in files]
    try:
        arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    except (ValueError, KeyError) as error:
        raise CommandError(f"the files of {files[0].parent} do not hold arrays of the same kind: {error}") from error
    if len({len(array) for array in arrays.values()}) != 1:
        found = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        raise CommandError(f"{files[0]}: all arrays must have as many samples in their first dimension, got {found}")
    return arrays


def choose_rows(arrays: Arrays, *, samples: int, held_out: int, seed: int) -> tuple[Arrays, Arrays | None]:
    """Chooses samples to calibrate on, and others that tell how good the result is.

    Seed 0 takes the first ones, any other seed draws them.

    Args:
        arrays: of all samples.
        samples: to calibrate on; fewer, if there are no more.
        held_out: others, which must be there.
        seed: of the draw.

    Raises:
        CommandError: there are not more than ``held_out``.
    """
    count = len(next(iter(arrays.values())))
    if count <= held_out:
        raise CommandError(f"{held_out} samples are held out, and there are {count}: use a smaller --held-out")
    order = np.arange(count) if seed == 0 else np.random.default_rng(abs(seed)).permutation(count)
    samples = min(samples, count - held_out)
    chosen, rest = order[:samples], order[samples : samples + held_out]
    others = {name: array[rest] for name, array in arrays.items()} if held_out else None
    return {name: array[chosen] for name, array in arrays.items()}, others


def batches_of(arrays: Arrays, size: int) -> list[dict[str, np.ndarray]]:
    """Returns the samples in batches; the last one may be smaller."""
    count = len(next(iter(arrays.values())))
    return [{name: array[at : at + size] for name, array in arrays.items()} for at in range(0, count, size)]


def _read(file: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            found = dict(arrays)
    except (OSError, ValueError, EOFError) as error:
        raise CommandError(f"{file} cannot be read as arrays: {error}") from error
    if not found or any(not array.ndim for array in found.values()):
        raise CommandError(f"{file} must have arrays with samples in their first dimension")
    return found
