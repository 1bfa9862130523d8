"""Compression block by block: collect what a layer sees, round it, correct its output, go on with what that gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import Call, block_calls, evaluating, find_blocks, linear_layers, matrix, stages
from opt8bit.ptq.layer import Compressed, Inputs, Recipe, compress_stage
from opt8bit.ptq.placement import Places, bias_places, value_bias_through
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
        masks = [batch.get("attention_mask") for batch in batches]
        hidden = hidden_hat = [of_batch[0].hidden for of_batch in calls]
        for i, block in enumerate(blocks):
            here = [of_batch[i] for of_batch in calls]
            task = _BlockTask(f"{prefix}.{i}", block, result, masks, lambda report: see(report, len(names)))
            hidden, hidden_hat = task.run(
                [call._replace(hidden=x) for call, x in zip(here, hidden, strict=True)],
                [call._replace(hidden=x) for call, x in zip(here, hidden_hat, strict=True)],
            )
    value_bias_through(result.places, result.layers, model)
    return result


@dataclass
class _BlockTask:
    """Compresses one block, in the order in which it calls its layers."""

    name: str
    block: nn.Module
    result: Result
    masks: Sequence[Tensor | None]
    see: Callable[[LayerReport], None]

    def run(self, calls: list[Call], calls_hat: list[Call]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the hidden states after the block: the float model's, and the compressed one's."""
        compressed = copy.deepcopy(self.block)
        order = stages(self.block, calls[0])
        with ExitStack() as stack:
            for block in (self.block, compressed):
                layers = linear_layers(block)
                stack.enter_context(halting(layers[names[0]] for names in order))
            passes = stack.enter_context(walks([_pass(call, self.block) for call in calls]))
            passes_hat = stack.enter_context(walks([_pass(call, compressed) for call in calls_hat]))
            for names in order:
                inputs = [
                    _by_sequence(walk.advance(), walk_hat.advance(), call.hidden, mask)
                    for walk, walk_hat, call, mask in zip(passes, passes_hat, calls, self.masks, strict=True)
                ]
                self._compress(names, inputs, compressed)
            return [walk.finish() for walk in passes], [walk.finish() for walk in passes_hat]

    def _compress(self, names: list[str], inputs: Inputs, compressed: nn.Module) -> None:
        started = time.perf_counter()
        recipe, places = self.result.recipe, self.result.places
        layers = {name: linear_layers(self.block)[name] for name in names}
        corrected = set() if recipe.correct == "none" else {n for n in names if places[f"{self.name}.{n}"]}
        try:
            done = compress_stage(layers, inputs, recipe, corrected)
        except ValueError as error:
            raise ValueError(f"{self.name}.{names[0]}: {error}") from error
        seconds = (time.perf_counter() - started) / len(names)
        for name, layer in done.items():
            full = f"{self.name}.{name}"
            install(linear_layers(compressed)[name], layer)
            self.result.layers[full] = layer
            report = _report(full, layers[name], layer, places[full], name in corrected, recipe, seconds)
            self.result.report.append(report)
            self.see(report)


def _by_sequence(x: Tensor, x_hat: Tensor, hidden: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs as (sequences, length, in): some models put all tokens of a batch into one dimension on the way."""
    shape = (*hidden.shape[:2], x.shape[-1])
    return x.reshape(shape), x_hat.reshape(shape), mask


def _pass(call: Call, block: nn.Module) -> Callable[[], Tensor]:
    return lambda: call.of(block)


def _report(
    name: str, had: nn.Module, layer: Compressed, place: str | None, corrected: bool, recipe: Recipe, seconds: float
) -> LayerReport:
    weight = matrix(had)
    stored = 0
    if corrected and layer.bias is not None:
        stored = layer.bias.numel() - (0 if had.bias is None else weight.shape[0])
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=layer.rounded.bits_per_weight,
        error_rounded=layer.error_rounded,
        error_corrected=layer.error_corrected,
        bias_norm=layer.shift_norm,
        bias_bytes=stored * weight.element_size(),
        bias_place=place if corrected else None,
        note="" if corrected or recipe.correct == "none" else "the architecture has no place for a bias here",
        seconds=seconds,
    )


def install(layer: nn.Module, compressed: Compressed) -> None:
    """Puts the rounded weight and the bias into a layer."""
    weight = matrix(layer)
    weight.copy_(compressed.rounded.dequantize())
    bias = compressed.bias
    if bias is None:
        return
    if bias.dim() == 2:
        layer.register_forward_hook(lambda module, args, output: output + bias[: output.shape[1]].to(output))
        layer.bias = None if layer.bias is None else nn.Parameter(torch.zeros_like(layer.bias), requires_grad=False)  # type: ignore[arg-type]
        return
    layer.bias = nn.Parameter(bias.to(weight), requires_grad=False)
