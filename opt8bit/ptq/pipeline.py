"""Compression block by block: collect what a layer sees, round it, correct its output, go on with what that gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from opt8bit.ptq.bias import block_shift
from opt8bit.ptq.blocks import block_layers, evaluating, find_blocks, linear_layers, matrix
from opt8bit.ptq.calls import Anatomy, Call, anatomy, apart, block_calls, one_token, returns_tuple
from opt8bit.ptq.ends import ModelEnd, probe, quality
from opt8bit.ptq.layer import Compressed, Recipe, compress_stage, symmetry_cost
from opt8bit.ptq.outputs import OutputErrors
from opt8bit.ptq.placement import Place, bias_places, value_bias_through, why_uncorrected
from opt8bit.ptq.result import Change, LayerReport, Result, install
from opt8bit.ptq.source import Source
from opt8bit.ptq.statistics import Inputs
from opt8bit.ptq.walk import Walk, halting, walks
from opt8bit.ptq.work import Work


def run(
    source: Source,
    batches: Sequence[dict[str, Tensor]],
    recipe: Recipe,
    see: Callable[[LayerReport, int], None],
    *,
    held_out: Sequence[dict[str, Tensor]] = (),
    work: Work | None = None,
) -> Result:
    """Compresses the linear layers in the model's blocks; ``see`` gets each layer's report and the number of layers.

    Two streams go through the blocks side by side: the float model's hidden states, and those of the model as it has
    been compressed so far. Only one block is held twice. What is ``held_out`` goes along, and nothing is learned from
    it: it tells how good the result is. With ``work``, finished blocks are kept on disk, and not done again.

    Raises:
        ValueError: a weight or an input is not finite, or a block does not call each of its layers once.
    """
    model = source.model
    prefix, blocks = find_blocks(model)
    everywhere = list(block_layers(model))
    places = bias_places(model, everywhere, recipe.statistic) if recipe.correct != "none" else dict.fromkeys(everywhere)
    for name, place in places.items():
        if place is not None and place.kind == "through" and recipe.of(place.name) is None:
            places[name] = None
    layers = sum(recipe.of(name) is not None for name in everywhere)
    result = Result(source, recipe, places)
    everything = [*batches, *held_out]
    with evaluating(model):
        with source.block(f"{prefix}.0") as block:
            as_tuple = returns_tuple(model, block, batches[0])
        parts = _anatomies(source, prefix, block_calls(model, blocks, one_token(batches[0]), as_tuple=as_tuple))
        calls = [block_calls(model, blocks, batch, as_tuple=as_tuple) for batch in everything]
        masks = [batch.get("attention_mask") for batch in batches]
        embedded = [of_batch[0].hidden for of_batch in calls]
        streams = Streams(embedded, embedded)
        del embedded  # the streams' alone, to be let go with the first block
        calls = [[call._replace(hidden=call.hidden[:0]) for call in of_batch] for of_batch in calls]
        first = work.finished if work else 0
        if work and first:
            saved = [stream.to(calls[0][0].hidden.device) for stream in work.streams()]
            streams = Streams(saved[: len(calls)], saved[len(calls) :])
            for report in work.reports():
                result.report.append(report)
                see(report, layers)
        for i in range(first, len(blocks)):
            streams, done, reports = _run_block(
                source,
                f"{prefix}.{i}",
                parts[i],
                result,
                masks,
                [of[i] for of in calls],
                streams,
                lambda r: see(r, layers),
            )
            if work:
                work.save(i, done, reports, [*streams.exact, *streams.compressed])
            else:
                result.changes = {**result.changes, **done}
        if work:
            result.changes = work.changes(recipe)
        ends = ModelEnd(model, blocks, as_tuple)
        result.probe = probe(ends, batches[0], streams.compressed[0])
        result.quality = quality(ends, held_out, *(stream[len(batches) :] for stream in streams))
    return result


def _run_block(
    source: Source,
    name: str,
    parts: Anatomy,
    result: Result,
    masks: Sequence[Tensor | None],
    calls: Sequence[Call],
    streams: Streams,
    see: Callable[[LayerReport], None],
) -> tuple[Streams, dict[str, Change], list[LayerReport]]:
    """Returns the streams behind the block, what has changed in it, and the reports on its layers.

    Nothing else of it is left in memory.
    """
    here = Streams(*([call._replace(hidden=x) for call, x in zip(calls, stream, strict=True)] for stream in streams))
    with source.block(name) as block:
        task = _BlockTask(name, block, parts, result, masks, see)
        behind = task.run(here)
    value_bias_through(result.places, task.done, source.model)
    changes = {f"{full}.{kind}": change for full, layer in task.done.items() for kind, change in layer.changes.items()}
    return behind, changes, task.reports


class Streams(NamedTuple):
    """Of every batch, in the float model and in the one that is compressed so far: hidden states, or a block's call."""

    exact: list[Any]
    compressed: list[Any]


