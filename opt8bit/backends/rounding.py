"""Writes bfloat16 parameters where rounding them to nearest would lose small updates.

bfloat16 keeps 8 bits of a number, so that an update of less than 1/512 of a parameter rounds to nothing, every time.
"""

from __future__ import annotations

import torch
from torch import Tensor

LOW_32_BITS = 0xFFFFFFFF


def _mix64(x: int) -> int:
    """Applies the finalizer of splitmix64. Source: Fast splittable pseudorandom number generators (2014)."""
    x = (x + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def random_bits(
    count: int, seed: int, step: int, number: int, device: torch.device | str = "cpu", *, first: int = 0
) -> Tensor:
    """Returns 32 random bits for each of ``count`` elements, int64 in [0, 2^32): a hash of (seed, step, number, index).

    Args:
        number: tells streams apart; that of a parameter in its optimizer.
        first: index of the first element.
    """
    key = _mix64(_mix64(_mix64(seed % 2**64) ^ step) ^ number)
    x = torch.arange(first, first + count, dtype=torch.int64, device=device) & LOW_32_BITS
    x = x ^ (key & LOW_32_BITS)
    x = ((x ^ (x >> 16)) * 0x21F0AAAD) & LOW_32_BITS
    x = ((x ^ (x >> 15)) + (key >> 32)) & LOW_32_BITS
    x = (x * 0x735A2D97) & LOW_32_BITS
    return x ^ (x >> 15)


def _float32_bits(x: Tensor) -> Tensor:
    """Returns the bits of float32 numbers, int32; those of the one quiet NaN where x is any NaN."""
    return torch.where(x.isnan(), torch.nan, x).view(torch.int32)


def _from_high_half(bits: Tensor) -> Tensor:
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def stochastically_rounded(x: Tensor, seed: int, step: int, number: int, first: int = 0) -> Tensor:
    """Returns float32 ``x`` in bfloat16: one of its two neighbours, so that the expectation is x.

    Arguments are as in :func:`random_bits`.
    """
    chance = random_bits(x.numel(), seed, step, number, x.device, first=first).view(x.shape) >> 16
    return _from_high_half(_float32_bits(x) + chance.to(torch.int32))


def compensated(param: Tensor, low: Tensor) -> Tensor:
    """Returns the float32 whose bits are those of the bfloat16 ``param``, moved up by 16, plus the int16 ``low``."""
    high = param.contiguous().view(torch.int16).to(torch.int32) << 16
    return (high + low).view(torch.float32)


def set_compensated(param: Tensor, low: Tensor, x: Tensor) -> None:
    """Writes float32 ``x`` as the nearest bfloat16 and what is missing; a tie goes away from zero."""
    bits = _float32_bits(x)
    high = (bits + 0x8000) & ~0xFFFF
    param.copy_(_from_high_half(high))
    low.copy_(bits - high)
