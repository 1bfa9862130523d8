"""Rounded weights in the model's own dtype and layout, for anything that loads the original."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from opt8bit.ptq.blocks import as_stored
from opt8bit.ptq.export.layout import Layout, Planned
from opt8bit.ptq.layer import Compressed


class Dense(Layout):
    """Holds every layer, outliers included."""

    def check(self, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        pass

    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        return {"weight": as_stored(module, layer.installed)}
