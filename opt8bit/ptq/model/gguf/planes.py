"""Numbers of a few bits in bytes, as ggml packs them: those of one byte do not follow each other in the row."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_planes(numbers: Tensor, bits: int, run: int) -> Tensor:
    """Returns numbers (..., n) in bytes, uint8 (..., n * bits / 8).

    Byte l of the first ``run`` bytes has the numbers l, l + run, l + 2 run, ..., the first in its lowest bits. The next
    ``run`` bytes have the numbers behind those.

    Args:
        numbers: uint8, whose lowest bits are taken.
        bits: 1, 2 or 4.
        run: of bytes; ``run * 8 / bits`` divides n.
    """
    each = 8 // bits
    planes = (numbers & (2**bits - 1)).unflatten(-1, (-1, each, run))
    return (planes << _shifts(bits, numbers)).sum(-2, dtype=torch.uint8).flatten(-2)


def unpack_planes(packed: Tensor, bits: int, run: int) -> Tensor:
    """Returns the numbers, uint8 (..., n), of :func:`pack_planes`."""
    planes = packed.unflatten(-1, (-1, 1, run)) >> _shifts(bits, packed)
    return (planes & (2**bits - 1)).flatten(-3)


def _shifts(bits: int, like: Tensor) -> Tensor:
    """Returns how far the numbers of a byte are shifted, (numbers, 1)."""
    return torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)[:, None]


def as_bytes(numbers: Tensor) -> Tensor:
    """Returns numbers (...) in float16, uint8 (..., 2)."""
    return numbers.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)


def as_float16(packed: Tensor) -> Tensor:
    """Returns the numbers of bytes (..., 2), float16 (...)."""
    return packed.contiguous().view(torch.float16)[..., 0]
