"""One scale for all that a layer sees, found beforehand."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.ptq.activations.quantizer import InputQuantizer
from opt8bit.quant.uniform import UniformGrid, UniformParams


class StaticPerTensor(InputQuantizer):
    """Evenly spaced values from the least to the largest number that was observed; what lies beyond is clipped.

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
        self.grid = UniformGrid(bits, symmetric=symmetric)
        self.register_buffer("low", torch.tensor(torch.inf))
        self.register_buffer("high", torch.tensor(-torch.inf))

    def observe(self, x: Tensor) -> None:
        """
        Raises:
            ValueError: an input is not finite.
        """
        if not bool(x.isfinite().all()):
            raise ValueError("an input is not finite")
        if not x.numel():
            return
        self.low = torch.minimum(self.low, x.amin().float())
        self.high = torch.maximum(self.high, x.amax().float())

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
