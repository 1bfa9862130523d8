"""Finds packed weights that the installed transformers and compressed-tensors do not load, though others do."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from opt8bit.quant.packing import WORD

STREAM = (0, 18)  # of compressed-tensors: from then on codes stand bit to bit, before whole ones in words of 32 bits


class Codes(NamedTuple):
    """Holds what decides whether the packed weight of a layer can be loaded.

    Attributes:
        bits: of a code.
        symmetric: whether the grid is.
        whole_codes: whether no code stands in two words.
    """

    bits: int
    symmetric: bool
    whole_codes: bool = False


def not_loaded_here(layers: Iterable[Codes]) -> list[str]:
    """Returns a line for each kind of packed weights that cannot be loaded here, or none where nothing is installed."""
    found, kinds = [], set(layers)
    transformers, package = _installed("transformers"), _installed("compressed-tensors")
    if transformers is None or package is None:
        return []
    here = f"transformers {version('transformers')} with compressed-tensors {version('compressed-tensors')}, as here,"
    # Of widths that divide a word both packings are the same.
    odd = {kind.bits for kind in kinds if WORD % kind.bits and kind.whole_codes is (package >= STREAM)}
    if odd:
        widths = ", ".join(map(str, sorted(odd)))
        can = "from compressed-tensors 0.18 on it can" if package < STREAM else "up to compressed-tensors 0.17 it can"
        found.append(f"{here} cannot load {widths} bits{'' if package < STREAM else ' packed so'}, {can}")
    if transformers < (5,) and package >= STREAM and not all(kind.symmetric for kind in kinds):
        found.append(
            f"{here} cannot load grids that are not symmetric, transformers 5 can, or compressed-tensors 0.15 to 0.17 "
            "(with 2, 4 or 8 bits)"
        )
    return found


def _installed(package: str) -> tuple[int, ...] | None:
    """Returns the first two numbers of a package's version, or None if it is not installed."""
    try:
        return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version(package).split(".")[:2])
    except PackageNotFoundError:
        return None
