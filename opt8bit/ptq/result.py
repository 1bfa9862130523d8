"""What compression gives: rounded weights and biases by layer, a report on each, and the model that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import matrix
from opt8bit.ptq.ends import Probe, Quality
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.placement import Places
from opt8bit.ptq.source import Source
from opt8bit.quant.weight import QuantizedWeight

Change = QuantizedWeight | Tensor


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: of the layer in the model.
        shape: (out, in).
        bits_per_weight: everything stored counted, but the bias.
        error_rounded: of the output against the float model's, squared, relative to the square of that output.
        error_corrected: the same with the bias; higher, maybe, where that is from the error of the whole block.
        bias_norm: of what Bias Compensation added.
        bias_bytes: that it takes beyond what the layer had, at the model's dtype; 0 where another layer holds it.
        bias_place: what holds it: "own", a switch of the configuration, "through NAME"; None if there is none.
        symmetry_cost: by how much the grid's symmetry raises the squared error of rounding to nearest; None without it.
        note: why there is no correction where one was asked for, or which servers do not use the bias.
        seconds: of the layer's stage, shared among its layers.
    """

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    error_rounded: float
    error_corrected: float
    bias_norm: float
    bias_bytes: int
    bias_place: str | None
    symmetry_cost: float | None
    note: str
    seconds: float


@dataclass
class Result:
    """A compressed model.

    Attributes:
        source: of the model that was given, unchanged.
        recipe: what was asked for.
        places: what lets each linear layer of the blocks hold a bias.
        changes: what has changed, by the name of the model's parameter: quantized weights, (out, in), and biases,
            (out,) or, where they go by position, (length, out). Everything else is as the source has it.
        report: one row a layer, in the order of compression.
        quality: how well the model predicts text that was held out, before and after.
        probe: what a written checkpoint is checked by.
    """

    source: Source
    recipe: Recipe
    places: Places
    changes: Mapping[str, Change] = field(default_factory=dict)
    report: list[LayerReport] = field(default_factory=list)
    quality: Quality | None = None
    probe: Probe | None = None

    @property
    def model(self) -> nn.Module:
        """As it was; where it is read block by block, its blocks' parameters are on the meta device."""
        return self.source.model

    @property
    def weights(self) -> int:
        """How many were compressed."""
        return sum(math.prod(layer.shape) for layer in self.report)

    @property
    def bits_per_weight(self) -> float:
        """Of all compressed layers together, everything stored counted, but the biases."""
        stored = sum(layer.bits_per_weight * math.prod(layer.shape) for layer in self.report)
        return stored / self.weights

    @property
    def bias_bytes(self) -> int:
        """That biases take beyond what the model had."""
        return sum(layer.bias_bytes for layer in self.report)

    def compressed_model(self) -> nn.Module:
        """A copy of the model with the compressed weights, as the exported one will be, all in memory."""
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
