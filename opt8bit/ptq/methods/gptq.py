"""GPTQ: columns are rounded one after another, and those that are left take up the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq.arguments import check_flag, check_positive
from opt8bit.ptq.linear_algebra import inverse_factor
from opt8bit.ptq.methods.kernels import kernels_for
from opt8bit.ptq.methods.method import Format, Method, Rounded, by_column, fit_groups, group_numbers, pieces
from opt8bit.quant.grid import Grid, Scales


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

    def round(self, weight: Tensor, hessian: Tensor, format: Format) -> Rounded:
        group_of = group_numbers(weight, format.groups_of(weight))
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        back = torch.argsort(order)
        _, factor = inverse_factor(hessian[order][:, order], self.damping)
        factor = factor.to(weight.dtype)
        importance = factor.diagonal().square().reciprocal()
        scales = fit_groups(weight, format, importance[back]) if self.act_order else None
        kernels = kernels_for(weight, format.grid)
        if kernels is not None:
            rounded, scales = kernels.gptq(weight[:, order], factor, importance, group_of[order], scales)
        else:
            rounded, scales = round_columns(weight[:, order], factor, importance, group_of[order], scales, format.grid)
        return Rounded.of(rounded[:, back], scales, format)


def round_columns(
    weight: Tensor,  # (out, in), columns in the order in which they are rounded
    factor: Tensor,  # (in, in), U
    importance: Tensor,  # (in,)
    group_of: Tensor,  # (in,)
    scales: Scales | None,  # (out, groups); fitted on the way where None: columns then go group by group
    grid: Grid,
) -> tuple[Tensor, Scales]:
    """The rounded weight, (out, in), and its scales, (out, groups)."""
    fits = scales is None
    if scales is None:
        shape = (weight.shape[0], int(group_of.max()) + 1)
        scales = Scales(weight.new_empty(shape), weight.new_empty(shape))
    free = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the weight is a row here
    reached = -1
    for start, stop in pieces(group_of) if fits else pieces(torch.zeros_like(group_of)):
        if fits and int(group_of[start]) != reached:
            reached = int(group_of[start])
            columns = group_of == reached
            fitted = grid.fit(free[columns].T, importance[columns])
            scales.scale[:, reached], scales.zero_point[:, reached] = fitted.scale[:, 0], fitted.zero_point[:, 0]
        own = by_column(scales, group_of[start:stop])
        errors = _round_piece(free[start:stop], factor[start:stop, start:stop], own, grid)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return free.T, scales


def _round_piece(
    piece: Tensor,  # (n, out), rounded in place
    factor: Tensor,  # (n, n)
    scales: Scales,  # (n, out)
    grid: Grid,
) -> Tensor:
    """Rounds the columns of one piece, each after the errors of those before it; returns ``e``, (n, out)."""
    errors = torch.empty_like(piece)
    for j in range(len(piece)):
        value = grid.nearest(piece[j], scales.at(j))
        errors[j] = (piece[j] - value) / factor[j, j]
        piece[j] = value
        piece[j + 1 :].addcmul_(factor[j, j + 1 :, None], errors[j], value=-1)
    return errors
