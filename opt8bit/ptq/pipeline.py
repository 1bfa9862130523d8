"""Compression block by block: collect the inputs of a layer, round it, correct its output, go on with what it gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from opt8bit.ptq import bias as compensation
from opt8bit.ptq.blocks import Call, block_calls, evaluating, find_blocks, linear_layers, matrix, stages
from opt8bit.ptq.methods import Format, Method, Rounded
from opt8bit.ptq.placement import bias_places
from opt8bit.ptq.statistics import Moments, Statistics
from opt8bit.ptq.target import asymmetric_target
from opt8bit.ptq.walk import halting, walks


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what becomes of a layer."""

    method: Method
    format: Format
    correct: str = "none"
    statistic: str = "mean"
    error_propagation: float = 0.5


@dataclass(frozen=True)
class LayerReport:
    """What was done to one layer. Errors are of its output against the float model's, squared, relative to that."""

    name: str
    shape: tuple[int, int]
    bits_per_weight: float
    error_rounded: float
    error_corrected: float
    bias_norm: float
    bias_place: str | None
    seconds: float


@dataclass(frozen=True)
class CompressedLayer:
    rounded: Rounded
    bias: Tensor | None  # (out,) float32, whole: with what the layer had
    report: LayerReport


@dataclass
class Result:
    """A compressed model: ``model`` is the one given, unchanged; ``layers`` is what replaces its layers, by name."""

    model: nn.Module
    recipe: Recipe
    layers: dict[str, CompressedLayer] = field(default_factory=dict)


@dataclass
class _Stream:
    """Every batch's hidden states before a block, in one of the two models."""

    hidden: list[Tensor]


def run(
    model: nn.Module,
    batches: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    see: Callable[[LayerReport], None] = lambda report: None,
) -> Result:
    prefix, blocks = find_blocks(model)
    names = {
        f"{prefix}.{i}.{name}": layer for i, block in enumerate(blocks) for name, layer in linear_layers(block).items()
    }
    places = bias_places(model, names)
    result = Result(model, recipe)
    with evaluating(model):
        calls = [block_calls(model, blocks, batch) for batch in batches]
        masks = [batch.get("attention_mask") for batch in batches]
        hidden = hidden_hat = [of_batch[0].hidden for of_batch in calls]
        for i, block in enumerate(blocks):
            here = [of_batch[i] for of_batch in calls]
            float_calls = [call._replace(hidden=h) for call, h in zip(here, hidden, strict=True)]
            hat_calls = [call._replace(hidden=h) for call, h in zip(here, hidden_hat, strict=True)]
            task = BlockTask(f"{prefix}.{i}", block, places, masks, recipe, see)
            layers, hidden, hidden_hat = task.run(float_calls, hat_calls)
            result.layers.update(layers)
    return result


@dataclass
class BlockTask:
    name: str
    block: nn.Module
    places: dict[str, str | None]
    masks: Sequence[Tensor | None]
    recipe: Recipe
    see: Callable[[LayerReport], None]

    def run(self, calls: list[Call], hat_calls: list[Call]):
        done: dict[str, CompressedLayer] = {}
        block, compressed = self.block, copy.deepcopy(self.block)
        order = stages(block, calls[0])
        with ExitStack() as stack:
            for one in (block, compressed):
                layers = linear_layers(one)
                stack.enter_context(halting(layers[stage[0]] for stage in order))
            float_walks = stack.enter_context(walks((lambda c=c: c.of(block)) for c in calls))
            hat_walks = stack.enter_context(walks((lambda c=c: c.of(compressed)) for c in hat_calls))
            for stage in order:
                xs = [walk.advance() for walk in float_walks]
                x_hats = [walk.advance() for walk in hat_walks]
                for name, layer in self.solve(stage, xs, x_hats):
                    install(linear_layers(compressed)[name], layer)
                    done[f"{self.name}.{name}"] = layer
                    self.see(layer.report)
            return done, [w.finish() for w in float_walks], [w.finish() for w in hat_walks]

    def solve(self, stage: list[str], xs: list[Tensor], x_hats: list[Tensor]) -> Iterator[tuple[str, CompressedLayer]]:
        started = time.perf_counter()
        recipe, layers = self.recipe, linear_layers(self.block)
        weights = [matrix(layers[name]).float() for name in stage]
        statistics = Statistics(weights[0].shape[1], device=weights[0].device)
        for x, x_hat, mask in zip(xs, x_hats, self.masks, strict=True):
            statistics.update(x.float(), x_hat.float(), mask)
        weight = torch.cat(weights)
        moments = Moments(statistics, centred=recipe.correct == "joint")
        target = asymmetric_target(weight, moments, recipe.error_propagation)
        rounded = recipe.method.round(target, moments.x_hat_x_hat, recipe.format)
        dense = rounded.dequantize()
        shift, noise = compensation.mean_shift(weight, dense, statistics, local=recipe.correct == "local")
        shift = compensation.shrunk(shift, noise)
        seconds = (time.perf_counter() - started) / len(stage)
        start = 0
        for name, own in zip(stage, weights, strict=True):
            stop = start + len(own)
            place = self.places[f"{self.name}.{name}"]
            corrects = recipe.correct != "none" and place is not None
            added = shift[start:stop] if corrects else torch.zeros_like(shift[start:stop])
            before = output_error(own, dense[start:stop], torch.zeros_like(added), statistics)
            after = output_error(own, dense[start:stop], added, statistics)
            bias: Tensor | None = layers[name].bias  # type: ignore[assignment]
            whole = None
            if corrects or bias is not None:
                whole = added.float() + (0 if bias is None else bias.detach().float())
            report = LayerReport(
                f"{self.name}.{name}",
                (own.shape[0], own.shape[1]),
                rounded.bits_per_weight,
                before,
                after,
                float(added.norm()),
                place if corrects else None,
                seconds,
            )
            yield name, CompressedLayer(rounded.rows_from(start, stop), whole, report)
            start = stop


def output_error(weight: Tensor, rounded: Tensor, shift: Tensor, statistics: Statistics) -> float:
    """``E|W x - Ŵ x̂ - b|² / E|W x|²``."""
    moments = Moments(statistics, centred=False)
    w, w_hat = weight.to(moments.xx), rounded.to(moments.xx)
    signal = ((w @ moments.xx) * w).sum()
    error = signal - 2 * ((w @ moments.cross) * w_hat).sum() + ((w_hat @ moments.x_hat_x_hat) * w_hat).sum()
    mean = w @ statistics.mean_x - w_hat @ statistics.mean_x_hat
    error = error - 2 * (shift * mean).sum() + shift.square().sum()
    return float(error / signal)


def install(layer: nn.Module, compressed: CompressedLayer) -> None:
    """Puts the rounded weight and the bias into a layer."""
    weight = matrix(layer)
    weight.copy_(compressed.rounded.dequantize())
    if compressed.bias is not None:
        layer.bias = nn.Parameter(compressed.bias.to(weight.dtype), requires_grad=False)
