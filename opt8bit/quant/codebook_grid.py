"""Grids of any values, as the optimizer states are stored."""

from __future__ import annotations

import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from opt8bit.quant.codebook import check_codebook
from opt8bit.quant.grid import FRACTIONS, Grid, best, checked_range


class CodebookParams(NamedTuple):
    """Holds what a :class:`CodebookGrid` keeps per block."""

    scale: Tensor  # positive


def encoded(x: Tensor, codebook: Tensor) -> Tensor:
    """Returns the codes of the values of a codebook that are nearest to ``x``, as uint8 of its shape.

    Args:
        x: any shape.
        codebook: (n,), ascending, 2 to 256 values.
    """
    values = codebook.to(device=x.device, dtype=torch.float64)
    middles = ((values[1:] + values[:-1]) / 2).to(x.dtype)
    return torch.bucketize(x.contiguous(), middles).to(torch.uint8)


class CodebookGrid(Grid[CodebookParams]):
    """Rounds to any values: ``codebook[q] * scale``, as the optimizer states are stored.

    Args:
        codebook: (n,) float32, ascending, 2 to 256 values: :func:`normal_float`, :func:`dynamic_map` ...
        range: "minmax" scales a block's largest magnitude to the codebook's; "mse" a fraction of it, that of the least
            squared error.
        scale_dtype: see :class:`Grid`.

    Raises:
        TypeError, ValueError: ``codebook``, ``range`` or ``scale_dtype`` is not one.
    """

    params_type = CodebookParams

    def __init__(self, codebook: Tensor, *, range: str = "minmax", scale_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(scale_dtype)
        check_codebook(codebook)
        self.codebook = codebook
        self.range = checked_range(range)

    def __repr__(self) -> str:
        values = f"{self.codebook.numel()} values #{zlib.crc32(self.codebook.cpu().numpy().tobytes()):08x}"
        return f"CodebookGrid({values}, range={self.range!r}, scale_dtype={self.scale_dtype})"

    @property
    def bits(self) -> int:
        return (self.codebook.numel() - 1).bit_length()

    def stored_bits(self, codes: Tensor, params: CodebookParams) -> int:
        return self.bits * codes.numel() + 8 * self.scale_dtype.itemsize * params.scale.numel()

    def fit(self, block: Tensor, importance: Tensor | None = None) -> CodebookParams:
        absmax = block.abs().amax(-1, keepdim=True) / self.codebook.abs().max().to(block)
        absmax = torch.where(absmax > 0, absmax, 1)
        full = CodebookParams(self.storable(absmax))
        if self.range == "minmax":
            return full
        candidates = (CodebookParams(self.storable(absmax * part)) for part in FRACTIONS)
        return best(self, block, importance, candidates, full)

    def encode(self, x: Tensor, params: CodebookParams) -> Tensor:
        return encoded(x / params.scale, self.codebook)

    def decode(self, codes: Tensor, params: CodebookParams) -> Tensor:
        return self.codebook.to(params.scale)[codes.long()] * params.scale

    def nearest(self, x: Tensor, params: CodebookParams) -> Tensor:
        return self.decode(self.encode(x, params), params)
