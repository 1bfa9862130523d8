"""Blocks of GGUF files that hold a symmetric grid: a scale in float16, and 32 codes of 4, 5 or 8 bits.

The layouts are those of ggml's ``ggml-common.h``: ``block_q4_0``, ``block_q5_0`` and ``block_q8_0``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

GROUP = 32  # weights of a block
SCALE_BYTES = 2
TYPES: Mapping[int, str] = {4: "Q4_0", 5: "Q5_0", 8: "Q8_0"}  # ggml's names, by the bits of a code
MIDDLE = 128  # a code of 8 bits is stored as a signed byte, less by this


def block_bytes(bits: int) -> int:
    """Returns the bytes of a block whose codes have so many bits."""
    return SCALE_BYTES + GROUP * bits // 8


def bits_of(blocks_shape: tuple[int, ...]) -> int:
    """Returns the bits of a code, by the shape of blocks, (out, groups, bytes).

    Raises:
        ValueError: no block has so many bytes.
    """
    found = [bits for bits in TYPES if block_bytes(bits) == blocks_shape[-1]]
    if len(blocks_shape) != 3 or not found:
        known = ", ".join(f"{block_bytes(bits)} ({name})" for bits, name in TYPES.items())
        raise ValueError(f"blocks must be (out, groups, bytes) with {known} bytes, got {blocks_shape}")
    return found[0]


def pack_blocks(
    codes: Tensor,  # uint8 (out, in)
    scale: Tensor,  # (out, groups), of either sign
    bits: int,
) -> Tensor:
    """Returns blocks, uint8 (out, groups, bytes), whose codes q stand for ``(q - 2^(bits-1)) * scale``.

    The first half of a block's codes are the low halves of its bytes, the second half the high ones. Of 5 bits the
    highest ones stand apart, in four bytes, the first code's in the lowest bit.

    Args:
        codes: of a symmetric grid.
        scale: numbers that float16 holds.
        bits: of a code, one of :data:`TYPES`.
    """
    groups = codes.unflatten(1, (-1, GROUP))
    parts = [scale.to(torch.float16).unsqueeze(-1).contiguous().view(torch.uint8)]
    if bits == 8:
        parts.append(groups ^ MIDDLE)  # as a signed byte it is q - 128
    else:
        if bits == 5:
            parts.append(_packed_bits(groups >> 4))
        low = groups & 15
        parts.append(low[..., : GROUP // 2] | low[..., GROUP // 2 :] << 4)
    return torch.cat(parts, -1)


def unpack_blocks(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the codes, uint8 (out, in), and the scales, float16 (out, groups), of :func:`pack_blocks`.

    Args:
        blocks: uint8 (out, groups, bytes).

    Raises:
        ValueError: no block has so many bytes.
    """
    bits = bits_of(tuple(blocks.shape))
    scale, rest = blocks[..., :SCALE_BYTES].contiguous().view(torch.float16)[..., 0], blocks[..., SCALE_BYTES:]
    if bits == 8:
        return (rest ^ MIDDLE).flatten(1), scale
    halves = rest[..., -GROUP // 2 :]
    codes = torch.cat([halves & 15, halves >> 4], -1)
    if bits == 5:
        codes |= _unpacked_bits(rest[..., :4]) << 4
    return codes.flatten(1), scale


def _packed_bits(
    highest: Tensor,  # uint8 (out, groups, 32), 0 or 1
) -> Tensor:
    """Returns the bits of each block in four bytes, uint8 (out, groups, 4), the lowest first."""
    places = torch.arange(8, dtype=torch.uint8, device=highest.device)
    return (highest.unflatten(-1, (4, 8)) << places).sum(-1, dtype=torch.uint8)


def _unpacked_bits(
    packed: Tensor,  # uint8 (out, groups, 4)
) -> Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed.unsqueeze(-1) >> places & 1).flatten(-2)
