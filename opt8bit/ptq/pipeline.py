"""Compression block by block: what two streams of hidden states become, in the float model and the compressed one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.block import BlockTask, Streams
from opt8bit.ptq.blocks import block_layers, by_pattern, evaluating, find_blocks
from opt8bit.ptq.calls import Anatomy
from opt8bit.ptq.ends import ModelEnd, probe, quality
from opt8bit.ptq.layer import Recipe
from opt8bit.ptq.passes import Call, Refused
from opt8bit.ptq.placement import Places, bias_places, value_bias_through
from opt8bit.ptq.rehearsal import Rehearsal, rehearse
from opt8bit.ptq.result import Change, LayerReport, Result
from opt8bit.ptq.source import Source
from opt8bit.ptq.states import State
from opt8bit.ptq.work import Work

NAMED = 8  # layers that a warning is about


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
    result = Result(source, recipe, _places(model, recipe))
    with evaluating(model):
        known = rehearse(source, prefix, blocks, batches[0])
        layers = _check_layers(known, prefix, result)
        calls = [known.calls(model, blocks, batch) for batch in (*batches, *held_out)]
        masks = [batch.get("attention_mask") for batch in batches]
        _check_lengths(calls, masks)
        ends = ModelEnd(model, blocks, known.outputs, known.axes)
        probe(ends, batches[0], calls[0][0].hidden)  # of any hidden states: an end that cannot run is known at once
        embedded = [of_batch[0].hidden for of_batch in calls]
        streams = Streams(embedded, embedded)
        del embedded  # the streams' alone, to be let go with the first block
        calls = [[call._replace(hidden=call.hidden.new_empty(0)) for call in of_batch] for of_batch in calls]
        states = Streams(*([State() for _ in calls] for _ in streams))
        first = work.finished if work and not _hand_on_more(known, calls) else 0
        if work and first:
            saved = [stream.to(calls[0][0].hidden.device) for stream in work.streams()]
            streams = Streams(saved[: len(calls)], saved[len(calls) :])
            for report in work.reports():
                result.report.append(report)
                see(report, layers)
        too_few: dict[str, int] = {}
        for i in range(first, len(blocks)):
            streams, done = _run_block(
                source,
                f"{prefix}.{i}",
                known.parts[i].anatomy,
                result,
                masks,
                [of[i] for of in calls],
                streams,
                states,
                lambda r: see(r, layers),
            )
            too_few |= done.too_few
            if work:
                work.save(i, done.changes, done.reports, [*streams.exact, *streams.compressed])
            else:
                result.changes = {**result.changes, **done.changes}
        if work:
            result.changes = work.changes(recipe)
        _warn_of_few(too_few)
        result.probe = probe(ends, batches[0], streams.compressed[0])
        result.quality = quality(ends, held_out, *(stream[len(batches) :] for stream in streams))
    return result


class _Done(NamedTuple):
    """What is left of a block that is compressed."""

    changes: dict[str, Change]
    reports: list[LayerReport]
    too_few: dict[str, int]  # tokens of each layer that saw too few


def _run_block(
    source: Source,
    name: str,
    parts: Anatomy,
    result: Result,
    masks: Sequence[Tensor | None],
    calls: Sequence[Call],
    streams: Streams,
    states: Streams,
    see: Callable[[LayerReport], None],
) -> tuple[Streams, _Done]:
    """Returns the streams behind the block, and what was made of it. Nothing else of it is left in memory."""
    here = Streams(
        *(
            [call._replace(hidden=x, name=name, state=state) for call, x, state in zip(calls, *own, strict=True)]
            for own in zip(streams, states, strict=True)
        )
    )
    with source.block(name) as block:
        task = BlockTask(name, block, parts, result, masks, see)
        behind = task.run(here)
    value_bias_through(result.places, task.done, source.model)
    changes = {f"{full}.{kind}": change for full, layer in task.done.items() for kind, change in layer.changes.items()}
    return behind, _Done(changes, task.reports, task.too_few)


def _places(model: nn.Module, recipe: Recipe) -> Places:
    """What lets each layer hold a bias, if any is asked for."""
    everywhere = list(block_layers(model))
    if recipe.correct == "none":
        return dict.fromkeys(everywhere)
    return bias_places(model, everywhere, recipe.statistic)


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
        if result.recipe.of(f"{prefix}.{i}.{name}") is not None
    }
    compressed = {name for name in result.places if name not in stay and result.recipe.of(name) is not None}
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
    return len(compressed)


def _hand_on_more(known: Rehearsal, calls: Sequence[Sequence[Call]]) -> bool:
    """Whether blocks hand more to later ones than their hidden states, which a folder of work does not keep."""
    return any(part.changes for part in known.parts) or any(call.hands for call in calls[0])


def _check_lengths(calls: Sequence[Sequence[Call]], masks: Sequence[Tensor | None]) -> None:
    """
    Raises:
        Refused: a mask of tokens does not fit the hidden states.
    """
    for of_batch, mask in zip(calls, masks, strict=False):
        if mask is not None and mask.shape != of_batch[0].hidden.shape[:2]:
            found = tuple(of_batch[0].hidden.shape[:2])
            raise Refused(f"the hidden states of {tuple(mask.shape)} tokens are {found}: which count is not known")


def _warn_of_few(tokens: Mapping[str, int]) -> None:
    if not tokens or ranks.rank():
        return
    names = [f"{name} ({count})" for name, count in tokens.items()]
    warn(
        f"layers that saw too few tokens for statistics of their own and were rounded to nearest ({len(tokens)}), "
        f"and how many they saw: {first_of(names, NAMED)}"
    )
