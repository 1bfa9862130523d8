"""Passes through a model block by block: one block's activations, and the logits of few tokens, are there at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from opt8bit.backends.processor import product_dtype
from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.model.ends import ModelEnd
from opt8bit.ptq.model.passes import Call, Refused
from opt8bit.ptq.model.rehearsal import Rehearsal
from opt8bit.ptq.model.source import Source
from opt8bit.ptq.refinement.losses import Loss, Windows, most_likely

LOGITS = 2**23  # that are there at a time: 32 MB in float32


def mixed_precision(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Returns a context in which products of matrices have bfloat16, where that is the dtype to compute them in."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)


def products_of(model: nn.Module, batch: dict[str, Tensor]) -> torch.dtype:
    """Returns the dtype to compute products of matrices in: bfloat16 where the batch's device has arithmetic for it.

    Float32 elsewhere, and float64 for a model in float64.
    """
    own = next(model.parameters()).dtype
    return own if own == torch.float64 else product_dtype(batch["input_ids"].device)


class Chain:
    """A model that is run block by block.

    Args:
        source: of the model.
        known: of it, or of one that is built alike.
        few: tokens that the model can be called with.

    Attributes:
        known: as given.
        blocks: of the model.
        end: of the model, behind its blocks.
        vocabulary: how many logits it has for a token.

    Raises:
        ValueError: it puts out no logits, or its blocks hand on more than hidden states.
    """

    def __init__(self, source: Source, known: Rehearsal, few: dict[str, Tensor]) -> None:
        self._source, self.known = source, known
        self._prefix, self.blocks = find_blocks(source.model)
        self.end = ModelEnd(source.model, self.blocks, known.outputs, known.axes)
        calls = self._calls(few)
        if known.hands_on_more(calls):
            raise Refused("blocks hand more to later ones than hidden states: the model cannot be refined")
        logits = self.end.logits(few, calls[0].hidden)
        if logits is None:
            raise ValueError(f"{type(source.model).__name__} puts out no logits: there is nothing to refine it by")
        self.vocabulary = logits.shape[-1]

    def _calls(self, batch: dict[str, Tensor]) -> list[Call]:
        return self.known.calls(self._source.model, self.blocks, batch)

    def behind(self, batches: Sequence[dict[str, Tensor]]) -> list[Tensor]:
        """Returns the hidden states behind the last block, (sequences, length, ...), of each batch."""
        calls = [self._calls(batch) for batch in batches]
        hidden = [of[0].hidden for of in calls]
        for i in range(len(self.blocks)):
            with self._source.block(f"{self._prefix}.{i}") as block:
                hidden = [of[i]._replace(hidden=x).of(block) for of, x in zip(calls, hidden, strict=True)]
        return hidden

    def predictions(self, batch: dict[str, Tensor], hidden: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Returns the most likely next tokens, (sequences, length, k) ids and log-probabilities.

        Args:
            batch: that went in.
            hidden: what came out of the last block.
            k: how many for each token.
        """
        found = [most_likely(self._logits(batch, hidden[:, few], few), k) for few in self._few_tokens(batch)]
        ids, log_probs = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
        return ids, log_probs

    def loss(self, windows: Windows, loss: Loss) -> float:
        """Returns the sum of a loss over the tokens that count."""
        (hidden,) = self.behind([windows.batch])
        parts = [self._part(windows, hidden[:, few], few, loss) for few in self._few_tokens(windows.batch)]
        return float(torch.stack(parts).sum())

    def backward(self, windows: Windows, loss: Loss, scale: float, behind: Callable[[int], None]) -> float:
        """Accumulates the gradients of ``scale`` times the sum of a loss over the tokens that count.

        Each block runs twice: what its activations are is computed again when its gradients are.

        Args:
            windows: to predict.
            loss: of the logits and the windows' targets.
            scale: of the gradients.
            behind: called with a block's number when it has its gradients.

        Returns:
            The sum, without ``scale``.
        """
        calls = self._calls(windows.batch)
        hidden = [calls[0].hidden]
        for call, block in zip(calls, self.blocks, strict=True):
            hidden.append(call._replace(hidden=hidden[-1]).of(block))
        total, gradient = self._backward_from_logits(windows, hidden.pop(), loss, scale)
        for i in reversed(range(len(self.blocks))):
            x = hidden.pop().detach().requires_grad_(i > 0)
            with torch.enable_grad():
                y = calls[i]._replace(hidden=x).of(self.blocks[i])
            if y.requires_grad:
                y.backward(gradient)
            gradient = x.grad
            behind(i)
        return total

    def _backward_from_logits(self, windows: Windows, hidden: Tensor, loss: Loss, scale: float) -> tuple[float, Tensor]:
        """Returns the sum of a loss, and the gradient of the hidden states behind the last block."""
        total, gradient = 0.0, torch.empty_like(hidden)
        for few in self._few_tokens(windows.batch):
            x = hidden[:, few].detach().requires_grad_()
            with torch.enable_grad():
                part = self._part(windows, x, few, loss)
                (part * scale).backward()
            assert x.grad is not None
            gradient[:, few] = x.grad
            total += float(part)
        return total, gradient

    def _part(self, windows: Windows, hidden: Tensor, few: slice, loss: Loss) -> Tensor:
        logits = self._logits(windows.batch, hidden, few)
        each = loss(logits, *(target[:, few] for target in windows.targets))
        return (each * windows.counts[:, few]).sum()

    def _few_tokens(self, batch: dict[str, Tensor]) -> Iterator[slice]:
        """Parts of the sequences, whose logits are there at a time."""
        sequences, length = batch["input_ids"].shape
        tokens = max(LOGITS // (self.vocabulary * sequences), 1)
        return (slice(start, start + tokens) for start in range(0, length, tokens))

    def _logits(self, batch: dict[str, Tensor], hidden: Tensor, few: slice) -> Tensor:
        """Logits (sequences, tokens, vocabulary) of a part of the sequences, whose hidden states these are."""
        logits = self.end.logits({name: value[:, few] for name, value in batch.items()}, hidden)
        assert logits is not None
        return logits.to(torch.promote_types(logits.dtype, torch.float32))
