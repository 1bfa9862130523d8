"""GPTQ: columns are rounded one after another, and those that are left take up the error."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.engines import engine_for
from opt8bit.ptq.rounding.groups import group_numbers
from opt8bit.ptq.rounding.linear_algebra import inverse_factor
from opt8bit.ptq.rounding.rounder import Rounder
from opt8bit.quant.weight import QuantizedWeight, WeightScheme
from opt8bit.recipe.arguments import check_flag, check_positive


@dataclass(frozen=True)
class GPTQ(Rounder):
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

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        hessian = statistics.required("second_moments")
        group_size = scheme.groups_of(weight)
        order = torch.arange(len(hessian), device=hessian.device)
        if self.act_order:
            order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
        back = torch.argsort(order)
        factor = inverse_factor(hessian, self.damping, order).to(weight.dtype)
        importance = factor.diagonal().square().reciprocal()
        engine = engine_for(weight, scheme.grid)
        params = engine.fit(weight, group_size, importance[back]) if self.act_order else None
        group_of = group_numbers(weight, group_size)[order]
        rounded, params = engine.error_feedback(weight[:, order], factor, importance, group_of, params)
        return QuantizedWeight.of(rounded[:, back], params, scheme)
