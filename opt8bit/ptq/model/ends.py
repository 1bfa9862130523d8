"""Turns the last block's hidden states into logits, of the float and of the compressed model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn

from opt8bit.ptq.model.recording import handing_on, no_cache, without_blocks


class ModelEnd:
    """Runs what a model does behind its blocks.

    Args:
        model: whose blocks need not be able to run.
        blocks: of it.
        outputs: what each of them returns.
        axes: dimensions of sequences and length in the model's own hidden states.
        inside: a context to run it in.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: nn.ModuleList,
        outputs: Sequence[Any],
        axes: tuple[int, int] = (0, 1),
        inside: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._model, self._blocks, self._outputs, self._axes = model, blocks, outputs, axes
        self._inside = inside

    def logits(self, batch: dict[str, Tensor], hidden: Tensor) -> Tensor | None:
        """Returns the logits of the last block's hidden states (sequences, length, ...), or None without a head."""
        if self._axes != (0, 1):
            hidden = hidden.movedim((0, 1), self._axes)
        with (
            self._inside(),
            handing_on(self._blocks, self._outputs, hidden),
            without_blocks(self._model),
        ):
            output: Any = self._model(**batch, **no_cache(self._model))
        return getattr(output, "logits", None)
