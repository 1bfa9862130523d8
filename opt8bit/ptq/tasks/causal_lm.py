"""Models that predict the next token of a text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax, nll_loss

from opt8bit.ptq import ranks
from opt8bit.ptq.evaluate import check_token_ids, perplexity_of
from opt8bit.ptq.model.ends import ModelEnd
from opt8bit.ptq.tasks.task import Batch, Probe, Quality, Task
from opt8bit.recipe.arguments import check_count

PROBED = 4  # tokens whose logits a checkpoint is checked by
IGNORED = -100  # in place of a token that is not to be predicted
PREDICTED = 256  # tokens whose logits and their gradients are in memory together
FEW = 8  # tokens: enough for experts to share them, and for as many passes as an anatomy takes


@dataclass(frozen=True)
class CausalLM(Task):
    """Handles causal language models, called as ``model(input_ids=...)``, which put out ``logits``."""

    def batches(self, name: str, data: Any, size: int, model: nn.Module) -> list[dict[str, Tensor]]:
        # Of a checkpoint the blocks' parameters are on the meta device.
        device = next((param.device for param in model.parameters() if not param.is_meta), torch.device("cpu"))
        if isinstance(data, Tensor):
            check_count("batch_size", size)
            check_token_ids(name, data, model)
            return [{"input_ids": part.to(device)} for part in data.split(size)]
        given = list(data) if isinstance(data, Iterable) else [data]
        for batch in given:
            if not isinstance(batch, Mapping):
                raise TypeError(
                    f"{name} must be one tensor of token ids (samples, length), or mappings that have input_ids, "
                    f"got {type(batch).__name__}"
                )
        if not given or any("input_ids" not in batch for batch in given):
            raise ValueError(f"{name} must be token ids (samples, length) or batches that have input_ids")
        for i, batch in enumerate(given):
            _check_batch(f"of {name}'s batch {i}", batch, model)
        return [{key: value.to(device) for key, value in batch.items()} for batch in given]

    def smallest(self, batch: Batch) -> Batch:
        """Returns the first tokens of the first sequence."""
        first = {name: value[:1, :FEW] for name, value in batch.items()}
        if "attention_mask" in first:
            first["attention_mask"] = torch.ones_like(first["attention_mask"])
        return first

    def probe(self, end: ModelEnd, batch: dict[str, Tensor], hidden: Tensor) -> Probe | None:
        """Returns the probe of the batch's first sequence, or None where the model puts out no logits."""
        # Copies: files hold no two tensors that share memory, as input_ids and labels may.
        first = {name: value[:1].clone() for name, value in batch.items()}
        logits = end.logits(first, hidden[:1])
        return None if logits is None else Probe(first, logits[0, -PROBED:].float())

    def losses(self, end: ModelEnd, batch: dict[str, Tensor], hidden: Tensor) -> Iterator[Tensor]:
        """Yields the cross-entropy of the batch's tokens, predicted from those before them, some at a time."""
        if hidden.shape[:2] != batch["input_ids"].shape:
            return  # which token a hidden state predicts is not known
        for one, x, _ in _sequences([batch], [hidden], [hidden]):
            targets, counts = one["input_ids"][0, 1:], _counted(one)
            if isinstance(counts, Tensor):
                targets = targets.where(counts, IGNORED)
            for start in range(0, len(targets), PREDICTED):
                part = slice(start, min(start + PREDICTED, len(targets)))
                logits = end.logits({name: value[:, part] for name, value in one.items()}, x[:, part])
                if logits is None:
                    return
                logits = logits[0].to(torch.promote_types(logits.dtype, torch.float32))
                yield cross_entropy(logits, targets[part], ignore_index=IGNORED, reduction="sum")

    def quality(
        self,
        end: ModelEnd,
        batches: Sequence[dict[str, Tensor]],
        hidden: Sequence[Tensor],
        hidden_hat: Sequence[Tensor],
        *,
        end_hat: ModelEnd | None = None,
    ) -> Quality | None:
        """Measures how well both models predict every token of the batches from those before it."""
        tokens = losses = losses_hat = divergence = 0.0
        for batch, x, x_hat in _sequences(batches, hidden, hidden_hat):
            logits, logits_hat = end.logits(batch, x), (end_hat or end).logits(batch, x_hat)
            if logits is None or logits_hat is None:
                break
            counts = _counted(batch)
            targets = batch["input_ids"][0, 1:][counts]
            exact, ours = (log_softmax(of[0, :-1][counts].float(), -1) for of in (logits, logits_hat))
            tokens += targets.numel()
            losses += float(nll_loss(exact, targets, reduction="sum"))
            losses_hat += float(nll_loss(ours, targets, reduction="sum"))
            divergence += float(kl_div(ours, exact, reduction="sum", log_target=True))
        tokens, losses, losses_hat, divergence = ranks.total([tokens, losses, losses_hat, divergence])
        if not tokens:
            return None
        divergence = max(divergence / tokens, 0.0)  # of equal predictions, rounding may leave less than nothing
        return Quality(int(tokens), perplexity_of(losses / tokens), perplexity_of(losses_hat / tokens), divergence)


def _check_batch(where: str, batch: Mapping[str, Tensor], model: nn.Module) -> None:
    for key, value in batch.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key} {where} must be a tensor, got {type(value).__name__}")
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    check_token_ids(f"input_ids {where}", ids, model)
    for key, value in batch.items():
        # Batches are cut into sequences, and the hidden states of a sequence go by its tokens.
        if value.shape[: None if key == "attention_mask" else 2] != ids.shape:
            more = "" if key == "attention_mask" else ", ..."
            raise ValueError(
                f"{key} {where} must be (sequences, length{more}) as input_ids, {tuple(ids.shape)}, "
                f"got shape {tuple(value.shape)}"
            )
    if mask is not None and not bool(mask.any()):
        raise ValueError(f"attention_mask {where} leaves no token that counts")


def _counted(batch: dict[str, Tensor]) -> Tensor | slice:
    """Returns the tokens of its one sequence, from the second on, that are no padding, nor predicted from it."""
    if "attention_mask" not in batch:
        return slice(None)
    mask = batch["attention_mask"][0].bool()
    return mask[:-1] & mask[1:]


def _sequences(
    batches: Sequence[dict[str, Tensor]], *streams: Sequence[Tensor]
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Yields one sequence at a time: logits are large."""
    for batch, x, x_hat in zip(batches, *streams, strict=True):
        for i in range(len(x)):
            yield {name: value[i : i + 1] for name, value in batch.items()}, x[i : i + 1], x_hat[i : i + 1]
