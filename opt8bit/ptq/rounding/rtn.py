"""RTN: every weight becomes the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.engines import engine_for
from opt8bit.ptq.rounding.rounder import Rounder
from opt8bit.quant.weight import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class RTN(Rounder):
    """Rounds to nearest: ``Ŵ_ij = argmin_v |W_ij - v|`` over the grid of the group. Looks at no input.

    The range "mse" that serves other methods hurts this one: what it clips is what matters most.
    """

    needs = frozenset()

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        params = engine_for(weight, scheme.grid).fit(weight, scheme.groups_of(weight))
        return QuantizedWeight.of(weight, params, scheme)
