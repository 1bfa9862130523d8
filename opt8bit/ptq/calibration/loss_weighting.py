"""Weights of tokens: how much the loss of the model's predictions depends on what layers put out for each of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq import ranks
from opt8bit.ptq.naming import named
from opt8bit.recipe.arguments import check_at_least


@dataclass(frozen=True)
class LossWeighting:
    """Turns the gradient of the loss into a weight of each token.

    Rounding minimizes squared errors of outputs, summed over tokens. The loss depends on some tokens' outputs far more
    than on others'. Here s is the squared gradient of the loss with respect to the outputs of the layers that read one
    input, averaged over these outputs (a diagonal of the empirical Fisher information). A token's weight is

    ``w = min(s^power, cap * mean(s^power))``, divided by its mean over the tokens.

    Args:
        power: exponent of s, at least 0. 1 is the second-order model of the loss, 0 weights all tokens alike.
        cap: largest multiple of the mean that s^power may be, at least 1.

    Raises:
        ValueError: ``power`` or ``cap`` is smaller, or no number.

    Source: GuidedQuant (https://arxiv.org/abs/2505.07004), which averages over groups of a layer's outputs, and has
    neither a power nor a cap.
    """

    power: float = 0.5
    cap: float = 10.0

    def __post_init__(self) -> None:
        check_at_least("power", self.power, 0)
        check_at_least("cap", self.cap, 1)

    def weights(
        self,
        squares: Sequence[Tensor],  # of each batch, (sequences, length)
        masks: Sequence[Tensor | None],  # of each batch, (sequences, length), true where a token counts
    ) -> list[Tensor]:
        """Returns the weight of each token, (sequences, length) of each batch in float64.

        Their mean over the tokens of all batches and processes is 1. Tokens that do not count weigh 0.

        Args:
            squares: s, up to a factor that all tokens have in common. Where all are 0, tokens weigh alike.
            masks: None where all tokens of a batch count.

        Raises:
            ValueError: a square that counts is not finite.
        """
        raised = [each.double() ** self.power for each in squares]
        mean = _mean(raised, masks)
        if not math.isfinite(mean):
            raise ValueError("the gradient of the loss is not finite")
        if mean == 0:
            raised, mean = [torch.ones_like(each) for each in raised], 1.0
        capped = [each.clamp(max=self.cap * mean) for each in raised]
        mean = _mean(capped, masks)
        return [
            each / mean if mask is None else torch.where(mask.bool(), each / mean, 0)
            for each, mask in zip(capped, masks, strict=True)
        ]


class TokenWeights:
    """The weights of tokens, for layers that read one input.

    Args:
        weighting: makes them.
        squares: by the full name of a layer, and batch: the squared gradient of the loss, (sequences, length), summed
            over the layer's outputs. Layers that have none weigh tokens alike.
        masks: as of :meth:`LossWeighting.weights`.
    """

    def __init__(
        self, weighting: LossWeighting, squares: Mapping[str, Sequence[Tensor]], masks: Sequence[Tensor | None]
    ) -> None:
        self._weighting, self._squares, self._masks = weighting, squares, masks

    def of(self, layers: Sequence[str]) -> list[Tensor] | None:
        """Returns the weights of each batch for layers by their full names; None where tokens weigh alike.

        Raises:
            ValueError: a gradient is not finite. The message names the first layer.
        """
        if not self._squares.keys() >= set(layers):
            return None
        of_batches = zip(*(self._squares[name] for name in layers), strict=True)
        with named(layers[0]):
            return self._weighting.weights([torch.stack(each).sum(0) for each in of_batches], self._masks)


def _mean(values: Sequence[Tensor], masks: Sequence[Tensor | None]) -> float:
    """Returns the mean over the tokens that count, of all batches and processes."""
    counted = [each if mask is None else each[mask.bool()] for each, mask in zip(values, masks, strict=True)]
    total, tokens = ranks.total([sum(float(each.sum()) for each in counted), sum(each.numel() for each in counted)])
    return total / tokens
