"""Trains the weights of a block's layers together, so that the block puts out what the float model's does."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from opt8bit.backends import warn
from opt8bit.optim import Adam8bit
from opt8bit.ptq.model.anatomy import replaced
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.reconstruction.parametrization import Parametrization, TrainedWeight
from opt8bit.ptq.reconstruction.scales import TrainScales
from opt8bit.recipe.arguments import check_count, check_positive

HELD_OUT = 8  # one batch of so many tells which parameters are best, and is not learned from


class Example(NamedTuple):
    """A batch that a block is trained on.

    Attributes:
        call: of the block, with the hidden states of the compressed model.
        target: (sequences, length, d), what the float model's block puts out.
        mask: (sequences, length), true where a token counts; None where all do.
    """

    call: Call
    target: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Says how blocks are trained once their layers are rounded.

    The loss is the mean squared error of the block's output over the tokens that count, relative to the variance of
    what the block adds. The parameters of the least loss on batches that were not learned from are kept, those at the
    start included: there the block is never worse than it was. The optimizer is the library's own, with 8-bit states.

    Args:
        parametrization: what is trained.
        steps: of the optimizer, one batch each; the learning rate falls to 0 along a cosine.
        looks: how often the loss on held-out batches is measured.

    Raises:
        TypeError: ``parametrization`` is not one.
        ValueError: ``steps`` or ``looks`` is not a positive integer, or the parametrization's ``lr`` not positive.
    """

    parametrization: Parametrization = field(default_factory=TrainScales)
    steps: int = 100
    looks: int = 5

    def __post_init__(self) -> None:
        if not isinstance(self.parametrization, Parametrization):
            raise TypeError(f"parametrization must be one, such as TrainScales(), got {self.parametrization!r}")
        check_positive(f"{type(self.parametrization).__name__}.lr", getattr(self.parametrization, "lr", math.nan))
        check_count("steps", self.steps)
        check_count("looks", self.looks)

    def train(
        self, block: nn.Module, weights: Mapping[str, TrainedWeight], examples: Sequence[Example]
    ) -> tuple[float, float]:
        """Trains weights in place.

        Args:
            block: with its layers rounded; it stays as it is.
            weights: of its layers, by name.
            examples: what it is to do.

        Returns:
            The loss on held-out batches at the start, and that of the parameters that were kept.

        Raises:
            ValueError: the loss at the start is not finite.

        Warns:
            UserWarning: it is not finite at the end, so that what was best before that is kept.
        """
        learned, held_out = _divided(examples)
        generator = torch.Generator().manual_seed(0)
        params = [param for weight in weights.values() for param in weight.parameters()]
        optimizer = Adam8bit(params, lr=self.parametrization.lr)
        first = best = _held_out_loss(block, weights, held_out)
        if not math.isfinite(first):
            raise ValueError(f"the loss must be finite before the first step, got {first}")
        kept, loss = [param.detach().clone() for param in params], first
        for step in range(self.steps):
            progress = step / self.steps
            optimizer.param_groups[0]["lr"] = self.parametrization.lr * (1 + math.cos(math.pi * progress)) / 2
            example = learned[int(torch.randint(len(learned), (), generator=generator))]
            with torch.enable_grad():
                optimizer.zero_grad()
                penalty = sum(weight.penalty(progress) for weight in weights.values())
                (_loss(block, weights, example, progress) + penalty).backward()
            optimizer.step()
            for weight in weights.values():
                weight.confine()
            if (step + 1) % math.ceil(self.steps / self.looks) == 0 or step + 1 == self.steps:
                loss = _held_out_loss(block, weights, held_out)
                if loss < best:
                    best, kept = loss, [param.detach().clone() for param in params]
        if not math.isfinite(loss):
            warn(f"the loss of {', '.join(weights)} became {loss} in training: the best weights before are kept")
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
        return first, best


@torch.no_grad()
def _held_out_loss(block: nn.Module, weights: Mapping[str, TrainedWeight], examples: Sequence[Example]) -> float:
    losses = [float(_loss(block, weights, example, 1.0)) for example in examples]
    return sum(losses) / len(losses)


def _divided(examples: Sequence[Example]) -> tuple[Sequence[Example], Sequence[Example]]:
    """Returns the batches to learn from, and those that tell what is best; of a single one, both are the same."""
    count = max(1, len(examples) // HELD_OUT)
    return (examples[:-count], examples[-count:]) if len(examples) > 1 else (examples, examples)


def _loss(block: nn.Module, weights: Mapping[str, TrainedWeight], example: Example, progress: float) -> Tensor:
    with _with_weights(block, weights, progress):
        y = example.call.of(block)
    dtype = torch.promote_types(y.dtype, torch.float32)
    target, hidden = example.target.to(dtype), example.call.hidden.to(dtype)
    counts = slice(None) if example.mask is None else example.mask.bool()
    added = (target - hidden)[counts]
    return (y.to(dtype) - target)[counts].square().mean() / added.var().clamp(min=torch.finfo(dtype).tiny)


@contextmanager
def _with_weights(block: nn.Module, weights: Mapping[str, TrainedWeight], progress: float) -> Iterator[None]:
    """Lets layers of a block compute with weights that gradients pass through, inside the context."""

    def forward(layer: Any, weight: TrainedWeight) -> Any:
        return lambda x: linear(x, weight.weight(progress).to(x.dtype), layer.bias)

    layers = {name: block.get_submodule(name) for name in weights}
    with replaced({layer: forward(layer, weights[name]) for name, layer in layers.items()}):
        yield
