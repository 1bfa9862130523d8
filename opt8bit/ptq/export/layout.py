"""How a checkpoint holds a rounded weight: what every format answers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.methods import Method
from opt8bit.ptq.result import Result
from opt8bit.quant.weight import WeightScheme


class Planned(NamedTuple):
    """A layer, and how its weight will be rounded."""

    module: nn.Module
    scheme: WeightScheme
    method: Method


class Layout(ABC):
    """One format of checkpoints."""

    @abstractmethod
    def check(self, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        """
        Args:
            layers: by name.
            left: names of linear layers of the blocks that stay as they are.

        Raises:
            ValueError: the format cannot hold layers so rounded; the message names one, and what to use instead.
        """

    @abstractmethod
    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that are the weight of ``module``, by what stands behind the module's name."""

    def config(self, result: Result) -> dict[str, Any] | None:
        """What the model's configuration says about the weights, its ``quantization_config``; None for nothing."""
        return None
