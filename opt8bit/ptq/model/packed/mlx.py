"""The layout of mlx-lm's checkpoints, with symmetric grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of
from opt8bit.quant.packing import WORD, unpack

OTHERS = ("scales", "biases")


class MLXLayout(Layout):
    """Codes of an output are a row of words, bit to bit.

    ``weight``, uint32 (out, in * bits / 32), has the codes; ``scales`` and ``biases`` are (out, groups), and a code q
    stands for ``scale * q + bias``.
    """

    codes: ClassVar[str] = "weight"
    others: ClassVar[tuple[str, ...]] = OTHERS
    mark: ClassVar[str | None] = "scales"

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        words, scale, bias = (part_of(parts, name) for name in (self.codes, *OTHERS))
        bits = bits_of(scale, bias)
        columns, rest = divmod(WORD * words.shape[1], bits)
        if rest:
            raise ValueError(f"weight {tuple(words.shape)} does not fit {bits} bits")
        zero_point = torch.full(scale.shape, 2 ** (bits - 1))
        codes = unpack(words.view(torch.int32), bits, columns)
        return Unpacked(codes, scale, zero_point, groups_of_columns(columns, scale.shape[1]), bits)


def bits_of(scale: Tensor, bias: Tensor) -> int:
    """Returns the bits of a code, which the biases of symmetric grids tell: ``bias = -2^(bits-1) * scale``.

    Args:
        scale: (out, groups).
        bias: (out, groups).

    Raises:
        ValueError: they are not of one symmetric grid.
    """
    if scale.shape == bias.shape and scale.numel():
        for bits in range(2, 9):
            if torch.equal(bias, scale * -(2 ** (bits - 1))):
                return bits
    raise ValueError("biases that are not -2^(bits-1) times the scales: only symmetric grids of MLX are read")
