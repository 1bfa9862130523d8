"""QuantEase: cyclic coordinate descent on the layer objective, one column after another, until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.engines import engine_for
from opt8bit.ptq.rounding.groups import group_numbers
from opt8bit.ptq.rounding.rounder import Rounder, check_rounder, checked_round, single_part
from opt8bit.ptq.rounding.rtn import RTN
from opt8bit.ptq.rounding.scales import refit_scales
from opt8bit.quant.grid import Grid
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme
from opt8bit.recipe.arguments import check_count


@dataclass(frozen=True)
class QuantEase(Rounder):
    """Each weight in turn becomes the grid value that is best while all others of its row stay as they are.

    That value is the one nearest to ``β = Ŵ_ij + [(W - Ŵ) H]_ij / H_jj``, so that ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` never
    rises; where no weight changes, none can be changed alone for the better. In the paper the grid stays as ``start``
    fitted it; with ``refits``, descent alternates with the scales of least objective for the codes found so far, which
    never raise it either.

    Args:
        sweeps: over all columns, at most; rows in which nothing changed are left out of the next one.
        start: the method whose result is improved; what it leaves as outliers stays as it is.
        refits: of the scales, each followed by up to ``sweeps`` sweeps.

    Raises:
        ValueError: ``sweeps`` is not a positive integer, or ``refits`` not an integer from 0.
        TypeError: ``start`` is no method.

    Source: QuantEase: Optimization-based Quantization for Language Models, algorithm 1.
    """

    sweeps: int = 25
    start: Rounder = field(default_factory=RTN)
    refits: int = 0

    def __post_init__(self) -> None:
        check_count("sweeps", self.sweeps)
        check_count("refits", self.refits, least=0)
        check_rounder("start", self.start)

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return self.start.rowwise

    @property
    def keeps_outliers(self) -> bool:
        return self.start.keeps_outliers

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        return self.start.grids(scheme)

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        rounded = checked_round(self.start, weight, statistics, scheme)
        hessian = statistics.required("second_moments").to(weight.dtype)
        target = weight - (rounded.dequantize() - rounded.on_grid())  # what outliers leave
        part = single_part(self, rounded)
        part = descended(target, part, hessian, self.sweeps)
        if self.refits:
            wanted = linear(target, hessian)
            for _ in range(self.refits):
                part = descended(target, refit_scales(wanted, part, hessian), hessian, self.sweeps)
        return replace(rounded, parts=(part,))


def descended(
    target: Tensor,  # (out, in)
    part: Part,  # all columns of a weight
    hessian: Tensor,  # (in, in), of the dtype of the target
    sweeps: int,
) -> Part:
    """Returns the part after coordinate descent towards a target, on the grid as it is."""
    group_of = group_numbers(target, target.shape[1] // part.params[0].shape[1])
    engine = engine_for(target, part.grid)
    on_grid = engine.coordinate_descent(target, part.dequantize(), hessian, group_of, part.params, sweeps)
    return Part.of(part.grid, on_grid, part.params)
