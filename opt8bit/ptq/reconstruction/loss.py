"""The batches that a block is trained on, and the error by which its output is judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from opt8bit.ptq.model.passes import Call


class Example(NamedTuple):
    """A batch that a block is trained on.

    Attributes:
        call: of the block, with the hidden states of the compressed model.
        target: (sequences, length, d), what the block is to put out.
        weights: (sequences, length), of each token's squared error; 0 where a token does not count. None where all
            weigh 1.
        exact: (sequences, length, d), the float model's hidden states that go into the block, where it is to be
            trained on them, too.
    """

    call: Call
    target: Tensor
    weights: Tensor | None = None
    exact: Tensor | None = None


def relative_error(y: Tensor, example: Example) -> Tensor:
    """Returns the squared error of a block's output relative to the variance of what the block is to add.

    Args:
        y: (sequences, length, d), what the block puts out.
        example: what it is to put out.
    """
    dtype = torch.promote_types(y.dtype, torch.float32)
    y, target, hidden = y.to(dtype), example.target.to(dtype), example.call.hidden.to(dtype)
    weights = None if example.weights is None else example.weights.to(dtype)
    if weights is not None:  # what does not count need not be finite
        counts = weights > 0
        y, target, hidden, weights = y[counts], target[counts], hidden[counts], weights[counts]
    added = target - hidden
    variance = _mean_square(added - added.mean(), weights)
    return _mean_square(y - target, weights) / variance.clamp(min=torch.finfo(dtype).tiny)


def _mean_square(x: Tensor, weights: Tensor | None) -> Tensor:
    """Returns the mean of squares of ``x`` (..., d), each token's by its weight."""
    if weights is None:
        return x.square().mean()
    return (x.square().mean(-1) * weights).sum() / weights.sum()


def capped_weights(target: Tensor, mask: Tensor | None, cap: float) -> Tensor:
    """Returns weights that keep the few tokens of huge activations from being all that a block learns.

    A token whose hidden states have more than ``cap`` times the median norm weighs as if it had so much: the norm of
    the next block divides by it, so that an error there counts relative to it.

    Args:
        target: (sequences, length, d).
        mask: (sequences, length), true where a token counts; None where all do.
        cap: times the median.

    Returns:
        (sequences, length), 1 for most tokens.
    """
    norms = target.to(torch.promote_types(target.dtype, torch.float32)).norm(dim=-1)
    counted = norms if mask is None else norms[mask.bool()]
    weights = (cap * counted.median() / norms.clamp(min=torch.finfo(norms.dtype).tiny)).square().clamp(max=1)
    return weights if mask is None else torch.where(mask.bool(), weights, 0)


def mixed_inputs(example: Example, share: float, generator: torch.Generator) -> Call:
    """Returns the call with a share of its hidden states' elements, chosen randomly, from the float model.

    Source: QDrop (https://arxiv.org/abs/2203.05740), there with a share of one half.
    """
    if not share or example.exact is None:
        return example.call
    if share == 1:
        return example.call._replace(hidden=example.exact)
    chosen = torch.rand(example.exact.shape, generator=generator, device="cpu").to(example.exact.device) < share
    return example.call._replace(hidden=torch.where(chosen, example.exact, example.call.hidden))
