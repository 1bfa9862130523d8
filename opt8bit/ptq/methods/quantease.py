"""QuantEase: cyclic coordinate descent on the layer objective, one column after another, until nothing changes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq.arguments import check_count
from opt8bit.ptq.methods.kernels import kernels_for
from opt8bit.ptq.methods.method import PIECE, Method, by_column, check_method, group_numbers
from opt8bit.ptq.methods.rtn import RTN
from opt8bit.ptq.methods.scales import refit_scales
from opt8bit.quant.grid import Grid, P, at
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme


@dataclass(frozen=True)
class QuantEase(Method):
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
    start: Method = field(default_factory=RTN)
    refits: int = 0

    def __post_init__(self) -> None:
        check_count("sweeps", self.sweeps)
        check_count("refits", self.refits, least=0)
        check_method("start", self.start)

    @property
    def rowwise(self) -> bool:  # type: ignore[override]
        return self.start.rowwise

    @property
    def keeps_outliers(self) -> bool:
        return self.start.keeps_outliers

    def round(self, weight: Tensor, hessian: Tensor, scheme: WeightScheme) -> QuantizedWeight:
        rounded = self.start.round(weight, hessian, scheme)
        target = weight - (rounded.dequantize() - rounded.on_grid())  # what outliers leave
        (part,) = rounded.parts
        part = self._descended(target, part, hessian, scheme)
        if self.refits:
            wanted = linear(target, hessian.to(target.dtype))
            for _ in range(self.refits):
                part = self._descended(target, refit_scales(wanted, part, hessian), hessian, scheme)
        return replace(rounded, parts=(part,))

    def _descended(self, target: Tensor, part: Part, hessian: Tensor, scheme: WeightScheme) -> Part:
        on_grid = descend(target, part.dequantize(), hessian, part.params, scheme, self.sweeps)
        return Part.of(part.grid, on_grid, part.params)


def descend(
    weight: Tensor,  # (out, in), the target W
    on_grid: Tensor,  # (out, in), where to start
    hessian: Tensor,  # (in, in)
    params: Any,  # (out, groups)
    scheme: WeightScheme,
    sweeps: int,
) -> Tensor:
    """Coordinate descent on a fixed grid; returns the weight (out, in), of which every value lies on the grid."""
    group_of = group_numbers(weight, scheme.groups_of(weight))
    hessian = hessian.to(weight.dtype)
    kernels = kernels_for(weight, scheme.grid)
    if kernels is not None:
        return kernels.coordinate_descent(weight, on_grid, hessian, group_of, params, sweeps)
    result = on_grid.clone()
    active = torch.arange(len(weight), device=weight.device)
    for _ in range(sweeps):
        before = result[active]
        after = _sweep(weight[active], before, hessian, by_column(at(params, active), group_of), scheme.grid)
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
    """One pass over all columns; returns the weight (out, in) after it."""
    rounded = on_grid.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the weight is a row here
    residual = hessian @ (weight.T - rounded)  # [(W - Ŵ) H]ᵀ
    for start in range(0, len(rounded), PIECE):
        piece = slice(start, start + PIECE)
        before = rounded[piece].clone()
        _sweep_piece(rounded[piece], residual[piece], hessian[piece, piece], at(params, piece), grid)
        residual[start + PIECE :].addmm_(hessian[start + PIECE :, piece], before.sub_(rounded[piece]))
    return rounded.T


def _sweep_piece(rounded: Tensor, residual: Tensor, hessian: Tensor, params: P, grid: Grid[P]) -> None:
    """The columns of one piece, (n, out) each; ``residual`` is kept up to date inside it."""
    for j, curvature in enumerate(hessian.diagonal().tolist()):
        if curvature <= 0:
            continue  # no input reaches this column
        value = grid.nearest(torch.add(rounded[j], residual[j], alpha=1 / curvature), at(params, j))
        change = rounded[j] - value
        rounded[j] = value
        residual[j + 1 :].addcmul_(hessian[j + 1 :, j, None], change)
