"""Training nothing but scales: codes and zero points stay as the rounding method chose them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.quant.weight import QuantizedWeight
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

    lr: float = 1e-3

    def __post_init__(self) -> None:
        check_positive("lr", self.lr)

    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        return _TrainedScales(rounded)


class _TrainedScales(TrainedWeight):
    def __init__(self, rounded: QuantizedWeight) -> None:
        super().__init__()
        self.rounded = rounded
        self.logarithms = nn.ParameterList(torch.zeros_like(part.params.scale) for part in rounded.parts)

    def weight(self, progress: float) -> Tensor:
        return self._scaled().dequantize()

    @torch.no_grad()
    def confine(self) -> None:
        for logarithm in self.logarithms:
            logarithm.clamp_(-FARTHEST, FARTHEST)

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        return self._scaled()

    def _scaled(self) -> QuantizedWeight:
        parts = []
        for part, logarithm in zip(self.rounded.parts, self.logarithms, strict=True):
            scale = part.params.scale * logarithm.exp()
            stored = part.grid.storable(scale.detach()) + (scale - scale.detach())  # the gradient passes the rounding
            params: Any = part.params._replace(scale=stored)
            parts.append(replace(part, params=params))
        return replace(self.rounded, parts=tuple(parts))
