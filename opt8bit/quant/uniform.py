"""Grids of evenly spaced values."""

from __future__ import annotations

from typing import NamedTuple, TypeGuard

import torch
from torch import Tensor

from opt8bit.quant.grid import FRACTIONS, Grid, best, checked_range


class UniformParams(NamedTuple):
    """What a :class:`UniformGrid` keeps per block."""

    scale: Tensor  # positive
    zero_point: Tensor  # integers


class UniformGrid(Grid[UniformParams]):
    """Evenly spaced values: ``(q - zero_point) * scale`` for q = 0 .. 2^bits - 1, zero among them.

    Args:
        bits: 2 to 8.
        symmetric: the zero point is ``2^(bits-1)`` in every block and none is stored; otherwise it is fitted.
        range: "minmax" spans a block's smallest and largest weight (and zero); "mse" tries fractions of that
            range and takes the one of least squared error, clipping what lies beyond it.
        scale_dtype: see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.
    """

    params_type = UniformParams

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool = False,
        range: str = "minmax",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scale_dtype)
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits!r}")
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {symmetric!r}")
        self._bits = bits
        self.symmetric = symmetric
        self.range = checked_range(range)

    def __repr__(self) -> str:
        scales = "" if self.scale_dtype == torch.float32 else f", scale_dtype={self.scale_dtype}"
        return f"UniformGrid({self._bits}, symmetric={self.symmetric}, range={self.range!r}{scales})"

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

    def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
        low = block.amin(-1, keepdim=True).clamp(max=0)
        high = block.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        full = self._spanning(low, high)
        if self.range == "minmax":
            return full
        return best(self, block, importance, (self._spanning(low * part, high * part) for part in FRACTIONS), full)

    def _spanning(self, low: Tensor, high: Tensor) -> UniformParams:
        scale = (high - low) / self.largest
        scale = self.storable(torch.where(scale > 0, scale, 1))  # 1 for a block of zeros
        middle = torch.full_like(scale, 2 ** (self._bits - 1))
        # A scale that was rounded down would put it beyond the last code.
        return UniformParams(scale, middle if self.symmetric else (-low / scale).round().clamp_(max=self.largest))

    def encode(self, x: Tensor, params: UniformParams) -> Tensor:
        return (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest).to(torch.uint8)

    def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
        return (codes - params.zero_point) * params.scale

    def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
        steps = (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest)
        return steps.sub_(params.zero_point).mul_(params.scale)


def is_uniform(grid: Grid) -> TypeGuard[UniformGrid]:
    """Whether a grid is a :class:`UniformGrid` itself. A class made from it may fit, encode or decode otherwise."""
    return type(grid) is UniformGrid
