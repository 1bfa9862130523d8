"""What every rounding method takes and gives: the layer objective, the format, the rounded weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.methods.kernels import kernels_for
from opt8bit.quant.grid import Grid, P, at, mapped
from opt8bit.quant.weight import QuantizedWeight, WeightScheme

PIECE = 128  # columns that are rounded before those behind them are brought up to date


class Method(ABC):
    """Decides which grid value each weight becomes."""

    rowwise: ClassVar[bool] = True  # whether a row's result depends on no other row
    uses_hessian: ClassVar[bool] = True

    @property
    def keeps_outliers(self) -> bool:
        """Whether some weights are kept exact, beside the codes."""
        return False

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        """Returns the grid of each part of the weights that it makes."""
        return (scheme.grid,)

    @abstractmethod
    def round(
        self,
        weight: Tensor,  # (out, in), float32 or float64
        hessian: Tensor,  # (in, in), symmetric, positive semi-definite
        scheme: WeightScheme,
    ) -> QuantizedWeight:
        """A weight Ŵ of the scheme that makes ``objective(weight, Ŵ, hessian)`` small.

        Raises:
            ValueError: the group size does not divide ``in``, or ``hessian`` is not finite or not that of any inputs.
        """


def check_method(name: str, value: object) -> None:
    """
    Raises:
        TypeError: ``value`` is not a method.
    """
    if not isinstance(value, Method):
        raise TypeError(f"{name} must be one of opt8bit.ptq, such as GPTQ(), got {value!r}")


def objective(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
) -> Tensor:
    """``tr((W - Ŵ) H (W - Ŵ)ᵀ)``: with H = E[x xᵀ] the squared error of the layer's output, summed over outputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()


def fit_groups(weight: Tensor, scheme: WeightScheme, importance: Tensor | None = None) -> Any:
    """Params (out, groups) of a whole weight (out, in); ``importance`` (in,) weighs the errors of its columns."""
    group_size = scheme.groups_of(weight)
    kernels = kernels_for(weight, scheme.grid)
    if kernels is not None:
        return kernels.fit(weight, group_size, weight.new_ones(weight.shape[1]) if importance is None else importance)
    groups = weight.unflatten(1, (-1, group_size))
    if importance is not None:
        importance = importance.to(weight.dtype).unflatten(0, groups.shape[1:])
    return at(scheme.grid.fit(groups, importance), (..., 0))


def group_numbers(weight: Tensor, group_size: int) -> Tensor:
    """The group that each column of a weight (out, in) belongs to, (in,)."""
    return torch.arange(weight.shape[1], device=weight.device) // group_size


def by_column(params: P, group_of: Tensor) -> P:
    """Params (out, groups) laid out column by column of the weight, (in, out)."""
    return mapped(params, lambda part: part.T[group_of])


def pieces(group_of: Tensor) -> Iterator[tuple[int, int]]:
    """Cuts columns into runs of at most ``PIECE`` that never cross from one group into the next."""
    start = 0
    for length in torch.unique_consecutive(group_of, return_counts=True)[1].tolist():
        for first in range(start, start + length, PIECE):
            yield first, min(first + PIECE, start + length)
        start += length
