"""The loops over columns, compiled: float32 weights on the CPU, evenly spaced grids."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt8bit.backends.interface import DTYPES
from opt8bit.backends.native import Native, WeightRounding
from opt8bit.ptq.rounding.engine import Engine
from opt8bit.quant.uniform import RESTRICTED, UniformGrid, UniformParams

ZERO_POINTS = (False, RESTRICTED, True)  # what ``symmetric`` is, in the order of ZeroPoints in weight_rounding.h


class CompiledEngine(Engine[UniformParams]):
    """The kernels of an instruction set.

    Args:
        kernels: of the processor.
        grid: of the weights.
    """

    def __init__(self, kernels: Native, grid: UniformGrid) -> None:
        self._kernels = kernels
        self._grid = grid

    def fit(self, weight: Tensor, group_size: int, importance: Tensor | None = None) -> UniformParams:
        importance = weight.new_ones(weight.shape[1]) if importance is None else importance
        params = _empty_params(weight, group_size)
        group_of = torch.arange(weight.shape[1], device=weight.device) // group_size
        layer, kept = self._layer(weight, group_of, params, importance=importance)
        self._kernels.fit_grids(layer)
        del kept
        return params

    def error_feedback(
        self, weight: Tensor, factor: Tensor, importance: Tensor, group_of: Tensor, params: UniformParams | None
    ) -> tuple[Tensor, UniformParams]:
        fits = params is None
        params = params or _empty_params(weight, int(group_of.bincount()[0]))
        rounded = torch.empty_like(weight, memory_format=torch.contiguous_format)
        layer, kept = self._layer(weight, group_of, params, importance=importance, matrix=factor.T, rounded=rounded)
        self._kernels.gptq(layer, fits=fits)
        del kept
        return rounded, params

    def coordinate_descent(
        self, weight: Tensor, on_grid: Tensor, hessian: Tensor, group_of: Tensor, params: UniformParams, sweeps: int
    ) -> Tensor:
        rounded = on_grid.clone(memory_format=torch.contiguous_format)
        layer, kept = self._layer(weight, group_of, params, matrix=hessian, rounded=rounded)
        self._kernels.coordinate_descent(layer, sweeps)
        del kept
        return rounded

    def _layer(
        self,
        weight: Tensor,
        group_of: Tensor,
        params: UniformParams,
        *,
        importance: Tensor | None = None,
        matrix: Tensor | None = None,
        rounded: Tensor | None = None,
    ) -> tuple[WeightRounding, list[Any]]:
        """Returns what the kernels take, and the tensors that must outlive the call."""
        fractions = weight.new_tensor(self._grid.fractions if self._grid.range == "mse" else [])
        weight, group_of = weight.contiguous(), group_of.contiguous()
        importance, matrix = (None if t is None else t.contiguous() for t in (importance, matrix))
        layer = WeightRounding(
            weight=_address(weight),
            rows=params.scale.shape[0],
            columns=group_of.numel(),
            group_of=_address(group_of),
            groups=params.scale.shape[1],
            scale=_address(params.scale),
            zero_point=_address(params.zero_point),
            largest=self._grid.largest,
            zero_points=ZERO_POINTS.index(self._grid.symmetric),
            scale_dtype=DTYPES[self._grid.scale_dtype],
            fractions=_address(fractions),
            fraction_count=fractions.numel(),
            importance=_address(importance),
            matrix=_address(matrix),
            rounded=_address(rounded),
        )
        return layer, [weight, group_of, importance, matrix, fractions]


def _empty_params(weight: Tensor, group_size: int) -> UniformParams:
    shape = (weight.shape[0], weight.shape[1] // group_size)
    return UniformParams(weight.new_empty(shape), weight.new_empty(shape))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
