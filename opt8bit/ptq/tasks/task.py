"""Defines what a model is for: what it is given, and how good it is at what it makes of that."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from opt8bit.ptq.model.ends import ModelEnd

Batch = dict[str, Tensor]


class Probe(NamedTuple):
    """A sequence, and what the compressed model makes of its last tokens."""

    inputs: dict[str, Tensor]  # input_ids (1, length), and what else the model was given
    logits: Tensor  # (PROBED or fewer, vocabulary), of the last tokens


class Quality(NamedTuple):
    """Measures how good a model is on held-out text.

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


class Task(ABC):
    """One kind of models: a frozen dataclass."""

    @abstractmethod
    def batches(self, name: str, data: Any, size: int, model: nn.Module) -> list[Batch]:
        """Returns what a model is called with, ``model(**batch)``, on the model's device.

        Args:
            name: of the data, for messages.
            data: as :func:`compress` takes it: a tensor, or batches.
            size: sequences of a batch, where ``data`` is a tensor.
            model: that gets the batches.

        Raises:
            TypeError, ValueError: it is not what the model takes.
        """

    @abstractmethod
    def smallest(self, batch: Batch) -> Batch:
        """Returns a part of a batch that shows what the model is made of as well as all of it, and costs nothing."""

    @abstractmethod
    def probe(self, end: ModelEnd, batch: Batch, hidden: Tensor) -> Probe | None:
        """Returns what a written checkpoint can be checked by, or None where the model puts out nothing to compare.

        Args:
            end: of the model.
            batch: that went in.
            hidden: what came out of the last block.
        """

    @abstractmethod
    def losses(self, end: ModelEnd, batch: Batch, hidden: Tensor) -> Iterator[Tensor]:
        """Yields parts of the float model's loss on a batch, (), whose sum is the loss; none where it has no loss.

        One part's graph is freed before the next one is made, as what a model puts out is large.

        Args:
            end: of the model.
            batch: that went in.
            hidden: what comes out of the last block, with gradients.
        """

    @abstractmethod
    def quality(
        self,
        end: ModelEnd,
        batches: Sequence[Batch],
        hidden: Sequence[Tensor],
        hidden_hat: Sequence[Tensor],
        *,
        end_hat: ModelEnd | None = None,
    ) -> Quality | None:
        """Returns how good both models are on batches of which nothing was learned, or None where there are none.

        Args:
            end: of the model.
            batches: that went in.
            hidden, hidden_hat: of each batch, what comes out of the last block of the float and the compressed model.
            end_hat: of the compressed model, where it is another one.
        """


Calibration = Tensor | Iterable[Mapping[str, Tensor]]
