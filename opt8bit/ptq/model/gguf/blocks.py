"""Blocks of GGUF files: one or two numbers in float16, and 32 codes.

The layouts are those of ggml's ``ggml-common.h``: ``block_q4_0``, ``block_q4_1``, ``block_q5_0``, ``block_q5_1``,
``block_q8_0`` and ``block_iq4_nl``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.planes import as_bytes, as_float16, pack_planes, unpack_planes
from opt8bit.recipe.gguf_types import GGUF_TYPES

GROUP = 32  # weights of a block
HALF = GROUP // 2
MIDDLE = 128  # a code of 8 bits is stored as a signed byte, less by this


def check_blocks(kind: str, blocks_shape: tuple[int, ...]) -> None:
    """
    Raises:
        ValueError: it is no shape of blocks of a type, (out, blocks, bytes).
    """
    wanted = GGUF_TYPES[kind].block_bytes
    if len(blocks_shape) != 3 or blocks_shape[-1] != wanted:
        raise ValueError(f"blocks of {kind} must be (out, blocks, {wanted} bytes), got {blocks_shape}")


def pack_blocks(
    kind: str,
    codes: Tensor,  # uint8 (out, in)
    numbers: Sequence[Tensor],  # (out, groups) each: the scale, and the minimum of types that have one
) -> Tensor:
    """Returns blocks, uint8 (out, groups, bytes).

    The first half of a block's codes are the low halves of its bytes, the second half the high ones. Of 5 bits the
    highest ones stand apart, in four bytes, the first code's in the lowest bit.

    Args:
        kind: a type with blocks of 32 weights.
        codes: of the type's grid, all with the zero point ``2^(bits-1)`` where it is symmetric.
        numbers: that float16 holds.
    """
    bits, groups = GGUF_TYPES[kind].bits, codes.unflatten(1, (-1, GROUP))
    parts = [as_bytes(number) for number in numbers]
    if bits == 8:
        parts.append(groups ^ MIDDLE)  # as a signed byte it is q - 128
    else:
        if bits == 5:
            parts.append(pack_planes(groups >> 4, 1, 1))
        parts.append(pack_planes(groups, 4, HALF))
    return torch.cat(parts, -1)


def unpack_blocks(kind: str, blocks: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Returns the codes, uint8 (out, in), and the numbers, float16 (out, groups) each, of :func:`pack_blocks`.

    Args:
        kind: a type with blocks of 32 weights.
        blocks: uint8 (out, groups, bytes).

    Raises:
        ValueError: a block of the type has another number of bytes.
    """
    check_blocks(kind, tuple(blocks.shape))
    bits = GGUF_TYPES[kind].bits
    rest = GROUP * bits // 8
    numbers = [as_float16(number) for number in blocks[..., :-rest].split(2, -1)]
    if bits == 8:
        return (blocks[..., -rest:] ^ MIDDLE).flatten(1), numbers
    codes = unpack_planes(blocks[..., -HALF:], 4, HALF)
    if bits == 5:
        codes |= unpack_planes(blocks[..., -rest:-HALF], 1, 1) << 4
    return codes.flatten(1), numbers
