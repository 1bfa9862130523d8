"""The layout of AWQ's checkpoints (version "gemm"), as AutoAWQ, GPTQModel and AutoRound write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of
from opt8bit.quant.packing import WORD, unpack

BITS = 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word's eight codes, from the lowest bits up: the outputs that they belong to


@dataclass(frozen=True)
class AWQLayout(Layout):
    """Stores the codes of eight neighbouring outputs in a word, in the order :data:`ORDER`.

    ``qweight``, int32 (in, out / 8), has the codes, ``qzeros``, int32 (groups, out / 8), the zero points as they are,
    and ``scales`` are (groups, out).
    """

    codes: ClassVar[str] = "qweight"
    others: ClassVar[tuple[str, ...]] = ("qzeros", "scales")

    @staticmethod
    def of(header: Mapping[str, Any]) -> AWQLayout:
        """Returns the layout that a header is of.

        Raises:
            ValueError: it is of another one.
        """
        version = str(header.get("version") or header.get("checkpoint_format") or "gemm").lower()
        bits = header.get("bits", header.get("w_bit", BITS))
        backend = header.get("backend") or "autoawq"
        if version != "gemm" or bits != BITS or backend == "llm-awq":
            found = f"version {version!r}, {bits} bits, by {backend}"
            raise ValueError(f"AWQ's codes must be of version 'gemm' and of {BITS} bits, got {found}")
        return AWQLayout()

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        words, zeros, scale = (part_of(parts, name) for name in ("qweight", "qzeros", "scales"))
        group = groups_of_columns(len(words), len(scale))
        return Unpacked(_in_order(words).T, scale.T, _in_order(zeros).T, group, BITS)


def _in_order(
    words: Tensor,  # int32 (rows, n / 8)
) -> Tensor:
    """Returns codes in the order of their outputs, uint8 (rows, n)."""
    each = WORD // BITS
    codes = unpack(words, BITS, each * words.shape[1]).unflatten(1, (-1, each))
    return codes[..., torch.tensor(ORDER).argsort()].flatten(1)
