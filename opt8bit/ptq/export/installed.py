"""Which packed weights the installed transformers and compressed-tensors do not load, though others do."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

from opt8bit.quant.packing import WORD
from opt8bit.quant.uniform import UniformGrid

STREAM = (0, 18)  # of compressed-tensors: from then on codes stand bit to bit, before whole ones in words of 32 bits


def not_loaded_here(grids: Iterable[UniformGrid]) -> list[str]:
    """Returns a line for each kind of packed weights that cannot be loaded here; none where nothing is installed."""
    found, grids = [], list(grids)
    transformers, package = _installed("transformers"), _installed("compressed-tensors")
    if transformers is None or package is None:
        return []
    here = f"transformers {version('transformers')} with compressed-tensors {version('compressed-tensors')}, as here,"
    odd = sorted({grid.bits for grid in grids if WORD % grid.bits})
    if odd and package < STREAM:
        widths = ", ".join(map(str, odd))
        found.append(f"{here} cannot load {widths} bits, from compressed-tensors 0.18 on it can: verify will fail")
    if transformers < (5,) and package >= STREAM and not all(grid.symmetric for grid in grids):
        found.append(
            f"{here} cannot load grids that are not symmetric, transformers 5 can, or compressed-tensors 0.15 to 0.17 "
            "(with 2, 4 or 8 bits): verify will fail"
        )
    return found


def _installed(package: str) -> tuple[int, ...] | None:
    """The first two numbers of a package's version; None if it is not installed."""
    try:
        return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return None
