"""Compression block by block: collect what a layer sees, round it, correct its output, go on with what that gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import (
    Call,
    block_calls,
    evaluating,
    find_blocks,
    linear_layers,
    matrix,
    one_token,
    stages,
    stream_writers,
)
from opt8bit.ptq.layer import Compressed, Recipe, compress_stage
from opt8bit.ptq.outputs import OutputErrors
from opt8bit.ptq.placement import Places, bias_places, value_bias_through
from opt8bit.ptq.statistics import Inputs
from opt8bit.ptq.walk import halting, walks


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer.

    Attributes:
        name: of the layer in the model.
        shape: (out, in).
        bits_per_weight: everything stored counted, but the bias.
        error_rounded: of the output against the float model's, squared, relative to the square of that output.
        error_corrected: the same with the bias.
        bias_norm: of what Bias Compensation added.
        bias_bytes: that it takes beyond what the layer had, at the model's dtype.
        bias_place: what holds it: "own", a switch of the configuration, "through NAME"; None if there is none.
        note: why there is no correction where one was asked for.
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
    note: str
    seconds: float


@dataclass
class Result:
    """A compressed model.

    Attributes:
        model: the one that was given, unchanged.
        recipe: what was asked for.
        layers: the rounded weight and the bias of every compressed layer, by name.
        report: one row a layer, in the order of compression.
        places: what lets each layer hold a bias.
    """

    model: nn.Module
    recipe: Recipe
    places: Places
    layers: dict[str, Compressed] = field(default_factory=dict)
    report: list[LayerReport] = field(default_factory=list)

    def compressed_model(self) -> nn.Module:
        """A copy of the model with the compressed weights, as the exported one will be."""
        result = copy.deepcopy(self.model)
        modules = dict(result.named_modules())
        with torch.no_grad():
            for name, layer in self.layers.items():
                install(modules[name], layer)
        return result


def run(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    see: Callable[[LayerReport, int], None],
) -> Result:
    """Compresses every linear layer in the model's blocks; ``see`` gets each layer's report and the number of layers.

    Two streams go through the blocks side by side: the float model's hidden states, and those of the model as it has
    been compressed so far. Only one block is held twice.

    Raises:
        ValueError: a weight or an input is not finite, or a block does not call each of its layers once.
    """
    prefix, blocks = find_blocks(model)
    names = [f"{prefix}.{i}.{name}" for i, block in enumerate(blocks) for name in linear_layers(block)]
    result = Result(model, recipe, bias_places(model, names))
    with evaluating(model):
        calls = [block_calls(model, blocks, batch) for batch in batches]
        probes = block_calls(model, blocks, one_token(batches[0]))
        masks = [batch.get("attention_mask") for batch in batches]
        hidden = hidden_hat = [of_batch[0].hidden for of_batch in calls]
        for i, block in enumerate(blocks):
            here = [of_batch[i] for of_batch in calls]
            name = f"{prefix}.{i}"
            task = _BlockTask(name, block, probes[i], result, masks, lambda report: see(report, len(names)))
            hidden, hidden_hat = task.run(
                [call._replace(hidden=x) for call, x in zip(here, hidden, strict=True)],
                [call._replace(hidden=x) for call, x in zip(here, hidden_hat, strict=True)],
            )
    value_bias_through(result.places, result.layers, model)
    return result


class _BlockTask:
    """Compresses one block, in the order in which it calls its layers.

    Args:
        name: of the block in the model.
        block: of the float model; it is left as it is.
        probe: how the model calls it with one token.
        result: gets the layers and their reports.
        masks: of each batch.
        see: gets each report.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        probe: Call,
        result: Result,
        masks: Sequence[Tensor | None],
        see: Callable[[LayerReport], None],
    ) -> None:
        self.name, self.block, self.result, self.masks, self.see = name, block, result, masks, see
        self.compressed = copy.deepcopy(block)
        self.order = stages(block, probe)
        # Only the asymmetric target asks what the hidden states have drifted by, and who can make up for it.
        self.writers = stream_writers(block, probe) if result.recipe.error_propagation else set()
        self.drifts: list[Tensor] = []
        self.pending: _Stage | None = None

    def run(self, calls: list[Call], calls_hat: list[Call]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the hidden states after the block: the float model's, and the compressed one's."""
        self.drifts = [call.hidden - call_hat.hidden for call, call_hat in zip(calls, calls_hat, strict=True)]
        with ExitStack() as stack:
            for block in (self.block, self.compressed):
                layers = linear_layers(block)
                stack.enter_context(halting(layers[names[0]] for names in self.order))
            passes = stack.enter_context(walks([_pass(call, self.block) for call in calls]))
            passes_hat = stack.enter_context(walks([_pass(call, self.compressed) for call in calls_hat]))
            pairs = list(zip(passes, passes_hat, strict=True))
            for names in self.order:
                inputs = []
                for i, (walk, walk_hat) in enumerate(pairs):
                    x, x_hat = walk.advance(), walk_hat.advance()
                    self._compare(i)
                    inputs.append(self._inputs(i, x, x_hat, writes=not self.writers.isdisjoint(names)))
                self._report()
                self.pending = self._compress(names, inputs)
                stack.callback(self.pending.errors.close)
            ends = []
            for i, (walk, walk_hat) in enumerate(pairs):
                ends.append((walk.finish(), walk_hat.finish()))
                self._compare(i)
            self._report()
        return [end for end, _ in ends], [end_hat for _, end_hat in ends]

    def _inputs(self, i: int, x: Tensor, x_hat: Tensor, writes: bool) -> Inputs:
        shape = (*self.drifts[i].shape[:2], x.shape[-1])  # some models put all tokens of a batch into one dimension
        drift = self.drifts[i] if writes else None
        return Inputs(x.reshape(shape), x_hat.reshape(shape), self.masks[i], drift)

    def _compare(self, i: int) -> None:
        """Takes what the pending stage put out for batch i."""
        if self.pending is None:
            return
        differences = self.pending.errors.compare(self.drifts[i].shape[:2], self.masks[i])
        for name in self.writers & differences.keys():
            self.drifts[i] = self.drifts[i] + differences[name]

    def _report(self) -> None:
        """Reports on the pending stage: all batches have gone through it."""
        if self.pending is None:
            return
        stage, self.pending = self.pending, None
        stage.errors.close()
        for name, layer in stage.layers.items():
            had = linear_layers(self.block)[name]
            full, seconds = f"{self.name}.{name}", stage.seconds / len(stage.layers)
            place = self.result.places[full]
            report = _layer_report(full, had, layer, stage.errors.relative(name), place, self.result.recipe, seconds)
            self.result.report.append(report)
            self.see(report)

    def _compress(self, names: list[str], inputs: Sequence[Inputs]) -> _Stage:
        started = time.perf_counter()
        recipe, places = self.result.recipe, self.result.places
        layers, layers_hat = ({n: linear_layers(block)[n] for n in names} for block in (self.block, self.compressed))
        corrected = set() if recipe.correct == "none" else {n for n in names if places[f"{self.name}.{n}"]}
        try:
            done = compress_stage(layers, inputs, recipe, corrected, self.writers)
        except ValueError as error:
            raise ValueError(f"{self.name}.{names[0]}: {error}") from error
        for name, layer in done.items():
            install(layers_hat[name], layer)
            self.result.layers[f"{self.name}.{name}"] = layer
        errors = OutputErrors(layers, layers_hat, {name: layer.shift for name, layer in done.items()})
        return _Stage(done, errors, time.perf_counter() - started)


class _Stage(NamedTuple):
    """Layers that are compressed, while the passes go through them."""

    layers: dict[str, Compressed]
    errors: OutputErrors
    seconds: float


def _pass(call: Call, block: nn.Module) -> Callable[[], Tensor]:
    return lambda: call.of(block)


def _layer_report(
    name: str,
    had: nn.Module,
    layer: Compressed,
    errors: tuple[float, float],
    place: str | None,
    recipe: Recipe,
    seconds: float,
) -> LayerReport:
    weight, shift = matrix(had), layer.shift
    stored = 0 if shift is None or layer.bias is None else layer.bias.numel() - (0 if had.bias is None else len(weight))
    missing = recipe.correct != "none" and shift is None
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=layer.rounded.bits_per_weight,
        error_rounded=errors[0],
        error_corrected=errors[1],
        bias_norm=0.0 if shift is None else float(shift.norm()),
        bias_bytes=stored * weight.element_size(),
        bias_place=None if shift is None else place,
        note="the architecture has no place for a bias here" if missing else "",
        seconds=seconds,
    )


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


def install(layer: nn.Module, compressed: Compressed) -> None:
    """Puts the rounded weight and the bias into a layer."""
    weight = matrix(layer)
    weight.copy_(compressed.rounded.dequantize())
    bias = compressed.bias
    if bias is None:
        return
    if bias.dim() == 2:
        layer.register_forward_hook(lambda module, args, output: with_position_bias(output, bias))
        layer.bias = None if layer.bias is None else nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)  # type: ignore[arg-type]
        return
    layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)
