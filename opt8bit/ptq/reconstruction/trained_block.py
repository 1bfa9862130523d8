"""A block while its layers' weights are trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from opt8bit.ptq.model.anatomy import replaced
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.reconstruction.loss import Example, relative_error
from opt8bit.ptq.reconstruction.parametrization import TrainedWeight


class TrainedBlock:
    """Runs a block with weights that gradients pass through, in place of its layers' own.

    Args:
        block: with its layers rounded; it stays as it is.
        weights: of its layers, by name.
    """

    def __init__(self, block: nn.Module, weights: Mapping[str, TrainedWeight]) -> None:
        self.block, self.weights = block, weights
        self._layers = {name: block.get_submodule(name) for name in weights}

    def parameters(self) -> list[nn.Parameter]:
        """Returns all that is trained."""
        return [param for weight in self.weights.values() for param in weight.parameters()]

    def built(self, progress: float) -> dict[str, Tensor]:
        """Returns the layers' weights of now, (out, in) each, by name; ``progress`` is that of the training."""
        return {name: weight.weight(progress) for name, weight in self.weights.items()}

    def output(self, call: Call, built: Mapping[str, Tensor]) -> Tensor:
        """Returns what the block puts out with weights that :meth:`built` has returned, (sequences, length, d)."""

        def forward(layer: Any, weight: Tensor) -> Any:
            return lambda x: linear(x, weight.to(x.dtype), layer.bias)

        with replaced({layer: forward(layer, built[name]) for name, layer in self._layers.items()}):
            return call.of(self.block)

    def penalty(self, progress: float) -> Any:
        """Returns the sum of what the weights add to the loss."""
        return sum(weight.penalty(progress) for weight in self.weights.values())

    def confine(self) -> None:
        """Moves parameters back to where they have to be, after a step."""
        for weight in self.weights.values():
            weight.confine()

    @torch.no_grad()
    def loss(self, examples: Sequence[Example]) -> float:
        """Returns the mean loss of examples, with the weights as they are at the end of a training."""
        built = self.built(1.0)
        losses = [float(relative_error(self.output(example.call, built), example)) for example in examples]
        return sum(losses) / len(losses)


class Best:
    """The parameters of a block that have had the least loss on examples that are not learned from.

    Args:
        trained: the block.
        examples: to tell by.

    Attributes:
        first: the loss at the start.
        loss: the least loss.
        step: after which it was there; 0 for the start.

    Raises:
        ValueError: the loss at the start is not finite.
    """

    def __init__(self, trained: TrainedBlock, examples: Sequence[Example]) -> None:
        self._trained, self._examples, self.step = trained, examples, 0
        self.first = self.loss = trained.loss(examples)
        if not math.isfinite(self.first):
            raise ValueError(f"the loss must be finite before the first step, got {self.first}")
        self._kept = self._copies()

    def look(self, step: int) -> None:
        """Keeps the parameters of now, after this step, if they are better."""
        loss = self._trained.loss(self._examples)
        if loss < self.loss:
            self.loss, self.step, self._kept = loss, step, self._copies()

    @torch.no_grad()
    def restore(self) -> None:
        """Puts the best parameters in place."""
        for param, value in zip(self._trained.parameters(), self._kept, strict=True):
            param.copy_(value)

    def _copies(self) -> list[Tensor]:
        return [param.detach().clone() for param in self._trained.parameters()]
