"""Compression block by block: collect what a layer sees, round it, correct its output, go on with what that gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import evaluating, find_blocks, linear_layers, matrix
from opt8bit.ptq.calls import Anatomy, Call, anatomy, block_calls, one_token, returns_tuple
from opt8bit.ptq.layer import Compressed, Recipe, compress_stage
from opt8bit.ptq.outputs import OutputErrors
from opt8bit.ptq.placement import THROUGH, bias_places, value_bias_through
from opt8bit.ptq.result import LayerReport, Result, install
from opt8bit.ptq.statistics import Inputs
from opt8bit.ptq.walk import halting, walks


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
    places = bias_places(model, names, recipe.statistic) if recipe.correct != "none" else dict.fromkeys(names)
    result = Result(model, recipe, places)
    with evaluating(model):
        as_tuple = returns_tuple(model, blocks[0], batches[0])
        parts = _anatomies(prefix, blocks, block_calls(model, blocks, one_token(batches[0]), as_tuple=as_tuple))
        calls = [block_calls(model, blocks, batch, as_tuple=as_tuple) for batch in batches]
        masks = [batch.get("attention_mask") for batch in batches]
        hidden = hidden_hat = [of_batch[0].hidden for of_batch in calls]
        for i, block in enumerate(blocks):
            here = [of_batch[i] for of_batch in calls]
            name = f"{prefix}.{i}"
            task = _BlockTask(name, block, parts[i], result, masks, lambda report: see(report, len(names)))
            hidden, hidden_hat = task.run(
                [call._replace(hidden=x) for call, x in zip(here, hidden, strict=True)],
                [call._replace(hidden=x) for call, x in zip(here, hidden_hat, strict=True)],
            )
    value_bias_through(result.places, result.layers, model)
    return result


def _anatomies(prefix: str, blocks: nn.ModuleList, calls: Sequence[Call]) -> list[Anatomy]:
    """Of all blocks, before any is worked on."""
    found = []
    for i, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        try:
            found.append(anatomy(block, call))
        except ValueError as error:
            raise ValueError(f"{prefix}.{i}.{error}") from error
    return found


class _BlockTask:
    """Compresses one block, in the order in which it calls its layers.

    Args:
        name: of the block in the model.
        block: of the float model; it is left as it is.
        parts: what it does with its layers.
        result: gets the layers and their reports.
        masks: of each batch.
        see: gets each report.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        parts: Anatomy,
        result: Result,
        masks: Sequence[Tensor | None],
        see: Callable[[LayerReport], None],
    ) -> None:
        self.name, self.block, self.result, self.masks, self.see = name, block, result, masks, see
        self.compressed = copy.deepcopy(block)
        self.order = parts.stages
        # Only at some strength of the asymmetric target is the drift of the hidden states anybody's to make up for.
        self.writers = parts.writers if result.recipe.error_propagation else set()
        self.shapes: list[torch.Size] = []  # (sequences, length) of each batch
        self.drifts: list[Tensor] = []  # of each batch, if there are writers
        self.pending: _Stage | None = None

    def run(self, calls: list[Call], calls_hat: list[Call]) -> tuple[list[Tensor], list[Tensor]]:
        """Returns the hidden states after the block: the float model's, and the compressed one's."""
        self.shapes = [call.hidden.shape[:2] for call in calls]
        if self.writers:
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
        shape = (*self.shapes[i], x.shape[-1])  # some models put all tokens of a batch into one dimension
        drift = self.drifts[i] if writes else None
        return Inputs(x.reshape(shape), x_hat.reshape(shape), self.masks[i], drift)

    def _compare(self, i: int) -> None:
        """Takes what the pending stage put out for batch i."""
        if self.pending is None:
            return
        differences = self.pending.errors.compare(self.shapes[i], self.masks[i])
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
    moved = place is not None and place.startswith(THROUGH)
    stored = 0
    if shift is not None and layer.bias is not None and not moved:
        stored = layer.bias.numel() - (0 if had.bias is None else len(weight))
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
        note="the checkpoint has no place for a bias here" if missing else "",
        seconds=seconds,
    )
