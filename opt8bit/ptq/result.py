"""Holds what compression returns: rounded weights and biases by layer, their reports, and the model they make."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.bias_places import Places
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.plan import Plan
from opt8bit.ptq.tasks.task import Probe, Quality
from opt8bit.quant.weight import QuantizedWeight
from opt8bit.recipe.recipe import Recipe

Change = QuantizedWeight | Tensor


class Step(NamedTuple):
    """The progress of a refinement.

    Attributes:
        step: that was just made, from 1; 0 before the first.
        steps: of all.
        loss: on the windows of the step, nats per token; NaN if there was none, or it was dropped.
        held_out: on the windows that are not learned from, where it was measured.
        seconds_left: as the steps so far have taken; NaN before the first.
    """

    step: int
    steps: int
    loss: float
    held_out: float | None
    seconds_left: float


@dataclass(frozen=True)
class Refined:
    """The outcome of :func:`refine`; losses are in nats a token, on windows that it did not learn from.

    Attributes:
        steps: that were asked for.
        kept: the step that the result is from; 0 for the start.
        start: loss before the first step.
        best: that of the result.
        dropped: steps that were not made, as their loss or a gradient was not finite.
    """

    steps: int
    kept: int
    start: float
    best: float
    dropped: int


@dataclass
class Result:
    """A compressed model.

    Attributes:
        source: of the model that was given, unchanged.
        plan: what was to become of each layer.
        places: what lets each linear layer of the blocks hold a bias.
        changes: what has changed, by the name of the model's parameter: quantized weights, (out, in), and biases,
            (out,) or, where they go by position, (length, out). Everything else is as the source has it.
        report: one row a layer, in the order of compression.
        quality: how well the model predicts text that was held out, before and after.
        probe: what a written checkpoint is checked by.
        refined: what came of training it as a whole; None where it was not.
    """

    source: Source
    plan: Plan
    places: Places
    changes: Mapping[str, Change] = field(default_factory=dict)
    report: list[LayerReport] = field(default_factory=list)
    quality: Quality | None = None
    probe: Probe | None = None
    refined: Refined | None = None

    @property
    def recipe(self) -> Recipe:
        """The recipe, with what depends on the model filled in."""
        return self.plan.recipe

    @property
    def model(self) -> nn.Module:
        """The model as it was; where it is read block by block, its blocks' parameters are on the meta device."""
        return self.source.model

    @property
    def weights(self) -> int:
        """The number of weights that were compressed."""
        return sum(layer.weights for layer in self.report)

    @property
    def bits_per_weight(self) -> float:
        """The bits of all compressed layers together, everything stored counted, except the biases."""
        stored = sum(layer.bits_per_weight * layer.weights for layer in self.report)
        return stored / self.weights

    @property
    def bias_bytes(self) -> int:
        """The bytes that biases take beyond what the model had."""
        return sum(layer.bias_bytes for layer in self.report)

    def compressed_model(self) -> nn.Module:
        """Returns a copy of the model with the compressed weights, as the exported one will be, all in memory."""
        result = self.source.copy()
        install(result, self.changes)
        return result


def with_position_bias(
    output: Tensor,  # (sequences, length, out), or all tokens in one dimension: (tokens, out)
    bias: Tensor,  # (length, out)
) -> Tensor:
    """
    Raises:
        ValueError: the sequences are longer than those the bias is from, or, with all tokens in one dimension, the
            tokens are no whole number of sequences of that length.
    """
    length = len(bias)
    if output.dim() == 2 and len(output) % length == 0:
        return (output.unflatten(0, (-1, length)) + bias.to(output)).flatten(0, 1)
    if output.dim() == 2 or output.shape[1] > length:
        raise ValueError(f"biases by position are for sequences of {length} tokens, got {tuple(output.shape[:-1])}")
    return output + bias[: output.shape[1]].to(output)


def _adding_by_position(bias: Tensor) -> Callable[..., Tensor]:
    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return with_position_bias(output, bias)

    return hook


@torch.no_grad()
def install(model: nn.Module, changes: Mapping[str, Change]) -> None:
    """Puts changed parameters into a model, or any part of one, by their names there."""
    for name, change in changes.items():
        owner, _, kind = name.rpartition(".")
        module = model.get_submodule(owner)
        if isinstance(change, QuantizedWeight):
            matrix(module).copy_(change.dequantize())
        elif kind == "bias" and change.dim() == 2:
            if module.bias is not None:  # it is part of the one by position
                module.bias = nn.Parameter(torch.zeros_like(module.bias), requires_grad=False)  # type: ignore[arg-type]
            module.register_forward_hook(_adding_by_position(change))
        else:
            had: Tensor | None = getattr(module, kind)
            like = matrix(module) if had is None else had
            setattr(module, kind, nn.Parameter(change.to(like), requires_grad=False))
