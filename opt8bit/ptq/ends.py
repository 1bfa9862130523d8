"""From the last block's hidden states to logits, of the float and of the compressed model: how good the result is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.functional import kl_div, log_softmax, nll_loss

from opt8bit.ptq import ranks
from opt8bit.ptq.evaluate import perplexity_of
from opt8bit.ptq.recording import handing_on, no_cache, without_blocks

PROBED = 4  # tokens whose logits a checkpoint is checked by


class Probe(NamedTuple):
    """A sequence, and what the compressed model makes of its last tokens."""

    inputs: dict[str, Tensor]  # input_ids (1, length), and what else the model was given
    logits: Tensor  # (PROBED or fewer, vocabulary), of the last tokens


class Quality(NamedTuple):
    """On text that nothing was learned from.

    Attributes:
        tokens: that were predicted.
        perplexity: of the model as it was.
        perplexity_compressed: of the compressed one.
        kl_divergence: of the compressed model's predictions from the other's, in nats per token.
    """

    tokens: int
    perplexity: float
    perplexity_compressed: float
    kl_divergence: float


class ModelEnd:
    """What a model does behind its blocks.

    Args:
        model: whose blocks need not be able to run.
        blocks: of it.
        outputs: what each of them returns.
        axes: dimensions of sequences and length in the model's own hidden states.
    """

    def __init__(
        self, model: nn.Module, blocks: nn.ModuleList, outputs: Sequence[Any], axes: tuple[int, int] = (0, 1)
    ) -> None:
        self._model, self._blocks, self._outputs, self._axes = model, blocks, outputs, axes

    def logits(self, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        """Of hidden states (sequences, length, ...) that the last block puts out; None where the model has none."""
        if self._axes != (0, 1):
            hidden = hidden.movedim((0, 1), self._axes)
        with (
            handing_on(self._blocks, self._outputs, hidden),
            without_blocks(self._model),
        ):
            output: Any = self._model(**batch, **no_cache(self._model))
        return getattr(output, "logits", None)


def probe(end: ModelEnd, batch: dict[str, Tensor], hidden: Tensor) -> Probe | None:
    """Of the batch's first sequence; None where the model puts out no logits."""
    # Copies: files hold no two tensors that share memory, as input_ids and labels may.
    first = {name: value[:1].clone() for name, value in batch.items()}
    logits = end.logits(first, hidden[:1])
    return None if logits is None else Probe(first, logits[0, -PROBED:].float())


def quality(
    end: ModelEnd, batches: Sequence[dict[str, Tensor]], hidden: Sequence[Tensor], hidden_hat: Sequence[Tensor]
) -> Quality | None:
    """How well both predict every token of the batches from those before; None where there are none, or no logits."""
    tokens = losses = losses_hat = divergence = 0.0
    for batch, x, x_hat in _sequences(batches, hidden, hidden_hat):
        logits, logits_hat = end.logits(batch, x), end.logits(batch, x_hat)
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


def _counted(batch: dict[str, Tensor]) -> Tensor | slice:
    """The tokens of its one sequence, from the second on, that are no padding, nor predicted from it."""
    if "attention_mask" not in batch:
        return slice(None)
    mask = batch["attention_mask"][0].bool()
    return mask[:-1] & mask[1:]


def _sequences(
    batches: Sequence[dict[str, Tensor]], *streams: Sequence[Tensor]
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """One sequence at a time: logits are large."""
    for batch, x, x_hat in zip(batches, *streams, strict=True):
        for i in range(len(x)):
            yield {name: value[i : i + 1] for name, value in batch.items()}, x[i : i + 1], x_hat[i : i + 1]
