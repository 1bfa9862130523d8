"""The types of blocks in llama.cpp's files that weights are rounded to. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class GGUFType:
    """One of ggml's types.

    Attributes:
        bits: of a code.
        group_size: neighbouring weights that share a scale.
        block: weights that are stored together, which a row must be a multiple of.
        block_bytes: that they take.
        file_type: llama.cpp's name of files in which most matrices are of this type.
        fallback: the type that llama.cpp takes for rows that are no multiple of ``block``; None for none.
    """

    bits: int
    group_size: int
    block: int
    block_bytes: int
    file_type: str
    fallback: str | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.block_bytes / self.block


# Sizes are those of ggml-common.h; fallbacks those of tensor_type_fallback in llama-quant.cpp.
GGUF_TYPES: Mapping[str, GGUFType] = {
    "Q4_0": GGUFType(4, 32, 32, 18, "MOSTLY_Q4_0"),
    "Q4_1": GGUFType(4, 32, 32, 20, "MOSTLY_Q4_1"),
    "Q5_0": GGUFType(5, 32, 32, 22, "MOSTLY_Q5_0"),
    "Q5_1": GGUFType(5, 32, 32, 24, "MOSTLY_Q5_1"),
    "Q8_0": GGUFType(8, 32, 32, 34, "MOSTLY_Q8_0"),
    "IQ4_NL": GGUFType(4, 32, 32, 18, "MOSTLY_IQ4_NL"),
    "Q2_K": GGUFType(2, 16, 256, 84, "MOSTLY_Q2_K", "Q4_0"),
    "Q3_K": GGUFType(3, 16, 256, 110, "MOSTLY_Q3_K_S", "Q4_0"),
    "Q4_K": GGUFType(4, 32, 256, 144, "MOSTLY_Q4_K_S", "Q5_0"),
    "Q5_K": GGUFType(5, 32, 256, 176, "MOSTLY_Q5_K_S", "Q5_1"),
    "Q6_K": GGUFType(6, 16, 256, 210, "MOSTLY_Q6_K", "Q8_0"),
}


def is_gguf_type(grid: Any) -> bool:
    """Tells whether a recipe's grid is the name of a type."""
    return isinstance(grid, str) and grid in GGUF_TYPES
