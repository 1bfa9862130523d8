"""Rounding that gradients pass as if it were not there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt8bit.quant.grid import Grid


def rounded_through(x: Tensor, largest: int | None = None) -> Tensor:
    """Returns ``x`` rounded to integers; its gradient is that of what is returned.

    Args:
        x: of any shape.
        largest: if given, integers are moved into 0 to ``largest``, and gradients pass that, too.
    """
    rounded: Tensor = _Rounded.apply(x, largest)
    return rounded


def stored_through(grid: Grid, scale: Tensor, params: Any = None) -> Tensor:
    """Returns scales in the dtype in which a grid stores them; their gradient is that of what is returned.

    Args:
        grid: of the scales.
        scale: (out, groups).
        params: of the same groups, for grids whose stored scales depend on them.
    """
    fixed = scale.detach()
    return grid.storable(fixed.abs(), params).copysign(fixed) + (scale - fixed)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, largest: int | None) -> Tensor:
        rounded = x.round()
        return rounded if largest is None else rounded.clamp_(0, largest)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None
