"""How a checkpoint holds a rounded weight: what every format answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.result import Result


class Layout(ABC):
    """One format of checkpoints."""

    @abstractmethod
    def check(self, layer: Compressed, module: nn.Module) -> None:
        """
        Raises:
            ValueError: the format cannot hold the layer; the message says why, and what can.
        """

    @abstractmethod
    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that are the weight of ``module``, by what stands behind the module's name."""

    def config(self, result: Result) -> dict[str, Any] | None:
        """What the model's configuration says about the weights, its ``quantization_config``; None for nothing."""
        return None
