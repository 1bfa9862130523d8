"""Defines what a way to train rounded weights says of one layer; the engine knows the rest."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.quant.grid import Grid
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
        lr: learning rate of the parameters of :class:`TrainedWeight` at the first step.
    """

    lr: float

    def rates(self, steps: int) -> Mapping[str, float]:
        """Returns the learning rates of parameters whose rate is not ``lr``.

        Args:
            steps: of the training that the rates are for.

        Returns:
            Rates at the first step, by the name of the attribute of :class:`TrainedWeight` that holds the parameters.
        """
        return {}

    def trains(self, grid: Grid) -> bool:
        """Returns whether weights on a grid can be trained."""
        return True

    @abstractmethod
    def start(self, weight: Tensor, rounded: QuantizedWeight) -> TrainedWeight:
        """Returns a layer's weight as it is before the first step.

        Args:
            weight: (out, in), of the float model.
            rounded: that a rounding method has made of it.
        """


def started(
    parametrization: Parametrization,
    weight: Tensor,  # (out, in)
    rounded: QuantizedWeight,
) -> TrainedWeight:
    """Returns a layer's weight before the first step, if it can be trained.

    The parametrization gets a copy of the float model's weight, which it may change.

    Raises:
        TypeError: ``start`` returned something else, or ``penalty`` no number.
        ValueError: there are no parameters, or the weight is not finite, of another shape, or does not depend on them.
    """
    name = type(parametrization).__name__
    trained: Any = parametrization.start(weight.detach().clone(), rounded)
    if not isinstance(trained, TrainedWeight):
        raise TypeError(f"{name}.start must return a TrainedWeight, got {type(trained).__name__}")
    kind = type(trained).__name__
    if not any(param.requires_grad for param in trained.parameters()):
        raise ValueError(f"{kind} must have parameters to train, as nn.Parameter, got none")
    with torch.enable_grad():
        found: Any = trained.weight(0.0)
        penalty: Any = trained.penalty(0.0)
    if not isinstance(found, Tensor) or found.shape != weight.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"{kind}.weight must return {tuple(weight.shape)}, got {got}")
    if not bool(found.isfinite().all()):
        raise ValueError(f"{kind}.weight must return finite numbers, got {int((~found.isfinite()).sum())} others")
    if not found.requires_grad:
        raise ValueError(f"{kind}.weight must depend on its parameters, got a weight without gradient")
    if not isinstance(penalty, (int, float)) and not (isinstance(penalty, Tensor) and penalty.dim() == 0):
        got = tuple(penalty.shape) if isinstance(penalty, Tensor) else type(penalty).__name__
        raise TypeError(f"{kind}.penalty must return a number, got {got}")
    return trained


@torch.no_grad()
def hardened(trained: TrainedWeight) -> QuantizedWeight:
    """Returns what is stored of a trained weight, if that is what was trained.

    Raises:
        TypeError: ``harden`` returned something else.
        ValueError: it is not ``weight(1.0)``.
    """
    name, hard = type(trained).__name__, trained.harden()
    if not isinstance(hard, QuantizedWeight):
        raise TypeError(f"{name}.harden must return a QuantizedWeight, got {type(hard).__name__}")
    stored, wanted = hard.dequantize(), trained.weight(1.0)
    if stored.shape != wanted.shape:
        raise ValueError(f"{name}.harden must return {tuple(wanted.shape)}, got {tuple(stored.shape)}")
    if not torch.equal(stored, wanted.to(stored.dtype)):
        off = float((stored - wanted).abs().max())
        raise ValueError(f"{name}.harden().dequantize() must be weight(1.0), differs by up to {off:.3g}")
    return hard
