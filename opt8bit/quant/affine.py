"""Grids of evenly spaced values with a scale and a minimum for each block, both stored as floating-point numbers."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor

from opt8bit.quant.evenly_spaced import EvenlySpaced, Line, Weighted, least, search, squared_error
from opt8bit.quant.grid import checked_range

CUTS = (-0.4, 0.4, 1.2, 2.5, 6.0)  # steps that the search starts with cut off either end of a block's range
MOST = 0.22  # of the range that is cut off an end


class AffineGrid(EvenlySpaced[Line]):
    """Rounds to ``scale * q + minimum`` for q = 0 .. 2^bits - 1; the zero point is a real number.

    Args:
        bits: 1 to 8.
        range: "minmax" spans a block's smallest and largest weight. "mse" searches for the scale and the minimum of
            least squared error: from several parts of that range, codes and the best line for them take turns.
        scale_dtype: of scales and minima; see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.
    """

    params_type = Line

    def __init__(self, bits: int, *, range: str = "minmax", scale_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(bits, scale_dtype)
        self.range = checked_range(range)

    def __repr__(self) -> str:
        return f"AffineGrid({self.bits}, range={self.range!r}, scale_dtype={self.scale_dtype})"

    def stored_bits(self, codes: Tensor, params: Line) -> int:
        return self.bits * codes.numel() + 2 * 8 * self.scale_dtype.itemsize * params.scale.numel()

    def line(self, params: Line) -> Line:
        return params

    def near_scales(self, scale: Tensor, params: Line) -> list[Tensor]:
        return [self.storable(scale)]

    def near_minimum(self, minimum: Tensor, params: Line) -> Tensor:
        return self.nearest_stored(minimum)

    def of_line(self, line: Line, params: Line) -> Line:
        return line

    def fit(self, block: Tensor, importance: Tensor | None = None) -> Line:
        low, high = block.amin(-1, keepdim=True), block.amax(-1, keepdim=True)
        full = self._stored(spanning(low, high, self.largest))
        if self.range == "minmax":
            return full
        starts = cut(low, high, self.largest)
        found = self._stored(search(block, starts, self.largest, Weighted(block, importance).line))
        return least((line, squared_error(block, self.nearest(block, line), importance)) for line in (full, found))

    def _stored(self, line: Line) -> Line:
        # A scale of 0, of a block whose weights are all alike, is as good as any.
        return Line(self.storable(torch.where(line.scale > 0, line.scale, 1)), self.nearest_stored(line.minimum))


def spanning(low: Tensor, high: Tensor, largest: int) -> Line:
    """Returns the line of ``largest + 1`` values whose ends are those of a range."""
    return Line((high - low) / largest, low)


def cut(low: Tensor, high: Tensor, largest: int) -> Iterator[Line]:
    """Yields lines that span a range whose ends are cut off, or put further out, each by itself."""
    parts = sorted({min(steps / largest, MOST) for steps in CUTS})
    span = high - low
    for below, above in product(parts, parts):
        yield spanning(low + span * below, high - span * above, largest)
