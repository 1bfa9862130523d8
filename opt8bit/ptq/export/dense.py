"""Rounded weights in the model's own dtype and layout, for anything that loads the original."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.model.blocks import as_stored, matrix
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.quant.weight import QuantizedWeight


class Dense(HuggingFaceFormat):
    """Holds every layer, outliers included."""

    parts = ("weight",)
    is_packed = False

    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        pass

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        return {"weight": as_stored(module, weight.dequantize().to(matrix(module).dtype))}

    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        if "weight" not in parts or len(parts["weight"].shape) != 2:
            return None
        rows, columns = parts["weight"].shape
        return (rows, columns), None

    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return {}


FORMAT = Dense()
