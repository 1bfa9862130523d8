"""Defines a format of checkpoints: what it can hold, how it is written, what its files say, how it is loaded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.source import Source
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.ptq.result import Result
from opt8bit.ptq.rounding import Rounder
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.runtimes import Runtime


class Planned(NamedTuple):
    """A layer, and how its weight will be rounded."""

    module: nn.Module
    scheme: WeightScheme
    method: Rounder


@dataclass
class StoredLayer:
    """A matrix in a checkpoint and what is stored for it.

    Attributes:
        shape: (out, in).
        bits: of a code, where the weight is packed.
        grid: "asymmetric", "symmetric", or "signed" for symmetric ones some of whose scales are negative; in GGUF files
            the type of its blocks, such as "Q4_K". None where the weight is not packed, or its format does not say.
        stored_bytes: for the weight: codes, scales, zero points.
        bias: whether there is one.
        whole_codes: whether no code stands in two words, where other packings of that width have such codes.
    """

    shape: tuple[int, int]
    bits: int | None
    grid: str | None
    stored_bytes: int
    bias: bool
    whole_codes: bool = False

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.stored_bytes / self.weights


class StoredCodes(NamedTuple):
    """Says how the codes of a matrix are stored; see :class:`StoredLayer`."""

    bits: int
    whole_codes: bool = False


class CheckpointFormat(ABC):
    """One format of checkpoints.

    Attributes:
        parts: what stands behind a layer's name in the names of the tensors that are its weight; the codes' first.
        is_packed: whether weights are stored as codes.
        is_symmetric: whether it holds symmetric grids alone.
        is_read_by_transformers: whether transformers loads it.
        keeps_others: whether it holds tensors that the model does not load, too.
        runtime: the program that alone reads it, a name of :data:`RUNTIMES`; None for several.
        outside: how it stores the matrices outside of a model's blocks, if not as they are.
        scale_dtype: in which scales are stored, if it is not the dtype of the layer's weight.
        decoded_in: the dtype in which loaders compute the weights from the codes, if it is not the model's.
    """

    parts: ClassVar[Sequence[str]]
    is_packed: ClassVar[bool]
    is_symmetric: ClassVar[bool] = False
    is_read_by_transformers: ClassVar[bool] = True
    keeps_others: ClassVar[bool] = True
    runtime: ClassVar[str | None] = None
    outside: ClassVar[WeightScheme | None] = None
    scale_dtype: ClassVar[torch.dtype | None] = None
    decoded_in: ClassVar[torch.dtype | None] = None

    def for_runtime(self, runtime: Runtime | None) -> CheckpointFormat:
        """Returns the format as a runtime reads it; None stands for none in particular."""
        return self

    @abstractmethod
    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        """Checks that layers so rounded can be written, and loaded.

        Args:
            model: of the layers.
            layers: by name.
            left: names of linear layers of the blocks that stay as they are.

        Raises:
            ValueError: the format cannot hold one; the message names it, and what to use instead.
        """

    def check_source(self, source: Source) -> None:
        """Checks that what a source has besides its model can be written.

        Raises:
            ValueError: the format cannot hold it.
        """
        return

    def not_loaded_here(self, layers: Mapping[str, Planned]) -> list[str]:
        """Returns what the packages that are installed cannot load of layers so rounded, and which can, in lines.

        Args:
            layers: that :meth:`check` has let through.
        """
        return []

    @abstractmethod
    def write(self, result: Result, folder: Path, tokenizer: Any = None) -> None:
        """Writes a compressed model's checkpoint into an empty folder.

        Raises:
            OSError: it cannot be written.
        """

    @abstractmethod
    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        """Returns the shape (out, in) of the weight that is stored under a name, and the bits of its codes.

        Args:
            parts: all tensors under the name, by what stands behind it.
            read: reads one of them.

        Returns:
            None if they are no matrix; no bits if it is not packed.

        Raises:
            ValueError: a part is missing.
        """

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        """Returns what :class:`StoredLayer` calls the grid of a packed weight; the arguments are those of
        :meth:`shape_and_bits`.
        """
        return None

    def codes_of(self, layer: str, columns: int, parts: Mapping[str, Header], header: Any) -> StoredCodes | None:
        """Returns how the codes of a packed weight are stored, where shapes do not tell, or None where they do.

        Args:
            layer: its name in the checkpoint.
            columns: inputs of the weight.
            parts: all tensors under the name, by what stands behind it.
            header: the checkpoint's quantization header.
        """
        return None

    def log_probabilities(self, folder: Path, token_ids: Tensor) -> Tensor | None:
        """Returns each token's log-probability behind a text, (tokens,), by the program that reads the format, or None
        where it is not installed or not known.

        Args:
            folder: of a checkpoint.
            token_ids: of the text, (length,).

        Raises:
            ValueError: the program does not run it.
        """
        return None

    @abstractmethod
    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """Returns what transformers' configuration must have to unpack one tensor at a time, or None where it cannot.

        Args:
            quantization: the checkpoint's quantization header, if it has one.
        """
