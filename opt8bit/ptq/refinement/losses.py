"""The losses of a refined model: what the float model predicts is the target, or the next tokens of the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

Loss = Callable[..., Tensor]  # of logits (sequences, tokens, vocabulary) and targets: one number a token
LEAST = 1e-6  # of a probability that is what others leave of 1: below, it is nothing but their rounding


class Windows(NamedTuple):
    """Sequences of equal length, and what they are to predict.

    Attributes:
        batch: what the model is called with, each (sequences, length, ...).
        targets: of the loss, each (sequences, length, ...).
        counts: (sequences, length), 1 for each token from which a prediction counts, else 0.
    """

    batch: dict[str, Tensor]
    targets: tuple[Tensor, ...]
    counts: Tensor


def joined(windows: Sequence[Windows]) -> list[Windows]:
    """Returns the same sequences in as few groups as their lengths and keys allow."""
    alike: dict[tuple[object, ...], list[Windows]] = {}
    for each in windows:
        alike.setdefault((each.counts.shape[1], *sorted(each.batch)), []).append(each)
    return [_concatenated(group) for group in alike.values()]


def apart(windows: Windows) -> list[Windows]:
    """Returns the sequences one by one."""
    found = []
    for i in range(len(windows.counts)):
        batch = {name: value[i : i + 1] for name, value in windows.batch.items()}
        targets = tuple(target[i : i + 1] for target in windows.targets)
        found.append(Windows(batch, targets, windows.counts[i : i + 1]))
    return found


def _concatenated(group: Sequence[Windows]) -> Windows:
    batch = {name: torch.cat([each.batch[name] for each in group]) for name in group[0].batch}
    targets = tuple(torch.cat(parts) for parts in zip(*(each.targets for each in group), strict=True))
    return Windows(batch, targets, torch.cat([each.counts for each in group]))


def counts_of(batch: dict[str, Tensor]) -> Tensor:
    """Returns (sequences, length): 1 for tokens that have a next one, both no padding; else 0."""
    ids = batch["input_ids"]
    mask = batch.get("attention_mask", torch.ones_like(ids)).bool()
    counts = torch.zeros(ids.shape, device=ids.device)
    counts[:, :-1] = mask[:, :-1] & mask[:, 1:]
    return counts


def next_tokens(batch: dict[str, Tensor]) -> Tensor:
    """Returns (sequences, length): each token's next one, and for the last ones, which do not count, any."""
    return batch["input_ids"].roll(-1, 1)


def most_likely(
    logits: Tensor,  # (..., vocabulary)
    k: int,
) -> tuple[Tensor, Tensor]:
    """Returns the ``k`` most likely tokens, or all if there are fewer: (..., k) ids, int32, and log-probabilities."""
    values, ids = logits.topk(min(k, logits.shape[-1]), sorted=False)
    return ids.to(torch.int32), values - logits.logsumexp(-1, keepdim=True)


def kl_divergence(
    logits: Tensor,  # (..., vocabulary)
    ids: Tensor,  # (..., k)
    log_probs: Tensor,  # (..., k)
) -> Tensor:
    """Returns the Kullback-Leibler divergence from predictions of which the most likely tokens are known, in nats.

    ``sum_i p_i log(p_i / q_i)`` over these tokens and one more class, which has the mass of all others. It is the
    divergence itself where k is the vocabulary, and never larger.

    Returns:
        (...), one number a token.
    """
    own = logits.gather(-1, ids.long()) - logits.logsumexp(-1, keepdim=True)
    probs = log_probs.exp()
    rest, own_rest = 1 - probs.sum(-1), 1 - own.exp().sum(-1)
    of_rest = rest * (rest.clamp(min=LEAST).log() - own_rest.clamp(min=LEAST).log())
    return (probs * (log_probs - own)).sum(-1) + torch.where(rest > LEAST, of_rest, 0)


def next_token_loss(
    logits: Tensor,  # (..., vocabulary)
    targets: Tensor,  # (...)
) -> Tensor:
    """Returns the cross-entropy of the next token, in nats, (...)."""
    return cross_entropy(logits.flatten(0, -2), targets.flatten(), reduction="none").view(targets.shape)


LOSSES: dict[str, Loss] = {"kl": kl_divergence, "next-token": next_token_loss}
