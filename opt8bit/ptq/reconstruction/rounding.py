"""Training the rounding that a method has chosen: codes move to their neighbours, and scales go along."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.scales import LogScales
from opt8bit.ptq.reconstruction.straight_through import rounded_through
from opt8bit.quant.grid import Grid, at
from opt8bit.quant.uniform import is_uniform
from opt8bit.quant.weight import Part, QuantizedWeight
from opt8bit.recipe.arguments import check_positive

CELL = 0.45  # of a step: a weight starts at most so far from its code, and 0.5 would be on the border
FARTHEST = 1.0  # of a step: more would only move a code beyond its neighbour


@dataclass(frozen=True)
class TrainRounding(Parametrization):
    """Codes are ``round(u + V)``, where u starts inside the cell of the code q that a rounding method chose::

        u = q + clamp(w / s + z - q, -0.45, 0.45)
        w = s exp(t) (clamp(round(u + V), 0, 2^bits - 1) - z)

    V and t start at 0 and are trained; gradients pass the rounding. A method that looks at inputs chooses many codes
    that are not the nearest: from the nearest ones, what it has gained would be lost before the first step. Codes that
    were close calls are the first to change.

    Args:
        lr: of V: a step of Adam moves a weight by about this fraction of a step of its grid.
        scale_lr: of t: a step of Adam changes a scale by about this fraction.

    Source: SignRound's V (https://arxiv.org/abs/2309.05516), from another start and with scales as in EfficientQAT.
    """

    lr: float = 3e-3
    scale_lr: float = 3e-3

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)
        check_positive("scale_lr", self.scale_lr)

    def rates(self, steps: int) -> dict[str, float]:
        return {"scales": self.scale_lr}

    def trains(self, grid: Grid) -> bool:
        return is_uniform(grid)  # codes that follow each other stand for evenly spaced values

    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        return _TrainedRounding(weight, rounded)


class _TrainedRounding(TrainedWeight):
    def __init__(self, weight: Tensor, rounded: QuantizedWeight) -> None:
        super().__init__()
        self.rounded = rounded
        self.scales = LogScales(rounded.parts)
        weight = weight.to(rounded.parts[0].params.scale.dtype)
        if rounded.outliers is not None:  # the codes are for what these leave
            weight[rounded.outliers.rows, rounded.outliers.columns] -= rounded.outliers.values
        self.starts = [_inside_cells(weight, part) for part in rounded.parts]
        self.offsets = nn.ParameterList(torch.zeros_like(start) for start in self.starts)

    def weight(self, progress: float) -> Tensor:
        return replace(self.rounded, parts=self.scales.of(self._parts())).dequantize()

    @torch.no_grad()
    def confine(self) -> None:
        self.scales.confine()
        for offset in self.offsets:
            offset.clamp_(-FARTHEST, FARTHEST)

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        parts = [replace(part, codes=part.codes.to(torch.uint8)) for part in self._parts()]
        return replace(self.rounded, parts=self.scales.of(parts))

    def _parts(self) -> list[Part]:
        """Returns the parts with the codes of now, which are floats, so that they can have a gradient."""
        found = []
        for part, start, offset in zip(self.rounded.parts, self.starts, self.offsets, strict=True):
            found.append(replace(part, codes=rounded_through(start + offset, 2**part.grid.bits - 1)))
        return found


def _inside_cells(weight: Tensor, part: Part) -> Tensor:
    """Returns the places of weights (out, in) on the grid of a part, (out, n), each moved into the cell of its code."""
    columns = weight if part.columns is None else weight[:, part.columns]
    scale, zero_point = at(part.params, (..., None))
    groups = columns.unflatten(1, (scale.shape[1], -1))
    codes = part.codes.to(weight.dtype)
    places = (groups / scale + zero_point).flatten(1)
    return codes + (places - codes).clamp_(-CELL, CELL)
