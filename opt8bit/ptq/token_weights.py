"""The weights of the calibration's tokens: made by a pass through the float model, or kept from an earlier one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.loss_weighting import TokenWeights
from opt8bit.ptq.loss_gradients import Losses, squared_gradients
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.model.rehearsal import Rehearsal
from opt8bit.ptq.result import Result
from opt8bit.ptq.resume import Work

logger = logging.getLogger(__name__)
KEPT = "gradients"  # the name that they have in a folder of work
NAMED = 8  # layers that a warning is about


def token_weights(
    result: Result,
    prefix: str,
    known: Rehearsal,
    calls: Sequence[Sequence[Call]],
    embedded: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    losses: Sequence[Losses],
    work: Work | None = None,
) -> TokenWeights | None:
    """Returns the weights of the tokens that are learned from. A folder of work keeps the gradients behind them.

    Args:
        result: says which layers are compressed, and how tokens are weighted.
        prefix: the name of the list of blocks.
        known: how the model uses its blocks.
        calls, embedded, losses: as of :func:`squared_gradients`.
        masks: of each batch that is learned from, (sequences, length), true where a token counts.
        work: of the run, if it is kept.

    Returns:
        None where all tokens count alike.

    Raises:
        ModelError: the model's code raised an exception, or cannot be differentiated.

    Warns:
        UserWarning: tokens count alike, for some layers or for all.
    """
    weighting = result.plan.loss_weighting
    if weighting is None:
        return None
    if known.hands_on_more(calls[0]):
        return _alike("blocks hand more to later ones than hidden states")
    with torch.no_grad():
        has_loss = next(losses[0](embedded[0]), None) is not None
    if not has_loss:
        return _alike("the model puts out no logits to take a loss of")

    def make() -> dict[str, Tensor]:
        logger.info("differentiating the loss, for the weights of tokens")
        blocks = [f"{prefix}.{i}" for i in range(len(known.parts))]
        found = squared_gradients(result.source, blocks, calls, embedded, losses)
        return {f"{name} {i}": each for name, squares in found.items() for i, each in enumerate(squares)}

    kept = make() if work is None else work.kept(KEPT, make)
    # Where a layer sees only some of the tokens, one process may happen to have seen all of its own.
    names = set.intersection(*ranks.gathered({key.rpartition(" ")[0] for key in kept}))
    missing = [name for name in _compressed(result, prefix, known) if name not in names]
    if missing:
        _alike(f"they do not all go through {first_of(missing, NAMED)}")
    return TokenWeights(weighting, {name: [kept[f"{name} {i}"] for i in range(len(losses))] for name in names}, masks)


def _compressed(result: Result, prefix: str, known: Rehearsal) -> list[str]:
    """Returns the names of the layers that are rounded."""
    stages = [(f"{prefix}.{i}", stage) for i, part in enumerate(known.parts) for stage in part.anatomy.stages]
    names = [f"{block}.{name}" for block, stage in stages for name in stage]
    return [name for name in names if result.plan.of(name) is not None]


def _alike(why: str) -> None:
    """Warns that tokens count alike, though weights were asked for."""
    if not ranks.rank():
        warn(f"tokens are not weighted by the loss: {why}")
