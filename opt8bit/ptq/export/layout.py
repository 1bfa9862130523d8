"""How a checkpoint holds a rounded weight: what every format answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.methods import Format
from opt8bit.ptq.result import Result


class Planned(NamedTuple):
    """A layer, and how its weight will be rounded."""

    module: nn.Module
    format: Format


class Layout(ABC):
    """One format of checkpoints."""

    @abstractmethod
    def check(self, layers: Mapping[str, Planned]) -> None:
        """
        Raises:
            ValueError: the format cannot hold layers so rounded; the message names one, and what to use instead.
        """

    @abstractmethod
    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that are the weight of ``module``, by what stands behind the module's name.

        Raises:
            ValueError: some weights are kept exact, and the format has no place for them.
        """

    def config(self, result: Result) -> dict[str, Any] | None:
        """What the model's configuration says about the weights, its ``quantization_config``; None for nothing."""
        return None
