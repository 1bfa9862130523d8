"""Errors of modules that see what the corrected modules before them have made of the inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.model.walk import Walk, halting_behind, walks
from opt8bit.ptq.pairs.batches import Target, call, mask_for, mask_of
from opt8bit.ptq.pairs.layer_error import LayerError, Mismatch
from opt8bit.ptq.pairs.local import about


def sequential_errors(
    quantized: nn.Module,
    reference: nn.Module,
    errors: Sequence[LayerError],
    batches: Sequence[Any],
    target: Target | None,
) -> dict[str, str]:
    """Runs both models over all batches, side by side, and corrects each module's output before they go on.

    All passes stand behind the same module at once, so that each model runs once. What every batch needs to go on is
    in memory together. Behind the last module, batch goes after batch.

    Args:
        quantized, reference: the models.
        errors: of their modules; they get what there is to see.
        batches: of the calibration.
        target: what batches become for the quantized model; None for what they are.

    Returns:
        Modules that turn out not to match, with the reason.

    Raises:
        ValueError: an output is not finite, or no tensor; or passes do not meet the same modules in the same order.
        ImportError: greenlet is not installed.
    """
    by_module = {each: e for e in errors for each in (e.pair.reference, e.pair.quantized)}
    forwards = [lambda batch=batch: call(reference, batch) for batch in batches]
    forwards_hat = [lambda batch=batch: call(quantized, batch, target) for batch in batches]
    unmatched: dict[str, str] = {}
    masks = [mask_of(batch) for batch in batches]
    with walks(forwards) as floats, walks(forwards_hat) as others, halting_behind(by_module):
        passes = list(zip(floats, others, masks, strict=True))
        done: set[str] = set()
        while not _arrive(passes[0], by_module, done).ended:
            layer = passes[0][1].layer
            assert layer is not None
            error = by_module[layer]
            is_last = len(done) + 1 == len(errors)
            for each in passes:
                if each is not passes[0]:
                    _arrive(each, by_module, done)
                with about(error):
                    why = _compare(error, each)
                if why is not None:
                    unmatched[error.pair.name] = why
                if is_last:
                    each[0].close()
                    each[1].close()
            error.settle()
            done.add(error.pair.name)
            if is_last:
                break
            _answer(error, passes)
    return unmatched


Pass = tuple[Walk, Walk, Tensor | None]


def _arrive(pair: Pass, by_module: dict[nn.Module, LayerError], done: set[str]) -> Walk:
    """Lets both models run to the next module that is not done; returns the quantized one's pass."""
    for walk in pair[:2]:
        walk.step()
        while walk.layer is not None and by_module[walk.layer].pair.name in done:
            error = by_module[walk.layer]  # called again: it has its bias
            if walk.layer is error.pair.quantized:
                walk.answer(error.corrected(walk.x))
            walk.step()
    return pair[1]


def _compare(error: LayerError, each: Pass) -> str | None:
    """Takes the outputs of a module into account; returns why they do not match, or None."""
    walk, walk_hat, mask = each
    layers = walk.layer, walk_hat.layer
    if layers != (error.pair.reference, error.pair.quantized):
        raise ValueError("the passes of some batches, or of the two models, do not meet here: use order='local'")
    y = error.read(walk.x)
    if error.compensation is None:
        error.begin(y, walk_hat.arguments)
    try:
        error.compare(walk.x, walk_hat.x, mask_for(mask, y, error.pair.channel_axis))
    except Mismatch as mismatch:
        return str(mismatch)
    return None


def _answer(error: LayerError, passes: list[Pass]) -> None:
    """Lets the quantized model go on with the corrected outputs."""
    for _, walk, _ in passes:
        walk.answer(error.corrected(walk.x))
