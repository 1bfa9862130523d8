"""Compression of one block: collect what a layer sees, round it, correct its output, go on with what that gives."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.backends import first_of
from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.loss_weighting import TokenWeights
from opt8bit.ptq.calibration.outputs import OutputErrors
from opt8bit.ptq.calibration.statistics import NotFinite
from opt8bit.ptq.compressed import Compressed
from opt8bit.ptq.correction.bias import block_shift
from opt8bit.ptq.layer_report import LayerReport, layer_report
from opt8bit.ptq.model.anatomy import Anatomy, apart
from opt8bit.ptq.model.bias_places import skipped_by_servers, why_uncorrected
from opt8bit.ptq.model.blocks import linear_layers, matrix
from opt8bit.ptq.model.memory import return_freed
from opt8bit.ptq.model.passes import OVERFLOW, Call
from opt8bit.ptq.model.walk import Walk, halting, walks
from opt8bit.ptq.naming import named
from opt8bit.ptq.plan import LayerPlan
from opt8bit.ptq.result import Result, install
from opt8bit.ptq.routed import are_enough, as_sequences, compress_routed, of_all_features, tokens_seen
from opt8bit.ptq.stage import Stage, by_plan, compress_stage
from opt8bit.ptq.stage_inputs import StageInputs
from opt8bit.recipe.runtimes import runtime_of


class Streams(NamedTuple):
    """Holds, for every batch, hidden states or a block's call, in the float model and in the one compressed so far."""

    exact: list[Any]
    compressed: list[Any]


