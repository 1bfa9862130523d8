"""RTN: every weight becomes the nearest value of its group's grid."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from opt8bit.ptq.methods.method import Method, fit_groups
from opt8bit.quant.weight import QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class RTN(Method):
    """Round to nearest: ``Ŵ_ij = argmin_v |W_ij - v|`` over the grid of the group. Looks at no input.

    The range "mse" that serves other methods hurts this one: what it clips is what matters most.
    """

    uses_hessian = False

    def round(self, weight: Tensor, hessian: Tensor, scheme: WeightScheme) -> QuantizedWeight:
        return QuantizedWeight.of(weight, fit_groups(weight, scheme), scheme)
