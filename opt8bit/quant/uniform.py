"""Grids of evenly spaced values."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from opt8bit.quant.grid import FRACTIONS, STEP, Grid, best, checked_range

RESTRICTED = "restricted"


class UniformParams(NamedTuple):
    """Holds what a :class:`UniformGrid` keeps per block."""

    scale: Tensor  # positive
    zero_point: Tensor  # integers


class UniformGrid(Grid[UniformParams]):
    """Rounds to evenly spaced values: ``(q - zero_point) * scale`` for q = 0 .. 2^bits - 1, zero among them.

    Args:
        bits: 2 to 8.
        symmetric: False for a zero point that is fitted and stored. True for none, and a scale that has the sign: codes
            stand for ``-2^(bits-1)`` to ``2^(bits-1) - 1`` steps, or for the mirror image of these, so that the weight
            of largest magnitude can be a value of the grid. ``scale`` stays positive here, and ``zero_point`` is
            ``2^(bits-1)``, or one less in blocks that are mirrored; :func:`signed` has the form that is stored.
            "restricted" for ``2^(bits-1)`` in every block.
        range: "minmax" spans a block's smallest and largest weight (and zero). Where ``symmetric`` is True it reaches
            to the weight of largest magnitude, and one step less far on the other side. "mse" tries fractions of that
            range and takes the one of least squared error, clipping what lies beyond it. Where ``symmetric`` is True it
            tries both mirror images, and larger ranges, too: up to the one whose nearer end reaches the weight of
            largest magnitude.
        scale_dtype: see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.
    """

    params_type = UniformParams

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool | str = False,
        range: str = "minmax",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scale_dtype)
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits!r}")
        if not isinstance(symmetric, bool) and symmetric != RESTRICTED:
            raise ValueError(f"symmetric must be True, False or 'restricted', got {symmetric!r}")
        self._bits = bits
        self.symmetric = symmetric
        self.range = checked_range(range)

    def __repr__(self) -> str:
        scales = "" if self.scale_dtype == torch.float32 else f", scale_dtype={self.scale_dtype}"
        return f"UniformGrid({self._bits}, symmetric={self.symmetric!r}, range={self.range!r}{scales})"

    @property
    def bits(self) -> int:
        return self._bits

    def stored_bits(self, codes: Tensor, params: UniformParams) -> int:
        per_block = 8 * self.scale_dtype.itemsize + (0 if self.symmetric else self._bits)
        return self._bits * codes.numel() + per_block * params.scale.numel()

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self._bits - 1

    @property
    def fractions(self) -> list[float]:
        """The fractions of a block's full range that "mse" tries, one after another."""
        if self.symmetric is not True:
            return FRACTIONS
        middle = 2 ** (self._bits - 1)
        steps = math.ceil(1 / (STEP * (middle - 1)))
        wider = torch.linspace(1.0, middle / (middle - 1), steps + 1, dtype=torch.float64, device="cpu")
        return FRACTIONS + wider[1:].tolist()

    def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
        low = block.amin(-1, keepdim=True).clamp(max=0)
        high = block.amax(-1, keepdim=True).clamp(min=0)
        candidates = self._either(low, high) if self.symmetric is True else self._spans(low, high)
        full = next(candidates)
        return full if self.range == "minmax" else best(self, block, importance, chain([full], candidates), full)

    def _either(self, low: Tensor, high: Tensor) -> Iterator[UniformParams]:
        """Yields each fraction of the range, with the weight of largest magnitude at the grid's end and mirrored."""
        middle = 2 ** (self._bits - 1)
        magnitude = torch.maximum(high, -low)
        zero_point = torch.where(high > -low, middle - 1, middle).to(magnitude.dtype)
        for part in self.fractions:
            scale = self._scale(magnitude * part / middle)
            yield UniformParams(scale, zero_point)
            yield UniformParams(scale, self.largest - zero_point)

    def _spans(self, low: Tensor, high: Tensor) -> Iterator[UniformParams]:
        """Yields each fraction of the range from the smallest to the largest weight."""
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        for part in self.fractions:
            scale = self._scale((high * part - low * part) / self.largest)
            if self.symmetric:
                yield UniformParams(scale, torch.full_like(scale, 2 ** (self._bits - 1)))
            else:
                # A scale that was rounded down would put it beyond the last code.
                yield UniformParams(scale, (-low * part / scale).round().clamp_(max=self.largest))

    def _scale(self, step: Tensor) -> Tensor:
        return self.storable(torch.where(step > 0, step, 1))  # 1 for a block of zeros

    def encode(self, x: Tensor, params: UniformParams) -> Tensor:
        return (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest).to(torch.uint8)

    def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
        return (codes - params.zero_point) * params.scale

    def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
        steps = (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest)
        return steps.sub_(params.zero_point).mul_(params.scale)


def signed(grid: UniformGrid, codes: Tensor, params: UniformParams) -> tuple[Tensor, UniformParams]:
    """Returns the same values with the zero point ``2^(bits-1)`` in every block, for formats without zero points.

    Args:
        grid: symmetric.
        codes: uint8 of the shape of the blocks, (..., g).
        params: of the blocks, (..., 1).

    Returns:
        The codes, and params that :meth:`UniformGrid.decode` takes: scales are negative in blocks that were mirrored.
    """
    middle = 2 ** (grid.bits - 1)
    mirrored = params.zero_point < middle
    codes = torch.where(mirrored, grid.largest - codes, codes)
    scale = torch.where(mirrored, -params.scale, params.scale)
    return codes, UniformParams(scale, torch.full_like(params.zero_point, middle))


def is_uniform(grid: Grid) -> TypeGuard[UniformGrid]:
    """Tells whether a grid is a :class:`UniformGrid` itself. A subclass may fit, encode or decode otherwise."""
    return type(grid) is UniformGrid
