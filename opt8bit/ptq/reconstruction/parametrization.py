"""What a way to train rounded weights has to say of one layer; the engine knows all else."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

from opt8bit.quant.weight import QuantizedWeight


class TrainedWeight(nn.Module, ABC):
    """One layer's weight while it is trained: its parameters, and what they stand for."""

    @abstractmethod
    def weight(self, progress: float) -> Tensor:
        """Returns the weight (out, in), through which gradients reach the parameters.

        Args:
            progress: of the training, from 0 to 1.
        """

    def penalty(self, progress: float) -> Tensor | float:
        """Returns what is added to the loss."""
        return 0.0

    def confine(self) -> None:
        """Moves parameters back to where they have to be, after a step."""

    @abstractmethod
    def harden(self) -> QuantizedWeight:
        """Returns what is stored; ``harden().dequantize()`` is ``weight(1.0)``, bit for bit."""


class Parametrization(ABC):
    """A way to train rounded weights: a frozen dataclass.

    Attributes:
        lr: of the engine's optimizer, for the parameters of :class:`TrainedWeight`.
    """

    lr: float

    @abstractmethod
    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        """Returns a layer's weight as it is before the first step.

        Args:
            weight: (out, in), of the float model.
            rounded: that a rounding method has made of it.
        """
