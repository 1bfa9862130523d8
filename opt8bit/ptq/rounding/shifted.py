"""The compiled loops for evenly spaced values whose lowest one is no whole number of steps from zero."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.backends.native import Native
from opt8bit.ptq.rounding.compiled import CompiledEngine
from opt8bit.ptq.rounding.engine import Engine, fitted
from opt8bit.ptq.rounding.error_feedback import round_columns
from opt8bit.quant.evenly_spaced import EvenlySpaced
from opt8bit.quant.grid import P
from opt8bit.quant.uniform import UniformGrid, UniformParams

HUGE = 1e30  # a step so large that only the lowest value is ever near


class ShiftedEngine(Engine[P]):
    """The kernels of a processor, on weights from which the lowest value of each one's group is taken.

    Errors are the same with and without it, so that the loops are, too. Grids are fitted in torch.

    Args:
        kernels: of the processor.
        grid: of the weights.
    """

    def __init__(self, kernels: Native, grid: EvenlySpaced[P]) -> None:
        self._grid = grid
        self._from_zero = CompiledEngine(kernels, UniformGrid(grid.bits))

    def fit(self, weight: Tensor, group_size: int, importance: Tensor | None = None) -> P:
        return fitted(self._grid, weight, group_size, importance)

    def error_feedback(
        self, weight: Tensor, factor: Tensor, importance: Tensor, group_of: Tensor, params: P | None
    ) -> tuple[Tensor, P]:
        if params is None:
            return round_columns(weight, factor, importance, group_of, None, self._grid)
        steps, lowest = self._steps(params, group_of)
        rounded, _ = self._from_zero.error_feedback(weight - lowest, factor, importance, group_of, steps)
        return rounded.add_(lowest), params

    def coordinate_descent(
        self, weight: Tensor, on_grid: Tensor, hessian: Tensor, group_of: Tensor, params: P, sweeps: int
    ) -> Tensor:
        steps, lowest = self._steps(params, group_of)
        start = on_grid - lowest
        return self._from_zero.coordinate_descent(weight - lowest, start, hessian, group_of, steps, sweeps).add_(lowest)

    def _steps(self, params: P, group_of: Tensor) -> tuple[UniformParams, Tensor]:
        """Returns the grid from zero upwards, and the lowest value in the group of each column, (out, in)."""
        scale, minimum = self._grid.line(params)
        lowest = torch.where(scale < 0, minimum + scale * self._grid.largest, minimum)
        step = torch.where(scale == 0, HUGE, scale.abs())
        return UniformParams(step.contiguous(), torch.zeros_like(step)), lowest[:, group_of]
