"""The compiled twins of what the methods do column by column: float32 weights, evenly spaced grids, on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import rounding_kernels
from opt8bit.backends.interface import DTYPES
from opt8bit.backends.native import Native, WeightRounding
from opt8bit.quant.grid import FRACTIONS, Grid, UniformGrid, UniformParams


class LayerKernels:
    """The kernels for one weight.

    Args:
        kernels: of an instruction set.
        grid: of the weight.
    """

    def __init__(self, kernels: Native, grid: UniformGrid) -> None:
        self._kernels = kernels
        self._grid = grid

    def fit(
        self,
        weight: Tensor,  # (out, in)
        group_size: int,
        importance: Tensor,  # (in,)
    ) -> UniformParams:
        """As ``grid.fit`` of every group: params (out, groups)."""
        params = _empty_params(weight, group_size)
        group_of = torch.arange(weight.shape[1], device=weight.device) // group_size
        layer, kept = self._layer(weight, group_of, params, importance=importance)
        self._kernels.fit_grids(layer)
        del kept
        return params

    def gptq(
        self,
        weight: Tensor,  # (out, in)
        factor: Tensor,  # (in, in)
        importance: Tensor,  # (in,)
        group_of: Tensor,  # (in,)
        params: UniformParams | None,  # (out, groups)
    ) -> tuple[Tensor, UniformParams]:
        """As ``gptq.round_columns``."""
        fits = params is None
        params = params or _empty_params(weight, int(group_of.bincount()[0]))
        rounded = torch.empty_like(weight, memory_format=torch.contiguous_format)
        layer, kept = self._layer(weight, group_of, params, importance=importance, matrix=factor.T, rounded=rounded)
        self._kernels.gptq(layer, fits=fits)
        del kept
        return rounded, params

    def coordinate_descent(
        self,
        weight: Tensor,  # (out, in)
        on_grid: Tensor,  # (out, in)
        hessian: Tensor,  # (in, in)
        group_of: Tensor,  # (in,)
        params: UniformParams,  # (out, groups)
        sweeps: int,
    ) -> Tensor:
        """As ``quantease.descend``."""
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
        """What the kernels take, and the tensors that must outlive the call."""
        fractions = weight.new_tensor(FRACTIONS if self._grid.range == "mse" else [])
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
            is_symmetric=self._grid.symmetric,
            scale_dtype=DTYPES[self._grid.scale_dtype],
            fractions=_address(fractions),
            fraction_count=fractions.numel(),
            importance=_address(importance),
            matrix=_address(matrix),
            rounded=_address(rounded),
        )
        return layer, [weight, group_of, importance, matrix, fractions]


def kernels_for(weight: Tensor, grid: Grid) -> LayerKernels | None:
    """The kernels for a weight on a grid; None where plain torch serves."""
    if weight.dtype != torch.float32 or weight.device.type != "cpu" or type(grid) is not UniformGrid:
        return None
    kernels = rounding_kernels(weight.device)
    return None if kernels is None else LayerKernels(kernels, grid)


def _empty_params(weight: Tensor, group_size: int) -> UniformParams:
    shape = (weight.shape[0], weight.shape[1] // group_size)
    return UniformParams(weight.new_empty(shape), weight.new_empty(shape))


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
