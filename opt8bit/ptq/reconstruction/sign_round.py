"""SignRound: training the rounding and the ranges of the float model's weights by signed gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.straight_through import rounded_through, stored_through
from opt8bit.quant.grid import Grid, at
from opt8bit.quant.uniform import RESTRICTED, UniformGrid, UniformParams, is_uniform
from opt8bit.quant.weight import Part, QuantizedWeight
from opt8bit.recipe.arguments import check_positive

FARTHEST = 0.5  # of a step: V decides only which of its two neighbours a weight becomes


@dataclass(frozen=True)
class SignRound(Parametrization):
    """SignRound, as AutoRound has it::

        s = (beta max(w) - alpha min(w)) / (2^bits - 1),  z = round(-alpha min(w) / s)
        w = s (clamp(round(w / s + V) + z, 0, 2^bits - 1) - z)

    with V = 0 and alpha = beta = 1 at the start, which is rounding to nearest from min to max: what a rounding method
    has chosen is given up, but for the grid. So take ``method="rtn"`` with it, and ``optimizer=SignSGD`` with
    ``schedule="linear"``. :class:`TrainRounding` is what goes on from codes.

    Args:
        lr: of V, alpha and beta; None for 1 / steps, so that V moves by half a step of the grid in all.

    Source: Optimize Weight Rounding via Signed Gradient Descent for the Quantization of LLMs
    (https://arxiv.org/abs/2309.05516).
    """

    lr: float | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.lr is not None:
            check_positive("lr", self.lr)

    def rates(self, steps: int) -> dict[str, float]:
        rate = 1 / steps if self.lr is None else self.lr
        return {"offset": rate, "alpha": rate, "beta": rate}

    def trains(self, grid: Grid) -> bool:
        return is_uniform(grid)  # codes that follow each other stand for evenly spaced values

    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        return _SignRounded(weight, rounded)


class _SignRounded(TrainedWeight):
    def __init__(self, weight: Tensor, rounded: QuantizedWeight) -> None:
        super().__init__()
        if len(rounded.parts) != 1 or rounded.parts[0].columns is not None or rounded.outliers is not None:
            raise ValueError(f"SignRound trains weights on one grid, without outliers, got {len(rounded.parts)} parts")
        (part,) = rounded.parts
        assert is_uniform(part.grid)
        self.rounded, self.grid = rounded, part.grid
        self.groups = weight.to(part.params.scale.dtype).unflatten(1, (part.params.scale.shape[1], -1))
        self.low, self.high = self.groups.amin(-1).clamp(max=0), self.groups.amax(-1).clamp(min=0)
        self.offset = nn.Parameter(torch.zeros_like(self.groups))
        self.alpha, self.beta = (nn.Parameter(torch.ones_like(part.params.scale)) for _ in range(2))

    def weight(self, progress: float) -> Tensor:
        return replace(self.rounded, parts=(self._part(),)).dequantize()

    @torch.no_grad()
    def confine(self) -> None:
        self.offset.clamp_(-FARTHEST, FARTHEST)
        for factor in (self.alpha, self.beta):
            factor.clamp_(0, 1)

    @torch.no_grad()
    def harden(self) -> QuantizedWeight:
        part = self._part()
        return replace(self.rounded, parts=(replace(part, codes=part.codes.to(torch.uint8)),))

    def _part(self) -> Part:
        part = self.rounded.parts[0]
        params = self._params()
        scale, zero_point = at(params, (..., None))
        steps = rounded_through(self.groups / scale + self.offset) + zero_point
        return replace(part, codes=steps.clamp(0, self.grid.largest).flatten(1), params=params)

    def _params(self) -> UniformParams:
        """Returns the params of the ranges of now, as :class:`UniformGrid` fits them to a range from min to max."""
        grid = self.grid
        low, high = self.low * self.alpha, self.high * self.beta
        middle = 2 ** (grid.bits - 1)
        if grid.symmetric is True:
            scale = _stored(grid, torch.maximum(high, -low) / middle)
            return UniformParams(scale, torch.where(self.high > -self.low, middle - 1, middle).to(scale))
        if grid.symmetric == RESTRICTED:
            scale = _stored(grid, 2 * torch.maximum(high, -low) / grid.largest)
            return UniformParams(scale, torch.full_like(scale, middle))
        scale = _stored(grid, (high - low) / grid.largest)
        return UniformParams(scale, rounded_through(-low / scale).clamp(max=grid.largest))


def _stored(grid: UniformGrid, step: Tensor) -> Tensor:
    """Returns scales as they are stored, 1 for groups of zeros. Gradients pass the rounding."""
    return stored_through(grid, torch.where(step > 0, step, 1))
