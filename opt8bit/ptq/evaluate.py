"""How good a language model is on a text: the perplexity over windows that do not overlap."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from opt8bit.ptq.blocks import evaluating


def mean_loss(
    model: nn.Module,
    windows: Tensor,  # (samples, length) token ids
) -> float:
    """Mean cross-entropy in nats over the predicted tokens: all of a window but its first."""
    total = 0.0
    with evaluating(model):
        for window in windows:
            logits = model(input_ids=window[None]).logits[0, :-1].float()
            total += float(torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum"))
    return total / (windows[:, 1:].numel())
