"""The one choice of who runs the loops over columns: compiled kernels where they have the grid, or plain torch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import rounding_kernels
from opt8bit.ptq.rounding.compiled import CompiledEngine
from opt8bit.ptq.rounding.coordinate_descent import descend
from opt8bit.ptq.rounding.engine import Engine, fitted
from opt8bit.ptq.rounding.error_feedback import round_columns
from opt8bit.ptq.rounding.shifted import ShiftedEngine
from opt8bit.quant.grid import Grid, P
from opt8bit.quant.superblocks import is_on_lines
from opt8bit.quant.uniform import is_uniform


def engine_for(weight: Tensor, grid: Grid) -> Engine[Any]:
    """Returns what runs the loops for a weight on a grid."""
    if weight.dtype == torch.float32 and weight.device.type == "cpu":
        kernels = rounding_kernels(weight.device)
        if kernels is not None and is_uniform(grid):
            return CompiledEngine(kernels, grid)
        if kernels is not None and is_on_lines(grid):
            return ShiftedEngine(kernels, grid)
    return PlainEngine(grid)


class PlainEngine(Engine[P]):
    """The loops in torch, for every grid, dtype and device: what the compiled ones are checked against."""

    def __init__(self, grid: Grid[P]) -> None:
        self._grid = grid

    def fit(self, weight: Tensor, group_size: int, importance: Tensor | None = None) -> P:
        return fitted(self._grid, weight, group_size, importance)

    def error_feedback(
        self, weight: Tensor, factor: Tensor, importance: Tensor, group_of: Tensor, params: P | None
    ) -> tuple[Tensor, P]:
        return round_columns(weight, factor, importance, group_of, params, self._grid)

    def coordinate_descent(
        self, weight: Tensor, on_grid: Tensor, hessian: Tensor, group_of: Tensor, params: P, sweeps: int
    ) -> Tensor:
        return descend(weight, on_grid, hessian, group_of, params, self._grid, sweeps)
