"""Measures how good a language model is on a text: the loss over windows that do not overlap."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from opt8bit.ptq.model.blocks import evaluating


def windows(
    tokens: Tensor,  # (n,)
    length: int,
    samples: int,
) -> Tensor:
    """Returns the first ``samples`` windows of ``length`` tokens, one after another, (samples, length).

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


def check_token_ids(name: str, ids: Tensor, model: nn.Module) -> None:
    """
    Raises:
        ValueError: they are not what the model takes: (samples, length), int64, of its vocabulary, no longer than the
            positions it has, and at least one of them.
    """
    if ids.dim() != 2 or ids.dtype != torch.int64 or not ids.numel():
        raise ValueError(
            f"{name} must be int64 token ids (samples, length), got {ids.dtype} of shape {tuple(ids.shape)}"
        )
    config = getattr(model, "config", None)
    vocabulary, positions = (getattr(config, key, None) for key in ("vocab_size", "max_position_embeddings"))
    if isinstance(vocabulary, int) and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
        raise ValueError(
            f"{name} must be below the vocabulary's {vocabulary:,}, got {int(ids.min())} to {int(ids.max())}"
        )
    if isinstance(positions, int) and 0 < positions < ids.shape[1]:  # XLNet says -1: as many as there are
        raise ValueError(
            f"{name} may be {positions:,} tokens long, as many as the model has positions, got {ids.shape[1]:,}"
        )


def mean_loss(
    model: nn.Module,
    samples: Tensor,  # (samples, length) token ids
) -> float:
    """Returns the mean cross-entropy, in nats, over the tokens that a window lets predict: all except its first.

    Raises:
        ValueError: ``samples`` are not what the model takes, or of one token.
    """
    check_token_ids("samples", samples, model)
    if samples.shape[1] < 2:
        raise ValueError(f"samples must be of at least 2 tokens, got shape {tuple(samples.shape)}")
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
    """Returns ``exp`` of :func:`mean_loss`, which raises the same; infinite where that is beyond float64."""
    return perplexity_of(mean_loss(model, samples))


def perplexity_of(loss: float) -> float:
    """Returns ``exp`` of a mean loss in nats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
