"""Training nothing but scales: codes and zero points stay as the rounding method chose them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.straight_through import stored_through
from opt8bit.quant.grid import Grid
from opt8bit.quant.weight import Part, QuantizedWeight
from opt8bit.recipe.arguments import check_positive

FARTHEST = 0.5  # of a logarithm: scales stay within e^0.5 of where they began


@dataclass(frozen=True)
class TrainScales(Parametrization):
    """Trains scales as ``s exp(u)``, in the dtype in which they are stored from the first step on.

    Args:
        lr: of u: a step of Adam changes a scale by about this fraction.

    Source: EfficientQAT: Efficient Quantization-Aware Training for Large Language Models, section 3.3, by blocks here
    (https://arxiv.org/abs/2407.11062).
    """

    lr: float = 3e-3

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)

    def trains(self, grid: Grid) -> bool:
        return "scale" in grid.params_type._fields

    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        return _TrainedScales(rounded)


class LogScales(nn.Module):
    """The scales of a weight's parts as ``s exp(u)``: ``u``, which starts at 0, is trained.

    Args:
        parts: of the weight.
    """

    def __init__(self, parts: Sequence[Part]) -> None:
        super().__init__()
        self.starts = [part.params.scale for part in parts]
        self.logarithms = nn.ParameterList(torch.zeros_like(start) for start in self.starts)

    def of(self, parts: Sequence[Part]) -> tuple[Part, ...]:
        """Returns parts with these scales, in the dtype in which they are stored. Gradients pass this rounding."""
        found = []
        for part, start, logarithm in zip(parts, self.starts, self.logarithms, strict=True):
            scale = stored_through(part.grid, start * logarithm.exp(), part.params)
            found.append(replace(part, params=part.params._replace(scale=scale)))
        return tuple(found)

    @torch.no_grad()
    def confine(self) -> None:
        """Moves scales back to within e^0.5 of where they began."""
        for logarithm in self.logarithms:
            logarithm.clamp_(-FARTHEST, FARTHEST)


class _TrainedScales(TrainedWeight):
    def __init__(self, rounded: QuantizedWeight) -> None:
        super().__init__()
        self.rounded = rounded
        self.scales = LogScales(rounded.parts)

    def weight(self, progress: float) -> Tensor:
        return self._scaled().dequantize()

    def confine(self) -> None:
        self.scales.confine()

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        return self._scaled()

    def _scaled(self) -> QuantizedWeight:
        return replace(self.rounded, parts=self.scales.of(self.rounded.parts))
