"""One scale for all that a layer sees, found beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.ptq.activations.quantizer import InputQuantizer
from opt8bit.quant.uniform import RESTRICTED, UniformGrid, UniformParams


class StaticPerTensor(InputQuantizer):
    """Rounds inputs to evenly spaced values between the least and the largest number observed, and clips the rest.

    Args:
        bits: 2 to 8.
        symmetric: whether the zero point is fixed in the middle.

    Raises:
        ValueError: an argument is not one of these.
    """

    low: Tensor
    high: Tensor

    def __init__(self, bits: int = 8, *, symmetric: bool = False) -> None:
        super().__init__()
        self.grid = UniformGrid(bits, symmetric=RESTRICTED if symmetric else False)
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def observe(self, x: Tensor) -> None:
        """
        Raises:
            ValueError: an input is not finite, or too far from another one for float32 to hold the range.
        """
        if not bool(x.isfinite().all()):
            raise ValueError("an input is not finite")
        if not x.numel():
            return
        low, high = torch.minimum(self.low, x.amin().float()), torch.maximum(self.high, x.amax().float())
        # Symmetric grids span twice the larger of both.
        if not bool((2 * torch.maximum(high.abs(), low.abs())).isfinite()):
            raise ValueError(f"inputs from {float(low):.3g} to {float(high):.3g} are too large for a range in float32")
        self.low, self.high = low, high

    @property
    def params(self) -> UniformParams:
        """The scale and the zero point, (1,).

        Raises:
            ValueError: nothing was observed.
        """
        if not bool(self.low <= self.high):
            raise ValueError("a static quantizer must observe inputs before it rounds any")
        return self.grid.fit(torch.stack([self.low, self.high]))

    def forward(self, x: Tensor) -> Tensor:
        return self.grid.nearest(x.float(), self.params).to(x.dtype)
