"""Defines what runs the loops over the columns of a weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic

from torch import Tensor

from opt8bit.quant.grid import Grid, P, at


def fitted(
    grid: Grid[P],
    weight: Tensor,  # (out, in)
    group_size: int,
    importance: Tensor | None = None,  # (in,)
) -> P:
    """Returns what :meth:`Engine.fit` does, in torch."""
    groups = weight.unflatten(1, (-1, group_size))
    if importance is not None:
        importance = importance.to(weight.dtype).unflatten(0, groups.shape[1:])
    return at(grid.fit(groups, importance), (..., 0))


class Engine(ABC, Generic[P]):
    """The loops for weights on one grid."""

    @abstractmethod
    def fit(
        self,
        weight: Tensor,  # (out, in)
        group_size: int,
        importance: Tensor | None = None,  # (in,)
    ) -> P:
        """Returns the grid's params (out, groups); errors of column j weigh by ``importance[j]`` (default 1)."""

    @abstractmethod
    def error_feedback(
        self,
        weight: Tensor,  # (out, in), columns in the order in which they are rounded
        factor: Tensor,  # (in, in), U
        importance: Tensor,  # (in,)
        group_of: Tensor,  # (in,)
        params: P | None,  # (out, groups); fitted on the way where None: columns then go group by group
    ) -> tuple[Tensor, P]:
        """Runs GPTQ's loop; returns the rounded weight, (out, in), and its params, (out, groups)."""

    @abstractmethod
    def coordinate_descent(
        self,
        weight: Tensor,  # (out, in), the target W
        on_grid: Tensor,  # (out, in), where to start
        hessian: Tensor,  # (in, in)
        group_of: Tensor,  # (in,)
        params: P,  # (out, groups)
        sweeps: int,
    ) -> Tensor:
        """Runs QuantEase's loop; returns the weight (out, in) after up to ``sweeps`` sweeps, all on the grid."""
