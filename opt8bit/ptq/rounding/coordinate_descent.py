"""QuantEase's loop in plain torch: one column after another becomes the best grid value, all others held."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.ptq.rounding.error_feedback import PIECE
from opt8bit.ptq.rounding.groups import by_column
from opt8bit.quant.grid import Grid, P, at


def descend(
    weight: Tensor,  # (out, in), the target W
    on_grid: Tensor,  # (out, in), where to start
    hessian: Tensor,  # (in, in)
    group_of: Tensor,  # (in,)
    params: P,  # (out, groups)
    grid: Grid[P],
    sweeps: int,
) -> Tensor:
    """Descends coordinate by coordinate on a fixed grid; returns the weight (out, in), whose values lie on the grid.

    ``sweeps`` go over all columns, at most; rows in which nothing changed are left out of the next one.
    """
    result = on_grid.clone()
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(sweeps):
        before = result[active]
        after = _sweep(weight[active], before, hessian, by_column(at(params, active), group_of), grid)
        result[active] = after
        active = active[(after != before).any(1)]
        if not len(active):
            break
    return result


def _sweep(
    weight: Tensor,  # (out, in)
    on_grid: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
    params: P,  # (in, out)
    grid: Grid[P],
) -> Tensor:
    """Returns one pass over all columns; returns the weight (out, in) after it."""
    rounded = on_grid.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the weight is a row here
    residual = hessian @ (weight.T - rounded)  # [(W - Ŵ) H]ᵀ
    for start in range(0, len(rounded), PIECE):
        piece = slice(start, start + PIECE)
        before = rounded[piece].clone()
        _sweep_piece(rounded[piece], residual[piece], hessian[piece, piece], at(params, piece), grid)
        residual[start + PIECE :].addmm_(hessian[start + PIECE :, piece], before.sub_(rounded[piece]))
    return rounded.T


def _sweep_piece(rounded: Tensor, residual: Tensor, hessian: Tensor, params: P, grid: Grid[P]) -> None:
    """Sweeps over the columns of one piece, (n, out) each, and keeps ``residual`` up to date inside it."""
    for j, curvature in enumerate(hessian.diagonal().tolist()):
        if curvature <= 0:
            continue  # no input reaches this column
        value = grid.nearest(torch.add(rounded[j], residual[j], alpha=1 / curvature), at(params, j))
        change = rounded[j] - value
        rounded[j] = value
        residual[j + 1 :].addcmul_(hessian[j + 1 :, j, None], change)
