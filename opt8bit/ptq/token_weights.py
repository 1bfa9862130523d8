"""The weights of the calibration's tokens: made by a pass through the float model, or kept from an earlier one."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opt8bit.backends import first_of, warn
from opt8bit.ptq import ranks
from opt8bit.ptq.calibration.loss_weighting import LossWeighting, TokenWeights
from opt8bit.ptq.loss_gradients import Losses, squared_gradients
from opt8bit.ptq.model.passes import Call
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.resume import Work

logger = logging.getLogger(__name__)
KEPT = "gradients"  # the name that they have in a folder of work
NAMED = 8  # layers that a warning is about


def token_weights(
    weighting: LossWeighting,
    source: Source,
    layers: Mapping[str, Sequence[str]],
    calls: Sequence[Sequence[Call]],
    embedded: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    losses: Sequence[Losses],
    work: Work | None = None,
) -> TokenWeights | None:
    """Returns the weights of tokens. A folder of work keeps the gradients that they are made of.

    Args:
        weighting: makes the weights.
        source: of the float model.
        layers: full names of those that are compressed, by the name of their block; all blocks in their order.
        calls, embedded, losses: as of :func:`squared_gradients`.
        masks: of each batch that is learned from, (sequences, length), true where a token counts.
        work: of the run, if it is kept.

    Returns:
        None where the model has no loss.

    Raises:
        ModelError: the model's code raised an exception, or cannot be differentiated.

    Warns:
        UserWarning: tokens count alike, for some layers or for all.
    """
    with torch.no_grad():
        has_loss = next(losses[0](embedded[0]), None) is not None
    if not has_loss:
        warn_alike("the model puts out no logits to take a loss of")
        return None

    def make() -> dict[str, Tensor]:
        logger.info("differentiating the loss, for the weights of tokens")
        found = squared_gradients(source, list(layers), calls, embedded, losses)
        return {f"{name} {i}": each for name, squares in found.items() for i, each in enumerate(squares)}

    kept = make() if work is None else work.kept(KEPT, make)
    # Where a layer sees only some of the tokens, one process may happen to have seen all of its own.
    names = set.intersection(*ranks.gathered({key.rpartition(" ")[0] for key in kept}))
    missing = [name for own in layers.values() for name in own if name not in names]
    if missing:
        warn_alike(f"they do not all go through {first_of(missing, NAMED)}")
    return TokenWeights(weighting, {name: [kept[f"{name} {i}"] for i in range(len(losses))] for name in names}, masks)


def warn_alike(why: str) -> None:
    """Warns that tokens count alike, though weights were asked for."""
    if not ranks.rank():
        warn(f"tokens are not weighted by the loss: {why}")
