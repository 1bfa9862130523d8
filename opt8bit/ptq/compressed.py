"""A compressed layer, as long as its block is worked on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opt8bit.quant.weight import QuantizedWeight


@dataclass(frozen=True)
class Compressed:
    """A layer's rounded weight, its whole bias, and the part of that which corrects.

    The bias and this part are (out,), or (length, out) where they go by position.
    """

    rounded: QuantizedWeight
    dtype: torch.dtype  # of the weight in its model
    bias: Tensor | None
    shift: Tensor | None

    @property
    def installed(self) -> Tensor:
        """The weight as the model will hold it, (out, in)."""
        return self.rounded.dequantize().to(self.dtype)

    def corrected(self, shift: Tensor) -> Compressed:
        """Returns the layer with ``shift`` added to its bias."""
        shift = shift.to(torch.promote_types(self.dtype, torch.float32))
        bias = shift if self.bias is None else self.bias + shift
        return replace(self, bias=bias, shift=shift if self.shift is None else self.shift + shift)

    @property
    def changes(self) -> dict[str, QuantizedWeight | Tensor]:
        """Returns what has changed, by the names of the layer's parameters."""
        bias = {} if self.bias is None or self.shift is None else {"bias": self.bias}
        return {"weight": self.rounded, **bias}
