"""Outlier-aware QuantEase: a few weights are kept exact, and the grid need not reach them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.gptq import GPTQ
from opt8bit.ptq.rounding.quantease import descended
from opt8bit.ptq.rounding.rounder import Rounder, check_rounder, checked_round, single_part
from opt8bit.quant.grid import Grid
from opt8bit.quant.weight import Outliers, QuantizedWeight, WeightScheme
from opt8bit.recipe.arguments import check_count, check_fraction, check_one_of
from opt8bit.recipe.recipe import STRUCTURES


@dataclass(frozen=True)
class OutlierQuantEase(Rounder):
    """Rounds to ``W ≈ Ŵ + S``, S sparse: coordinate descent on Ŵ alternates with hard thresholding of S.

    S starts as the weights of largest magnitude (or the columns of largest norm), and the grid is fitted to what is
    left. Then, in turn, Ŵ descends towards ``W - S``, and ``S = P(S + (W - Ŵ - S) H / λ_max(H))``, where P keeps the
    largest entries (or columns): neither raises ``tr((W - Ŵ - S) H (W - Ŵ - S)ᵀ)``.

    Args:
        fraction: of the weights that S holds, from 0 to 1; ``round(fraction * number)`` weights or columns.
        structure: "unstructured" for single weights, "column" for all weights of an input.
        rounds: of the alternation.
        sweeps: of coordinate descent in a round, at most.
        start: the method that rounds first, what S leaves.

    Raises:
        ValueError: an argument is not one of these.
        TypeError: ``start`` is no method.

    Source: QuantEase: Optimization-based Quantization for Language Models, section 4. The grid is fitted once.
    """

    fraction: float = 0.01
    structure: str = "unstructured"
    rounds: int = 5
    sweeps: int = 5
    start: Rounder = field(default_factory=GPTQ)

    rowwise = False

    def __post_init__(self) -> None:
        check_fraction("fraction", self.fraction)
        check_one_of("structure", self.structure, STRUCTURES)
        check_count("rounds", self.rounds)
        check_count("sweeps", self.sweeps)
        check_rounder("start", self.start)
        if not self.start.rowwise or self.start.keeps_outliers:
            raise ValueError(f"start must be a method without outliers of its own, got {self.start!r}")

    @property
    def keeps_outliers(self) -> bool:
        return True

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        return self.start.grids(scheme)

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        hessian = statistics.required("second_moments").to(weight.dtype)
        steepest = torch.linalg.eigvalsh(hessian)[-1].clamp(min=torch.finfo(weight.dtype).tiny)
        kept = self._largest(weight)
        sparse = torch.where(kept, weight, 0)
        part = single_part(self, checked_round(self.start, weight - sparse, InputStatistics(hessian), scheme))
        for _ in range(self.rounds):
            part = descended(weight - sparse, part, hessian, self.sweeps)
            stepped = sparse + (weight - part.dequantize() - sparse) @ hessian / steepest
            kept = self._largest(stepped)
            sparse = torch.where(kept, stepped, 0)
        rows, columns = kept.nonzero(as_tuple=True)
        outliers = Outliers(rows, columns, sparse[rows, columns], self.structure == "column")
        return QuantizedWeight((weight.shape[0], weight.shape[1]), (part,), outliers)

    def _largest(self, weight: Tensor) -> Tensor:
        """Returns a mask, true where a weight (out, in) is one of the largest, or in one of the largest columns."""
        sizes = weight.abs().flatten() if self.structure == "unstructured" else weight.square().sum(0)
        chosen = sizes.topk(round(self.fraction * sizes.numel())).indices
        kept = torch.zeros_like(sizes, dtype=torch.bool)
        kept[chosen] = True
        return kept.view_as(weight) if self.structure == "unstructured" else kept.expand_as(weight)