def _anatomies(source: Source, prefix: str, calls: Sequence[Call]) -> list[Anatomy]:
    """Of all blocks, before any is worked on."""
    found = []
    for i, call in enumerate(calls):
        try:
            with source.block(f"{prefix}.{i}") as block:
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
        result: gets the reports.
        masks: of each batch that is learned from; those behind them only go through.
        see: gets each report.

    Attributes:
        done: the compressed layers.
        reports: on them.
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
        self.name, self.block, self.parts, self.result, self.masks, self.see = name, block, parts, result, masks, see
        self.compressed = copy.deepcopy(block)
        self.done: dict[str, Compressed] = {}
        self.reports: list[LayerReport] = []
        # Only at some strength of the asymmetric target is the drift of the hidden states anybody's to make up for;
        # then it is one writer's after another.
        self.writers = parts.writers if result.recipe.error_propagation else set()
        kept = [[n for n in names if n in self.writers or self._recipe(n) is not None] for names in parts.stages]
        self.order = apart([names for names in kept if names], self.writers)
        self.of_block: str | None = None  # the layer whose bias makes up for the error of the whole block
        if result.recipe.correct == "local":
            last = reversed(parts.stages[-1])
            self.of_block = next((n for n in last if n in parts.writers and self._corrects(n)), None)
        self.shapes: list[torch.Size] = []  # (sequences, length) of each batch
        self.drifts: list[Tensor] = []  # of each batch, if there are writers
        self.pending: _Stage | None = None

    def _recipe(self, layer: str) -> Recipe | None:
        return self.result.recipe.of(f"{self.name}.{layer}")

    def _corrects(self, layer: str) -> bool:
        recipe = self._recipe(layer)
        if recipe is None or recipe.correct == "none":
            return False
        return why_uncorrected(f"{self.name}.{layer}", self.result.places) is None

    def run(self, calls: Streams) -> Streams:
        """Returns the hidden states after the block."""
        learned = len(self.masks)
        exact, compressed = self._compress_block(*(of[:learned] for of in calls))
        exact += [call.of(self.block) for call in calls.exact[learned:]]
        compressed += [call.of(self.compressed) for call in calls.compressed[learned:]]
        return Streams(*([end.contiguous() for end in ends] for ends in (exact, compressed)))

    def _compress_block(self, calls: list[Call], calls_hat: list[Call]) -> tuple[list[Tensor], list[Tensor]]:
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
                inputs = [self._inputs(i, names[0], *pair) for i, pair in enumerate(pairs)]
                self._report()
                self.pending = self._compress(names, inputs, calls)
                inputs.clear()  # before the passes go on
                stack.callback(self.pending.errors.close)
            ends = []
            for i, (walk, walk_hat) in enumerate(pairs):
                ends.append((walk.finish(), walk_hat.finish()))
                self._compare(i)
            self._report()
        return [end for end, _ in ends], [end_hat for _, end_hat in ends]

    def _inputs(self, i: int, layer: str, walk: Walk, walk_hat: Walk) -> Inputs:
        """What a layer sees of batch i; both passes go on until they stand before it.

        A writer's output in the float model is handed to its pass.
        """
        x, x_hat = walk.advance(), walk_hat.advance()
        self._compare(i)
        shape = (*self.shapes[i], x.shape[-1])  # some models put all tokens of a batch into one dimension
        wanted = None
        if layer in self.writers:
            writer = self.block.get_submodule(layer)
            y: Tensor = writer(x)
            walk.answer(y)
            wanted = self._wanted(i, writer, x, y)
        return Inputs(x.reshape(shape), x_hat.reshape(shape), self.masks[i], wanted)

    def _wanted(self, i: int, writer: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """What a writer should put out of batch i, but for its bias, where the float model's makes y of x."""
        dtype = torch.promote_types(y.dtype, torch.float32)
        bias: Tensor | None = writer.bias  # type: ignore[assignment]
        if y.dtype != dtype:  # what y lost when it was rounded, with its bias, is not for the weights to imitate
            y = linear(x.to(dtype), matrix(writer).to(dtype))
        elif bias is not None:
            y = y - bias
        return y.reshape(self.drifts[i].shape) + self.drifts[i]

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
        layers = linear_layers(self.block)
        for name, layer in stage.layers.items():
            full, seconds = f"{self.name}.{name}", stage.seconds / len(stage.layers)
            place = self.result.places[full]
            errors = stage.errors.relative(name)
            corrects = self.result.recipe.correct != "none"
            note = why_uncorrected(full, self.result.places) if corrects else None
            recipe = self._recipe(name)
            assert recipe is not None
            report = _layer_report(full, layers[name], layer, recipe, errors, place, note, seconds)
            self.reports.append(report)
            self.result.report.append(report)
            self.see(report)

    def _compress(self, names: list[str], inputs: Sequence[Inputs], calls: Sequence[Call]) -> _Stage:
        started = time.perf_counter()
        layers, layers_hat = ({n: linear_layers(block)[n] for n in names} for block in (self.block, self.compressed))
        done: dict[str, Compressed] = {}
        for recipe, group in _by_recipe({n: self._recipe(n) for n in names}):
            corrected = {n for n in group if self._corrects(n) and n != self.of_block}
            try:
                done |= compress_stage({n: layers[n] for n in group}, inputs, recipe, corrected)
            except ValueError as error:
                raise ValueError(f"{self.name}.{group[0]}: {error}") from error
        for name, layer in done.items():
            install(layers_hat[name], layer.changes)
        if self.of_block is not None and self.of_block in done:
            shift = block_shift(self._block_errors(calls), self.result.recipe.statistic)
            shifted = done[self.of_block] = done[self.of_block].corrected(shift)
            assert shifted.bias is not None
            install(layers_hat[self.of_block], {"bias": shifted.bias})
        self.done |= {f"{self.name}.{name}": layer for name, layer in done.items()}
        shifts = {name: done[name].shift if name in done else None for name in names}
        errors = OutputErrors(layers, layers_hat, shifts, self.parts.overwritten)
        return _Stage(done, errors, time.perf_counter() - started)

    def _block_errors(self, calls: Sequence[Call]) -> Iterator[Tensor]:
        """Of each batch, the float block's output minus the compressed one's, both for the float model's hidden states.

        NaN where a token does not count.

        Raises:
            ValueError: an output that counts is not finite.
        """
        for call, mask in zip(calls, self.masks, strict=True):
            outputs = []
            for which, block in (("float", self.block), ("compressed", self.compressed)):
                y = call.of(block)
                y = y.to(torch.promote_types(y.dtype, torch.float32))
                if not bool((y if mask is None else y[mask.bool()]).isfinite().all()):
                    raise ValueError(f"{self.name}: an output of the {which} block is not finite")
                outputs.append(y)
            error = outputs[0] - outputs[1]
            yield error if mask is None else torch.where(mask.bool().unsqueeze(-1), error, torch.nan)


def _by_recipe(recipes: dict[str, Recipe | None]) -> list[tuple[Recipe, list[str]]]:
    """Layers of a stage that go together."""
    groups: list[tuple[Recipe, list[str]]] = []
    for name, recipe in recipes.items():
        group = next((names for other, names in groups if other == recipe), None)
        if group is not None:
            group.append(name)
        elif recipe is not None:
            groups.append((recipe, [name]))
    return groups


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
    recipe: Recipe,
    errors: tuple[float, float],
    place: Place | None,
    note: str | None,
    seconds: float,
) -> LayerReport:
    weight, shift = matrix(had), layer.shift
    moved = place is not None and place.kind == "through"
    stored = 0
    if shift is not None and layer.bias is not None and not moved:
        stored = layer.bias.numel() - (0 if had.bias is None else len(weight))
    return LayerReport(
        name=name,
        shape=(weight.shape[0], weight.shape[1]),
        bits_per_weight=layer.rounded.bits_per_weight,
        error_rounded=errors[0],
        error_corrected=errors[1],
        bias_norm=0.0 if shift is None else float(shift.norm()),
        bias_bytes=stored * weight.element_size(),
        bias_place=None if shift is None else str(place),
        symmetry_cost=symmetry_cost(weight, recipe.scheme),
        note=note or "",
        seconds=seconds,
    )
