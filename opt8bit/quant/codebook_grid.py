"""Grids of any values, as the optimizer states are stored."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.quant.codebook import check_codebook
from opt8bit.quant.grid import FRACTIONS, Grid, P, best, checked_range

SIGNED_FRACTIONS = FRACTIONS[:21:2]  # fewer, as each leads to the best scale near it


class CodebookParams(NamedTuple):
    """Holds what a :class:`CodebookGrid` keeps per block."""

    scale: Tensor  # positive, unless the grid's scales are signed


def encoded(x: Tensor, codebook: Tensor) -> Tensor:
    """Returns the codes of the values of a codebook that are nearest to ``x``, as uint8 of its shape.

    Args:
        x: any shape.
        codebook: (n,), ascending, 2 to 256 values.
    """
    values = codebook.to(device=x.device, dtype=torch.float64)
    middles = ((values[1:] + values[:-1]) / 2).to(x.dtype)
    return torch.bucketize(x.contiguous(), middles).to(torch.uint8)


class OnCodebook(Grid[P]):
    """Rounds to ``codebook[q] * scale``, with ``scale`` among its params and what else a subclass keeps of a block."""

    codebook: Tensor  # (n,) float32, ascending

    def encode(self, x: Tensor, params: Any) -> Tensor:
        return encoded(x / params.scale, self.codebook)

    def decode(self, codes: Tensor, params: Any) -> Tensor:
        return self.codebook.to(params.scale)[codes.long()] * params.scale

    def nearest(self, x: Tensor, params: Any) -> Tensor:
        return self.decode(self.encode(x, params), params)


class CodebookGrid(OnCodebook[CodebookParams]):
    """Rounds to any values: ``codebook[q] * scale``, as the optimizer states are stored.

    Args:
        codebook: (n,) float32, ascending, 2 to 256 values: :func:`normal_float`, :func:`dynamic_map` ...
        range: "minmax" scales a block's largest magnitude to the codebook's; "mse" a fraction of it, that of the least
            squared error.
        signed: whether scales may be negative, which serves values that are not symmetric about zero. A block gets the
            sign of less squared error, and a range of "mse" has the best scale for the codes of each fraction, too.
        scale_dtype: see :class:`Grid`.

    Raises:
        TypeError, ValueError: ``codebook``, ``range`` or ``scale_dtype`` is not one.
    """

    params_type = CodebookParams

    def __init__(
        self,
        codebook: Tensor,
        *,
        range: str = "minmax",
        signed: bool = False,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scale_dtype)
        check_codebook(codebook)
        self.codebook = codebook
        self.range = checked_range(range)
        self.signed = signed

    def __repr__(self) -> str:
        values = f"{self.codebook.numel()} values #{zlib.crc32(self.codebook.cpu().numpy().tobytes()):08x}"
        signed = ", signed=True" if self.signed else ""
        return f"CodebookGrid({values}, range={self.range!r}{signed}, scale_dtype={self.scale_dtype})"

    @property
    def bits(self) -> int:
        return (self.codebook.numel() - 1).bit_length()

    def stored_bits(self, codes: Tensor, params: CodebookParams) -> int:
        return self.bits * codes.numel() + 8 * self.scale_dtype.itemsize * params.scale.numel()

    def fit(self, block: Tensor, importance: Tensor | None = None) -> CodebookParams:
        absmax = block.abs().amax(-1, keepdim=True) / self.codebook.abs().max().to(block)
        # Zeros are exact at any scale, or else the nearer the smaller the scale is.
        of_zeros = 1 if bool((self.codebook == 0).any()) else torch.finfo(torch.float32).tiny
        absmax = torch.where(absmax > 0, absmax, of_zeros)
        full = CodebookParams(self.storable(absmax))
        if self.signed:
            return best(self, block, importance, self._either(block, absmax, importance), full)
        if self.range == "minmax":
            return full
        candidates = (CodebookParams(self.storable(absmax * part)) for part in FRACTIONS)
        return best(self, block, importance, candidates, full)

    def _either(self, block: Tensor, absmax: Tensor, importance: Tensor | None) -> Iterator[CodebookParams]:
        """Yields fractions of the range with either sign and, where it is searched, the best scale for their codes."""
        for part in SIGNED_FRACTIONS if self.range == "mse" else FRACTIONS[:1]:
            size = self.storable(absmax * part)
            for params in (CodebookParams(size), CodebookParams(-size)):
                yield params
                if self.range == "mse":
                    yield self._refined(block, importance, params)

    def _refined(self, block: Tensor, importance: Tensor | None, params: CodebookParams) -> CodebookParams:
        """Returns the scale of least squared error for the codes that one gives, with its sign."""
        values = self.nearest(block, params) / params.scale
        weighted = values if importance is None else values * importance
        below = (weighted * values).sum(-1, keepdim=True)
        ratio = (weighted * block).sum(-1, keepdim=True) / below
        size = torch.where((below > 0) & (ratio * params.scale > 0), ratio, params.scale).abs()
        return CodebookParams(self.storable(size).copysign(params.scale))
