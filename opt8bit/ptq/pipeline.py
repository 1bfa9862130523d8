"""Compression block by block: what two streams of hidden states become, in the float model and the compressed one."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.block import BlockTask, Streams
from opt8bit.ptq.calibration.loss_weighting import TokenWeights
from opt8bit.ptq.correction.value_biases import value_bias_through
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.model.anatomy import Anatomy
from opt8bit.ptq.model.bias_places import Places, bias_places, without_unused
from opt8bit.ptq.model.blocks import block_layers, by_pattern, evaluating, find_blocks, matrix
from opt8bit.ptq.model.ends import ModelEnd
from opt8bit.ptq.model.passes import Call, Refused
from opt8bit.ptq.model.rehearsal import Rehearsal, rehearse
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.model.states import State
from opt8bit.ptq.naming import named
from opt8bit.ptq.outside import Outside
from opt8bit.ptq.plan import Plan
from opt8bit.ptq.reconstruction.engine import Reconstruction
from opt8bit.ptq.reconstruction.parametrization import TrainedWeight, hardened, started
from opt8bit.ptq.result import Change, Result, install
from opt8bit.ptq.resume import Work
from opt8bit.ptq.tasks.task import Probe, Task
from opt8bit.ptq.token_weights import token_weights
from opt8bit.ptq.transforms.transform import transformed

logger = logging.getLogger(__name__)
NAMED = 8  # layers that a warning is about


def run(
    source: Source,
    batches: Sequence[dict[str, Tensor]],
    plan: Plan,
    task: Task,
    see: Callable[[LayerReport, int], None],
    *,
    held_out: Sequence[dict[str, Tensor]] = (),
    work: Work | None = None,
) -> Result:
    """Compresses the linear layers in the model's blocks; ``see`` gets each layer's report and the number of layers.

    Two streams go through the blocks side by side: the float model's hidden states, and those of the model as it has
    been compressed so far. Only one block is held twice. What is ``held_out`` goes along, and nothing is learned from
    it: it tells how good the result is. With ``work``, finished blocks are kept on disk, and not done again, unless
    blocks hand more to later ones than their hidden states.

    Raises:
        ValueError: a weight or an input is not finite, or the model's use of its blocks cannot be followed.
        ModelError: the model raised an exception.

    Warns:
        UserWarning: layers stay as they are, or see too few tokens.
    """
    model = source.model
    prefix, blocks = find_blocks(model)
    outside = Outside(model, plan.outside)
    result = Result(source, plan, _places(model, plan), outside.changes)
    with evaluating(model):
        few = task.smallest(batches[0])
        known = rehearse(source, prefix, blocks, few)
        layers = _check_layers(known, prefix, result)
        # By this a checkpoint is checked. It goes through the blocks in a batch of its own, as whoever loads the
        # checkpoint runs it: in 16 bits, products of other shapes add up to other logits over many blocks.
        alone = {name: value[:1] for name, value in batches[0].items()}
        calls, streams = _started(known, model, blocks, [*batches, *held_out, alone], outside)
        masks = [batch.get("attention_mask") for batch in batches]
        _check_lengths(streams.exact, masks)
        ends = ModelEnd(model, blocks, known.outputs, known.axes)
        ends_hat = ModelEnd(model, blocks, known.outputs, known.axes, outside.installed)
        probe = task.probe(ends, alone, streams.exact[-1])  # of any hidden states: an end that cannot run is known now
        states = Streams(*([State() for _ in calls] for _ in streams))
        hand_on_more = known.hands_on_more(calls[0])  # what a folder of work does not keep
        _check_trainable(plan, probe, hand_on_more)
        first = work.finished if work and not hand_on_more else 0
        losses = [partial(task.losses, ends, batch) for batch in batches]
        weights = None
        if first < len(blocks):
            weights = token_weights(result, prefix, known, calls, streams.exact, masks, losses, work)

        def show(report: LayerReport) -> None:
            see(report, layers)

        if work and first:
            streams = _gone_on(work, streams.exact[0].device, result, show)
        trials = known.calls(model, blocks, few) if plan.transforms else None
        too_few: dict[str, int] = {}
        for i in range(first, len(blocks)):
            name, parts, here = f"{prefix}.{i}", known.parts[i].anatomy, [of[i] for of in calls]
            trial = trials[i] if trials else None
            streams, done = _run_block(source, name, parts, result, masks, weights, here, streams, states, show, trial)
            too_few |= done.too_few
            if work:
                work.save(i, done.changes, done.reports, [*streams.exact, *streams.compressed])
            else:
                result.changes = {**result.changes, **done.changes}
        if work:
            result.changes = work.changes(plan, outside.changes)
        result.places = without_unused(result.places, result.changes.keys())
        _warn_of_few(too_few)
        result.probe = task.probe(ends_hat, alone, streams.compressed[-1])
        kept = (stream[len(batches) : -1] for stream in streams)
        result.quality = task.quality(ends, held_out, *kept, end_hat=ends_hat)
    return result


def _started(
    known: Rehearsal,
    model: nn.Module,
    blocks: nn.ModuleList,
    batches: Sequence[dict[str, Tensor]],
    outside: Outside,
) -> tuple[list[list[Call]], Streams]:
    """Returns how the model calls its blocks on each batch, and what goes into the first block."""
    calls = [known.calls(model, blocks, batch) for batch in batches]
    embedded = embedded_hat = [of_batch[0].hidden for of_batch in calls]
    if outside.changes:
        with outside.installed():
            embedded_hat = [known.calls(model, blocks, batch)[0].hidden for batch in batches]
    # Hidden states are the streams' alone, to be let go with the first block.
    bare = [[call._replace(hidden=call.hidden.new_empty(0)) for call in of_batch] for of_batch in calls]
    return bare, Streams(embedded, embedded_hat)


def _gone_on(work: Work, device: torch.device, result: Result, see: Callable[[LayerReport], None]) -> Streams:
    """Returns the streams behind the blocks that are finished; their layers' reports are the result's."""
    if not ranks.rank():
        logger.info("%d blocks are finished already", work.finished)
    saved = [stream.to(device) for stream in work.streams()]
    for report in work.reports():
        result.report.append(report)
        see(report)
    return Streams(saved[: len(saved) // 2], saved[len(saved) // 2 :])


class _Done(NamedTuple):
    """Holds what is left of a block that is compressed."""

    changes: dict[str, Change]
    reports: list[LayerReport]
    too_few: dict[str, int]  # tokens of each layer that saw too few


def _run_block(
    source: Source,
    name: str,
    parts: Anatomy,
    result: Result,
    masks: Sequence[Tensor | None],
    weights: TokenWeights | None,
    calls: Sequence[Call],
    streams: Streams,
    states: Streams,
    see: Callable[[LayerReport], None],
    trial: Call | None,
) -> tuple[Streams, _Done]:
    """Returns the streams behind the block, and what was made of it. Nothing else of it is left in memory."""
    here = Streams(
        *(
            [call._replace(hidden=x, name=name, state=state) for call, x, state in zip(calls, *own, strict=True)]
            for own in zip(streams, states, strict=True)
        )
    )
    rewritten: dict[str, Tensor] = {}
    with source.block(name) as block:
        if trial is not None:
            block = copy.deepcopy(block)
            seen = [here.exact[0].repeatable()]
            rewritten = transformed(name, block, trial._replace(name=name), result.plan.transforms, seen)
        task = BlockTask(name, block, parts, result, masks, weights, see)
        repeatable = [call.repeatable() for call in here.compressed] if result.plan.reconstruction else []
        behind = task.run(here)
        if result.plan.reconstruction is not None:
            inputs = [call.hidden for call in here.exact]
            behind = _reconstructed(result.plan.reconstruction, task, Streams(inputs, repeatable), behind)
    value_bias_through(result.places, task.done, source.model)
    changes: dict[str, Change] = {f"{name}.{own}": param for own, param in rewritten.items()}
    changes |= {f"{full}.{kind}": change for full, layer in task.done.items() for kind, change in layer.changes.items()}
    return behind, _Done(changes, task.reports, task.too_few)


def _reconstructed(engine: Reconstruction, task: BlockTask, inputs: Streams, behind: Streams) -> Streams:
    """Trains the weights of a block, which its task's layers then have, and returns the streams behind it.

    Args:
        engine: trains them.
        task: with its block rounded.
        inputs: of each batch, the float model's hidden states that go into the block, and the compressed model's call.
        behind: the streams behind the rounded block.
    """
    started_at, calls = time.perf_counter(), inputs.compressed
    layers = {full.removeprefix(f"{task.name}."): layer for full, layer in task.done.items()}
    weights: dict[str, TrainedWeight] = {}
    for name, layer in layers.items():
        with named(f"{task.name}.{name}"):
            weights[name] = started(engine.parametrization, matrix(task.block.get_submodule(name)), layer.rounded)
    with named(task.name):
        learned = slice(len(task.masks))  # what is held out is behind that
        own, exact, outputs = calls[learned], inputs.exact[learned], behind.exact[learned]
        examples = engine.examples(task.block, own, exact, outputs, task.masks)
        training = engine.train(task.compressed.requires_grad_(False), weights, examples)
    seconds = time.perf_counter() - started_at
    logger.info("%s: loss %.4g, trained %.4g, %.1f s", task.name, training.before, training.after, seconds)
    for name, layer in layers.items():
        with named(f"{task.name}.{name}"):
            trained = replace(layer, rounded=hardened(weights[name]))
        task.done[f"{task.name}.{name}"] = trained
        install(task.compressed.get_submodule(name), {"weight": trained.rounded})
    return Streams(behind.exact, [call.of(task.compressed).contiguous() for call in calls])


def _places(model: nn.Module, plan: Plan) -> Places:
    """Returns what lets each layer hold a bias, if any is asked for."""
    everywhere = list(block_layers(model))
    if plan.bias_correction == "none":
        return dict.fromkeys(everywhere)
    return bias_places(model, everywhere, plan.statistic)


def _check_layers(known: Rehearsal, prefix: str, result: Result) -> int:
    """Counts the layers to compress. No bias goes through one that stays as it is.

    Raises:
        Refused: there are none.

    Warns:
        UserWarning: layers stay as they are, though nobody has asked for it.
    """
    stay = {
        f"{prefix}.{i}.{name}": why
        for i, part in enumerate(known.parts)
        for name, why in part.anatomy.left.items()
        if result.plan.of(f"{prefix}.{i}.{name}") is not None
    }
    compressed = {name for name in result.places if name not in stay and result.plan.of(name) is not None}
    if not compressed:
        name, why = next(iter(stay.items()))
        raise Refused(f"no layer of the blocks can be compressed: {name} {why}, for example")
    for name, place in result.places.items():
        if place is not None and place.kind == "through" and place.name not in compressed:
            result.places[name] = None
    if stay and not ranks.rank():
        found = by_pattern(stay, prefix, len(known.parts))
        names = [f"{pattern} {why}" for pattern, why in found]
        warn(f"layers that stay as they are ({len(stay)}): {first_of(names, NAMED, '; ')}")
    if not ranks.rank():
        logger.info("compressing %d layers of %d blocks", len(compressed), len(known.parts))
    return len(compressed)


def _check_trainable(plan: Plan, probe: Probe | None, hand_on_more: bool) -> None:
    """
    Raises:
        Refused: what is to be trained cannot be.
    """
    if (plan.reconstruction is not None or plan.learns) and hand_on_more:
        raise Refused("blocks hand more to later ones than hidden states: they cannot be trained apart")
    if plan.learns and probe is None:
        raise Refused("the model puts out no logits: there is nothing to learn by")


def _check_lengths(hidden: Sequence[Tensor], masks: Sequence[Tensor | None]) -> None:
    """
    Raises:
        Refused: a mask of tokens does not fit the hidden states.
    """
    for of_batch, mask in zip(hidden, masks, strict=False):
        if mask is not None and mask.shape != of_batch.shape[:2]:
            found = tuple(of_batch.shape[:2])
            raise Refused(f"the hidden states of {tuple(mask.shape)} tokens are {found}: which count is not known")


def _warn_of_few(tokens: Mapping[str, int]) -> None:
    if not tokens or ranks.rank():
        return
    names = [f"{name} ({count})" for name, count in tokens.items()]
    warn(
        f"layers that saw too few tokens for statistics of their own and were rounded to nearest ({len(tokens)}), "
        f"and how many they saw: {first_of(names, NAMED)}"
    )
