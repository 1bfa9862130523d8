"""How good a language model is on a text: the loss over windows that do not overlap."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from opt8bit.ptq.blocks import evaluating


def windows(
    tokens: Tensor,  # (n,)
    length: int,
    samples: int,
) -> Tensor:
    """The first ``samples`` windows of ``length`` tokens, one after another, (samples, length).

    Raises:
        ValueError: ``tokens`` are too few.
    """
    if length < 2 or samples < 1:
        raise ValueError(f"length must be at least 2 and samples at least 1, got {length} and {samples}")
    if len(tokens) < length * samples:
        raise ValueError(
            f"{samples} samples of {length} tokens take {length * samples:,}, the text has {len(tokens):,}"
        )
    return tokens[: length * samples].view(samples, length)


def mean_loss(
    model: nn.Module,
    samples: Tensor,  # (samples, length) token ids
) -> float:
    """Mean cross-entropy, in nats, over the tokens that a window lets predict: all but its first."""
    device = next(model.parameters()).device
    total = 0.0
    with evaluating(model):
        for window in samples.to(device):
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += float(cross_entropy(logits, window[1:], reduction="sum"))
    return total / samples[:, 1:].numel()


def perplexity(
    model: nn.Module,
    samples: Tensor,  # (samples, length) token ids
) -> float:
    """``exp`` of :func:`mean_loss`."""
    return math.exp(mean_loss(model, samples))
