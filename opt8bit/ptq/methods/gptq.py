"""GPTQ: columns are rounded one after another, and those that are left take up the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq.linear_algebra import check_damping, inverse_factor
from opt8bit.ptq.methods.method import Format, Method, Rounded, by_column, fit_groups, pieces
from opt8bit.quant.grid import Scales


@dataclass(frozen=True)
class GPTQ(Method):
    """Columns from first to last; each one's error is fed forward to the columns that are still free.

    With ``U`` the upper Cholesky factor of ``(H + λI)⁻¹``: round column j to ŵ_j, ``e_j = (w_j - ŵ_j) / U_jj``, and
    take ``e_j U_jk`` from every later column k. Then ``Σ e² = tr((W - Ŵ)(H + λI)(W - Ŵ)ᵀ)``, exactly.

    A group's scales are fitted when its first column is reached, to weights that have taken up all errors so far;
    where the range is searched, errors weigh as they will cost: ``1 / U_jj²``. With ``act_order`` the columns go by
    falling ``H_jj`` and scales are fitted beforehand, so that groups stay groups of neighbours and nothing need be
    looked up when the weight is used.

    Args:
        damping: λ as a fraction of the mean of H's diagonal, above 0. Raised tenfold as often as it takes where H
            is singular all the same.
        act_order: whether columns go by falling second moment.

    Raises:
        ValueError: ``damping`` is not a positive number.

    Source: GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, algorithm 1.
    """

    damping: float = 0.01
    act_order: bool = False

    def __post_init__(self) -> None:
        check_damping(self.damping)

    def round(self, weight: Tensor, hessian: Tensor, format: Format) -> Rounded:
        group_size = format.groups_of(weight)
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        _, factor = inverse_factor(hessian[order][:, order], self.damping)
        importance = factor.diagonal().square().reciprocal().to(weight.dtype)
        back = torch.argsort(order)
        scales = fit_groups(weight, format, importance[back])
        columns = by_column(scales, group_size).at(order)
        rounded = weight.T[order].contiguous()  # (in, out): a column of the weight is a row here
        factor = factor.to(weight.dtype)
        for start, stop in pieces(len(rounded), group_size):
            if not self.act_order and start % group_size == 0:
                group = slice(start, start + group_size)
                fitted = format.grid.fit(rounded[group].T, importance[group])
                columns.scale[group], columns.zero_point[group] = fitted.scale.T, fitted.zero_point.T
            errors = _round_piece(
                rounded[start:stop], factor[start:stop, start:stop], columns.at(slice(start, stop)), format
            )
            rounded[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        by_group = columns.at(back).at(slice(None, None, group_size))
        return Rounded.of(rounded[back].T, Scales(*(part.T.contiguous() for part in by_group)), format)


def _round_piece(
    piece: Tensor,  # (n, out), rounded in place
    factor: Tensor,  # (n, n)
    scales: Scales,  # (n, out)
    format: Format,
) -> Tensor:
    """Rounds the columns of one piece, each after the errors of those before it; returns ``e``, (n, out)."""
    errors = torch.empty_like(piece)
    for j in range(len(piece)):
        value = format.grid.nearest(piece[j], scales.at(j))
        errors[j] = (piece[j] - value) / factor[j, j]
        piece[j] = value
        piece[j + 1 :].addcmul_(factor[j, j + 1 :, None], errors[j], value=-1)
    return errors