class BlockTask:
    """Compresses one block, in the order in which it calls its layers.

    Args:
        name: of the block in the model.
        block: of the float model; it is left as it is.
        parts: what it does with its layers.
        result: gets the reports.
        masks: of each batch that is learned from; those behind them only go through.
        weights: of the tokens; None where they count alike.
        see: gets each report.

    Attributes:
        done: the compressed layers.
        reports: on them.
        too_few: tokens seen by each layer that saw too few to be rounded on them.
    """

    def __init__(
        self,
        name: str,
        block: nn.Module,
        parts: Anatomy,
        result: Result,
        masks: Sequence[Tensor | None],
        weights: TokenWeights | None,
        see: Callable[[LayerReport], None],
    ) -> None:
        self.name, self.block, self.parts, self.result, self.masks, self.see = name, block, parts, result, masks, see
        self.weights = weights
        self.compressed = copy.deepcopy(block)
        self.done: dict[str, Compressed] = {}
        self.reports: list[LayerReport] = []
        # Only at some strength of the asymmetric target is the drift of the hidden states anybody's to make up for;
        # then it is one writer's after another.
        self.writers = parts.writers if result.plan.error_propagation else set()
        kept = [[n for n in names if n in self.writers or self._plan(n) is not None] for names in parts.stages]
        self.order = apart([names for names in kept if names], self.writers)
        self.of_block: str | None = None  # the layer whose bias makes up for the error of the whole block
        if result.plan.bias_correction == "local":
            last = reversed(parts.stages[-1] if parts.stages else [])
            self.of_block = next((n for n in last if n in parts.writers and self._corrects(n)), None)
        self.shapes: list[torch.Size] = []  # (sequences, length) of each batch
        self.drifts: list[Tensor] = []  # of each batch, if there are writers
        self.pending: Stage | None = None
        self.passed: set[nn.Module] = set()  # layers before which no pass stands still any more
        self.too_few: dict[str, int] = {}

    def _plan(self, layer: str) -> LayerPlan | None:
        return self.result.plan.of(f"{self.name}.{layer}")

    def _corrects(self, layer: str) -> bool:
        plan = self._plan(layer)
        if plan is None or plan.bias_correction == "none":
            return False
        return self._why_uncorrected(layer) is None

    def _why_uncorrected(self, layer: str) -> str | None:
        """Returns why the model gets no correction of a layer where it is asked for, or None where it gets one."""
        full, runtime = f"{self.name}.{layer}", runtime_of(self.result.plan.runtime)
        why = why_uncorrected(full, self.result.places)
        if why is None and runtime is not None:
            return skipped_by_servers(self.result.model, full, self.result.places, [runtime])
        return why

    def run(self, calls: Streams) -> Streams:
        """Returns the hidden states after the block."""
        learned = len(self.masks)
        exact, compressed = self._compress_block(*(of[:learned] for of in calls))
        exact += [call.through(self.block) for call in calls.exact[learned:]]
        compressed += [call.through(self.compressed) for call in calls.compressed[learned:]]
        return Streams(*([end.contiguous() for end in ends] for ends in (exact, compressed)))

    def _compress_block(self, calls: list[Call], calls_hat: list[Call]) -> tuple[list[Tensor], list[Tensor]]:
        self.shapes = [call.hidden.shape[:2] for call in calls]
        if self.writers:
            self.drifts = [call.hidden - call_hat.hidden for call, call_hat in zip(calls, calls_hat, strict=True)]
        repeated = [call.repeatable() for call in calls] if self.of_block else []
        with ExitStack() as stack:
            for block in (self.block, self.compressed):
                layers = linear_layers(block)
                stack.enter_context(halting(layers[names[0]] for names in self.order))
            passes = stack.enter_context(walks([_pass(call, self.block) for call in calls]))
            passes_hat = stack.enter_context(walks([_pass(call, self.compressed) for call in calls_hat]))
            pairs = list(zip(passes, passes_hat, strict=True))
            for names in self.order:
                self._round(names, pairs, repeated)
                if self.pending is not None:
                    stack.callback(self.pending.errors.close)
            self._all_advance(pairs)
            return [walk.x for walk in passes], [walk.x for walk in passes_hat]

    def _round(self, names: list[str], pairs: list[tuple[Walk, Walk]], repeated: Sequence[Call]) -> None:
        """Rounds the layers of a stage as soon as all passes that call it stand before it."""
        self._all_advance(pairs)
        layers = [block.get_submodule(names[0]) for block in (self.block, self.compressed)]
        stand = [tuple(walk.layer is layer for walk, layer in zip(pair, layers, strict=True)) for pair in pairs]
        all_tokens = all(
            all(here) and all(walk.x.shape[:-1].numel() == shape.numel() for walk in pair)
            for here, pair, shape in zip(stand, pairs, self.shapes, strict=True)
        )
        if ranks.size() > 1:
            all_tokens = all(ranks.gathered(all_tokens))
        if all_tokens:
            writer = layers[0] if names[0] in self.writers else None
            weights = self.weights and self.weights.of([f"{self.name}.{name}" for name in names])
            inputs = StageInputs(pairs, self.shapes, self.masks, weights, writer, self.drifts)
            self.pending = self._compress(names, inputs, repeated)
            del inputs  # before the passes go on
        else:
            seen = [walk_hat.x for (_, here), (_, walk_hat) in zip(stand, pairs, strict=True) if here]
            self.pending = self._compress_routed(names, seen)
        self.passed.update(layers)

    def _all_advance(self, pairs: list[tuple[Walk, Walk]]) -> None:
        """Lets all passes go on to the next layer that is not rounded, or to their ends, and reports on the last."""
        for i, pair in enumerate(pairs):
            self._advance(i, pair)
        return_freed()
        self._report()
        return_freed()

    def _advance(self, i: int, pair: tuple[Walk, Walk]) -> None:
        """Lets both passes of batch i go on to the next layer that is not rounded, or to their ends."""
        moved = False
        for walk in pair:
            while not walk.ended and (walk.layer is None or walk.layer in self.passed):
                walk.step()
                moved = True
        if moved:
            self._compare(i)

    def _compare(self, i: int) -> None:
        """Takes what the pending stage put out for batch i."""
        if self.pending is None or self.pending.is_routed:
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
            corrects = self.result.plan.bias_correction != "none"
            plan, note = self._plan(name), self._note(name, stage) if corrects else None
            notes = [each for each in (plan and plan.note, note) if each]
            report = layer_report(full, layers[name], layer, errors, place, "; ".join(notes), seconds)
            self.reports.append(report)
            self.result.report.append(report)
            self.see(report)

    def _note(self, layer: str, stage: Stage) -> str | None:
        """Returns why a layer was not corrected, or which servers drop its bias, or None."""
        why = self._why_uncorrected(layer)
        if why is None and stage.is_routed and stage.layers[layer].shift is None:
            return "it sees only some of the tokens"
        if why is None and self.result.plan.runtime is None:
            return skipped_by_servers(self.result.model, f"{self.name}.{layer}", self.result.places)
        return why

    def _compress(self, names: list[str], inputs: StageInputs, calls: Sequence[Call]) -> Stage:
        started = time.perf_counter()
        layers, layers_hat = ({n: linear_layers(block)[n] for n in names} for block in (self.block, self.compressed))
        done: dict[str, Compressed] = {}
        for plan, group in by_plan({n: self._plan(n) for n in names}):
            corrected = {n for n in group if self._corrects(n) and n != self.of_block}
            with _named(f"{self.name}.{group[0]}", inputs.dtype):
                done |= compress_stage({n: layers[n] for n in group}, inputs, plan, corrected)
        self._install(done, layers_hat)
        if self.of_block is not None and self.of_block in done:
            shift = block_shift(self._block_errors(calls), self.result.plan.statistic)
            shifted = done[self.of_block] = done[self.of_block].corrected(shift)
            assert shifted.bias is not None
            install(layers_hat[self.of_block], {"bias": shifted.bias})
        self.done |= {f"{self.name}.{name}": layer for name, layer in done.items()}
        shifts = {name: done[name].shift if name in done else None for name in names}
        errors = OutputErrors(layers, layers_hat, shifts, self.parts.overwritten)
        return Stage(done, errors, time.perf_counter() - started)

    def _install(self, done: dict[str, Compressed], layers_hat: Mapping[str, nn.Module]) -> None:
        """
        Raises:
            ValueError: a rounded weight is not finite, which is its method's doing or its grid's.
        """
        for name, layer in done.items():
            install(layers_hat[name], layer.changes)
            if not bool(matrix(layers_hat[name]).isfinite().all()):
                plan, grids = self._plan(name), [part.grid for part in layer.rounded.parts]
                by = "" if plan is None else f", by {plan.method} on {first_of(list(map(str, grids)), 2)}"
                raise ValueError(f"{self.name}.{name}: its rounded weight is not finite{by}")

    def _compress_routed(self, names: list[str], x_hat: Sequence[Tensor]) -> Stage:
        """Rounds layers that do not see all tokens, or not the same ones in both models."""
        started = time.perf_counter()
        layers, layers_hat = ({n: linear_layers(block)[n] for n in names} for block in (self.block, self.compressed))
        tokens, features = tokens_seen(x_hat), matrix(layers[names[0]]).shape[1]
        done: dict[str, Compressed] = {}
        for plan, group in by_plan({n: self._plan(n) for n in names}):
            corrected = {n for n in group if self._corrects(n) and plan.statistic != "position"}
            with _named(f"{self.name}.{group[0]}", x_hat[0].dtype if x_hat else None):
                done |= compress_routed({n: layers[n] for n in group}, x_hat, tokens, plan, corrected)
        self._install(done, layers_hat)
        self.done |= {f"{self.name}.{name}": layer for name, layer in done.items()}
        layers, layers_hat = ({n: of[n] for n in done} for of in (layers, layers_hat))
        errors = OutputErrors(layers, layers_hat, {n: layer.shift for n, layer in done.items()})
        enough = are_enough(tokens, features)
        for x in as_sequences(x_hat) if enough else [of_all_features(layers[names[0]])]:
            errors.run(layers, layers_hat, x)
        errors.close()
        if not enough:
            self.too_few |= {f"{self.name}.{name}": tokens for name in done}
        return Stage(done, errors, time.perf_counter() - started, is_routed=True)

    def _block_errors(self, calls: Sequence[Call]) -> Iterator[Tensor]:
        """Yields, for each batch, the float block's output minus the compressed one's for the same hidden states.

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


@contextmanager
def _named(layer: str, dtype: torch.dtype | None) -> Iterator[None]:
    """Adds this layer's name, and the dtype of its inputs, to the errors of checks inside the context."""
    with named(layer):
        try:
            yield
        except NotFinite as error:
            hint = f": {OVERFLOW}" if dtype == torch.float16 else ""
            raise ValueError(f"{error}{hint}") from error


def _pass(call: Call, block: nn.Module) -> Callable[[], Tensor]:
    return lambda: call.through(block)
