"""Codebooks: which values a code of at most 8 bits can take."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

MAX_CODES = 256
# Whatever the defaults are that the user has set.
FLOATS: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
DOUBLES: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}


def dynamic_map(signed: bool = True) -> Tensor:
    """Returns the 256 values of dynamic (non-linear) 8-bit quantization, ascending, as float32 on the CPU.

    For i = 0..6 the middles of 2^i (signed; mirrored below zero) or 2^(i+1) (unsigned) equal cells of
    [0.1, 1], times 10^(i-6); and 0 and 1. A code thus spends its bits on exponent or fraction as the
    value needs, over seven decades. There is no -1. Zero is code 127 of the signed map and code 0 of the
    unsigned one.

    In float32 a decade is the line ``slope * c + intercept`` over the count c of codes from zero, with both
    constants rounded to float32 and the result rounded once, so that one fused multiply-add decodes it. Its
    values lie within 7e-7, relatively, of the paper's real numbers.

    Args:
        signed: whether there are values below zero. Adam's second moment needs none.

    Source: 8-bit Optimizers via Block-wise Quantization, section 1.3 and appendix.
    """
    positive = []
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        denominator = cells * 10.0 ** (6 - i)
        line = torch.tensor([9 / (10 * denominator), (9 - 16 * cells) / (20 * denominator)], **FLOATS)
        slope, intercept = line.double()
        count = torch.arange(cells, 2 * cells, **DOUBLES)
        positive.append((slope * count + intercept).float())
    values = torch.cat([*positive, torch.ones(1, **FLOATS)])
    negative = -values[:-1].flip(0) if signed else values[:0]
    return torch.cat([negative, torch.zeros(1, **FLOATS), values])


def linear_map(signed: bool = True, bits: int = 8) -> Tensor:
    """Returns evenly spaced float32 values on the CPU: ``2^bits - 1`` from -1 to 1, or ``2^bits`` from 0 to 1.

    Args:
        signed: whether there are values below zero. The count is then odd, so that zero is one of them.
        bits: 2 to 8.

    Raises:
        ValueError: ``bits`` is not 2 to 8.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    if signed:
        largest = 2 ** (bits - 1) - 1
        return torch.arange(-largest, largest + 1, **FLOATS) / largest
    return torch.arange(2**bits, **FLOATS) / (2**bits - 1)


def normal_float(bits: int = 4) -> Tensor:
    """Returns ``2^bits`` float32 values on the CPU whose cells hold equal shares of a normal distribution.

    From -1 to 1 with an exact 0: ``2^(bits-1)`` quantiles below and ``2^(bits-1) + 1`` above it, evenly
    spaced in probability and scaled by the largest.

    Args:
        bits: 2 to 8.

    Raises:
        ValueError: ``bits`` is not 2 to 8.

    Source: QLoRA: Efficient Finetuning of Quantized LLMs, section 3 (NF4) and its reference code.
    """
    if bits not in range(2, 9):
        raise ValueError(f"bits must be 2 to 8, got {bits}")
    half = 2 ** (bits - 1)
    outermost = 1 - (1 / (2 * half - 1) + 1 / (2 * half)) / 4
    above = torch.special.ndtri(torch.linspace(outermost, 0.5, half + 1, **DOUBLES)[:-1])
    below = -torch.special.ndtri(torch.linspace(outermost, 0.5, half, **DOUBLES)[:-1])
    values = torch.cat([below, torch.zeros(1, **DOUBLES), above]).sort().values
    return (values / values.max()).float()


def check_codebook(codebook: Tensor) -> None:
    """Refuses what cannot be a codebook: it takes 2 to 256 finite values in ascending order, 1-D float32.

    Raises:
        TypeError: not a float32 tensor.
        ValueError: another shape, or values that are not finite and strictly ascending.
    """
    if not isinstance(codebook, Tensor) or codebook.dtype != torch.float32:
        found = codebook.dtype if isinstance(codebook, Tensor) else type(codebook).__name__
        raise TypeError(f"codebook must be a float32 tensor, got {found}")
    if codebook.dim() != 1 or not 2 <= codebook.numel() <= MAX_CODES:
        raise ValueError(f"codebook must be 1-D with 2 to {MAX_CODES} values, got shape {tuple(codebook.shape)}")
    if not bool(codebook.isfinite().all()) or not bool((codebook[1:] > codebook[:-1]).all()):
        raise ValueError("codebook values must be finite and strictly ascending")
