"""Weights that a checkpoint has as codes, whatever their layout: which stored tensors they are, and their values."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

Dtypes = Mapping[str, str | torch.dtype]  # by tensor, as torch or safetensors call them


class CodedWeights(ABC):
    """Reads a checkpoint with codes as if it had weights.

    Attributes:
        names: of all tensors that the checkpoint would have without codes.
        dtype: of the weights.
        rounds_inputs: whether a server rounds the inputs of layers, too.
    """

    names: frozenset[str]
    dtype: torch.dtype
    rounds_inputs: bool

    @abstractmethod
    def parts(self, name: str) -> tuple[str, ...]:
        """Returns the names of the stored tensors that a tensor is made of, the codes first."""

    @abstractmethod
    def weight(self, name: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns a tensor's values.

        Args:
            name: one of ``names``.
            tensors: its parts.

        Raises:
            ValueError: the parts do not fit, or the values are not finite.
        """

    @abstractmethod
    def check(self, dtypes: Dtypes) -> None:
        """Looks at the dtypes before anything is read.

        Args:
            dtypes: of stored tensors that the model needs.

        Raises:
            ValueError: what one of them stands for is not known.
        """

    @abstractmethod
    def notice(self) -> str | None:
        """Returns what is lost when only the weights are kept, as a sentence, or None."""
