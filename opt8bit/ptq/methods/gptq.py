"""GPTQ: columns are rounded one after another, and those that are left take up the error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.arguments import check_flag, check_positive
from opt8bit.ptq.linear_algebra import inverse_factor
from opt8bit.ptq.methods.kernels import kernels_for
from opt8bit.ptq.methods.method import Method, by_column, fit_groups, group_numbers, pieces
from opt8bit.quant.grid import Grid, P, at
from opt8bit.quant.weight import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class GPTQ(Method):
    """Columns go one after another; each one's error is fed forward to the columns that are still free.

    With ``U`` the upper Cholesky factor of ``(H + λI)⁻¹``: round column j to ŵ_j, ``e_j = (w_j - ŵ_j) / U_jj``, and
    take ``e_j U_jk`` from every later column k. Then ``Σ e² = tr((W - Ŵ)(H + λI)(W - Ŵ)ᵀ)``, exactly.

    With ``act_order`` the columns go by falling ``H_jj``: what matters most is rounded while most others are free.
    Scales are fitted beforehand, so that groups stay groups of neighbours and nothing need be looked up when the weight
    is used. Without it columns go from first to last, and a group's scales are fitted when its first column is reached,
    to weights that have taken up all errors so far. Where the range is searched, errors weigh as they will cost:
    ``1 / U_jj²``.

    Args:
        damping: λ as a fraction of the mean of H's diagonal, above 0. Raised tenfold as often as it takes where H
            is singular all the same.
        act_order: whether columns go by falling second moment.

    Raises:
        ValueError: ``damping`` is not a positive number, or ``act_order`` neither True nor False.

    Source: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, algorithm 1.
    """

    damping: float = 0.01
    act_order: bool = True

    def __post_init__(self) -> None:
        check_positive("damping", self.damping)
        check_flag("act_order", self.act_order)

    def round(self, weight: Tensor, hessian: Tensor, scheme: WeightScheme) -> QuantizedWeight:
        group_of = group_numbers(weight, scheme.groups_of(weight))
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        back = torch.argsort(order)
        _, factor = inverse_factor(hessian[order][:, order], self.damping)
        factor = factor.to(weight.dtype)
        importance = factor.diagonal().square().reciprocal()
        params = fit_groups(weight, scheme, importance[back]) if self.act_order else None
        kernels = kernels_for(weight, scheme.grid)
        if kernels is not None:
            rounded, params = kernels.gptq(weight[:, order], factor, importance, group_of[order], params)
        else:
            rounded, params = round_columns(weight[:, order], factor, importance, group_of[order], params, scheme.grid)
        return QuantizedWeight.of(rounded[:, back], params, scheme)


def round_columns(
    weight: Tensor,  # (out, in), columns in the order in which they are rounded
    factor: Tensor,  # (in, in), U
    importance: Tensor,  # (in,)
    group_of: Tensor,  # (in,)
    params: P | None,  # (out, groups); fitted on the way where None: columns then go group by group
    grid: Grid[P],
) -> tuple[Tensor, P]:
    """The rounded weight, (out, in), and its params, (out, groups)."""
    fits = params is None
    free = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the weight is a row here
    reached = -1
    for start, stop in pieces(group_of) if fits else pieces(torch.zeros_like(group_of)):
        if fits and int(group_of[start]) != reached:
            reached = int(group_of[start])
            columns = group_of == reached
            fitted = grid.fit(free[columns].T, importance[columns])  # (out, 1)
            params = fitted if params is None else joined(params, fitted)
        assert params is not None
        own = by_column(params, group_of[start:stop])
        errors = _round_piece(free[start:stop], factor[start:stop, start:stop], own, grid)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    assert params is not None
    return free.T, params


def joined(params: P, more: P) -> P:
    """Params (out, groups) of some groups, and behind them those of others."""
    make: Any = type(params)
    return make(*(torch.cat(both, 1) for both in zip(params, more, strict=True)))


def _round_piece(
    piece: Tensor,  # (n, out), rounded in place
    factor: Tensor,  # (n, n)
    params: P,  # (n, out)
    grid: Grid[P],
) -> Tensor:
    """Rounds the columns of one piece, each after the errors of those before it; returns ``e``, (n, out)."""
    errors = torch.empty_like(piece)
    for j in range(len(piece)):
        value = grid.nearest(piece[j], at(params, j))
        errors[j] = (piece[j] - value) / factor[j, j]
        piece[j] = value
        piece[j + 1 :].addcmul_(factor[j, j + 1 :, None], errors[j], value=-1)
    return errors
