"""Grids of 4-bit floats (e2m1) under scales of 8 bits: NVIDIA's NVFP4, and MXFP4 of the Open Compute Project."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
from torch import Tensor

from opt8bit.quant.codebook import FLOATS
from opt8bit.quant.codebook_grid import CodebookParams, OnCodebook
from opt8bit.quant.grid import best, checked_range

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # in the order of their codes
ZERO = len(MAGNITUDES) - 1  # the code of zero, among all values in ascending order
SIGN = 8  # that a stored code has where the value is negative
OCTAVES = (2.0, 1.0, 0.5, 0.25)  # of the scales that the search tries
E4M3_LEAST, E4M3_MOST = 2.0**-9, 448.0
E8M0_LEAST, E8M0_MOST = 2.0**-126, 2.0**127  # without 2^-127, which float32 holds as a subnormal only
P = TypeVar("P", bound=Any)


def e2m1() -> Tensor:
    """Returns the 15 values of 4-bit floats with 2 bits of exponent and 1 of fraction, ascending, as float32."""
    positive = torch.tensor(MAGNITUDES, **FLOATS)
    return torch.cat([-positive[1:].flip(0), positive])


class Float4Grid(OnCodebook[P]):
    """Rounds to ``e2m1[q] * scale``: 0, ±½, ±1, ±1½, ±2, ±3, ±4 and ±6 times a scale of few bits.

    Args:
        range: "minmax" takes the scale by which a block's largest magnitude is 6; "mse" tries each scale that the
            format stores, from a quarter of that one to twice as much, and takes the one of least squared error.

    Attributes:
        group_size: weights that share a scale in the format.
        significands: of the scales that the format stores, from 1 to 2.

    Raises:
        ValueError: ``range`` is another one.
    """

    group_size: ClassVar[int]
    significands: ClassVar[Sequence[float]]

    def __init__(self, *, range: str = "mse") -> None:
        super().__init__()
        self.codebook = e2m1()
        self.range = checked_range(range)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(range={self.range!r})"

    @property
    def bits(self) -> int:
        return 4

    @abstractmethod
    def params(self, scale: Tensor) -> P:
        """Returns params with the stored scales nearest to those that the blocks' largest magnitudes ask for."""

    def fit(self, block: Tensor, importance: Tensor | None = None) -> P:
        exact = block.abs().amax(-1, keepdim=True) / MAGNITUDES[-1]
        full = self.params(exact)
        if self.range == "minmax":
            return full
        power = torch.ldexp(torch.ones_like(exact), exact.frexp().exponent - 1)
        candidates = (
            full._replace(scale=self.storable(power * octave * significand, full))
            for octave in OCTAVES
            for significand in self.significands
        )
        return best(self, block, importance, candidates, full)


class NVFP4Params(NamedTuple):
    """Holds what an :class:`NVFP4Grid` keeps per block."""

    scale: Tensor  # unit times a number of float8 (e4m3)
    unit: Tensor  # a power of two


class NVFP4Grid(Float4Grid[NVFP4Params]):
    """Rounds to 4-bit floats in groups of 16, whose scales are float8 (e4m3) under one global scale in float32.

    The global scale, ``unit``, is a power of two here, so that every weight is a number of six significant bits, which
    bfloat16 and float16 hold exactly. It leaves the largest group's scale at 112 to 224 of float8's 448.

    Args:
        range: see :class:`Float4Grid`.
        unit: the global scale; None for that of the blocks that :meth:`fit` is given.

    Source: Pretraining Large Language Models with NVFP4, appendix B (https://arxiv.org/abs/2509.25149).
    """

    params_type = NVFP4Params
    group_size = 16
    significands = tuple(1 + i / 8 for i in range(8))

    def __init__(self, *, range: str = "mse", unit: float | None = None) -> None:
        super().__init__(range=range)
        self.unit = unit

    def for_weights(self, weights: Sequence[Tensor]) -> NVFP4Grid:
        largest = torch.stack([weight.abs().amax() for weight in weights]).amax()
        return NVFP4Grid(range=self.range, unit=float(_unit(largest / MAGNITUDES[-1])))

    def params(self, scale: Tensor) -> NVFP4Params:
        unit = _unit(scale.amax()) if self.unit is None else scale.new_tensor(self.unit)
        found = NVFP4Params(scale, unit.expand_as(scale).clone())
        return found._replace(scale=self.storable(scale, found))

    def storable(self, scale: Tensor, params: NVFP4Params | None = None) -> Tensor:
        if params is None:
            raise ValueError("scales of nvfp4 are stored under the global scale that their params have, got no params")
        unit = params.unit.to(scale.dtype)
        return (scale / unit).clamp(E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn).to(scale.dtype) * unit

    def stored_bits(self, codes: Tensor, params: NVFP4Params) -> int:
        return 4 * codes.numel() + 8 * params.scale.numel() + 32


class MXFP4Grid(Float4Grid[CodebookParams]):
    """Rounds to 4-bit floats in groups of 32, each with a power of two as its scale, stored in 8 bits (e8m0).

    With the range "minmax" a group's largest magnitude becomes the nearest of 6 and 8 times a power of two.

    Args:
        range: see :class:`Float4Grid`.

    Source: OCP Microscaling Formats (MX) Specification 1.0, section 5
    (https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf).
    """

    params_type = CodebookParams
    group_size = 32
    significands = (1.0,)

    def params(self, scale: Tensor) -> CodebookParams:
        largest = torch.where(scale > 0, scale, 1) * (6 / 7)  # 7 is between 6 and 8
        significand, exponent = largest.frexp()  # significand from ½ to 1
        power = torch.ldexp(torch.ones_like(scale), exponent - (significand == 0.5).to(exponent.dtype))
        return CodebookParams(power.clamp(E8M0_LEAST, E8M0_MOST))

    def storable(self, scale: Tensor, params: CodebookParams | None = None) -> Tensor:
        significand, exponent = scale.frexp()
        power = torch.ldexp(torch.ones_like(scale), exponent - (significand < 0.75).to(exponent.dtype))
        return power.clamp(E8M0_LEAST, E8M0_MOST)

    def stored_bits(self, codes: Tensor, params: CodebookParams) -> int:
        return 4 * codes.numel() + 8 * params.scale.numel()


def _unit(largest: Tensor) -> Tensor:
    """Returns the power of two by which a scale twice as large as the largest one is at most float8's largest."""
    exponent = (largest * (2 / E4M3_MOST)).frexp().exponent
    return torch.where(largest > 0, torch.ldexp(torch.ones_like(largest), exponent), 1)


def pack_e2m1(codes: Tensor) -> Tensor:
    """Returns codes as files have them, two in a byte, the first in the low bits: uint8 (out, in / 2).

    Args:
        codes: of a :class:`Float4Grid`, uint8 (out, in), in an even number.
    """
    value = codes.to(torch.int16) - ZERO
    stored = (value.abs() + SIGN * (value < 0)).to(torch.uint8)
    return stored[:, ::2] | stored[:, 1::2] << 4


def unpack_e2m1(packed: Tensor) -> Tensor:
    """Returns the codes of a :class:`Float4Grid`, uint8 (out, in), of what :func:`pack_e2m1` made.

    Args:
        packed: uint8 (out, in / 2). Minus zero becomes zero.
    """
    stored = torch.stack([packed & 15, packed >> 4], -1).flatten(1).to(torch.int16)
    magnitude = stored % SIGN
    return (ZERO + torch.where(stored >= SIGN, -magnitude, magnitude)).to(torch.uint8)
