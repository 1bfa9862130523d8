"""Superblocks of GGUF files: 256 codes, the scales and minima of their blocks in a few bits, and one or two in float16.

The layouts are those of ggml's ``ggml-common.h`` and ``ggml-quants.c``: ``block_q2_K`` to ``block_q6_K``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.blocks import check_blocks
from opt8bit.ptq.model.gguf.planes import as_bytes, as_float16, pack_planes, unpack_planes
from opt8bit.quant.superblocks import SuperblockParams
from opt8bit.recipe.gguf_types import GGUF_TYPES

SIZE = 256  # weights of a superblock
RUN = 32  # of bytes with codes


@dataclass
class Fields:
    """Holds what superblocks (out, superblocks) say.

    Attributes:
        codes: uint8 (out, superblocks, 256).
        scales, minima: of blocks, uint8 (out, superblocks, blocks); signed scales are shifted to be from 0.
        super_scale, super_minimum: (out, superblocks).
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    super_scale: Tensor
    super_minimum: Tensor


@dataclass(frozen=True)
class Piece:
    """Bytes of a superblock.

    Attributes:
        bytes: how many there are.
        pack: returns them, uint8 (out, superblocks, bytes), of a superblock's fields.
        unpack: puts what they say into the fields.
    """

    bytes: int
    pack: Callable[[Fields], Tensor]
    unpack: Callable[[Tensor, Fields], None]


def _codes(bits: int, above: int = 0, run: int = RUN) -> Piece:
    """Returns the piece with some bits of the codes, those above the lowest ``above``."""

    def unpack(packed: Tensor, fields: Fields) -> None:
        fields.codes |= unpack_planes(packed, bits, run) << above

    return Piece(SIZE * bits // 8, lambda fields: pack_planes(fields.codes >> above, bits, run), unpack)


def _unpack_super_scale(packed: Tensor, fields: Fields) -> None:
    fields.super_scale = as_float16(packed)


def _unpack_super_minimum(packed: Tensor, fields: Fields) -> None:
    fields.super_minimum = as_float16(packed)


def _pack_nibbles(fields: Fields) -> Tensor:
    return pack_planes(torch.cat([fields.scales, fields.minima], -1), 4, 16)


def _unpack_nibbles(packed: Tensor, fields: Fields) -> None:
    fields.scales, fields.minima = unpack_planes(packed, 4, 16).chunk(2, -1)


def _pack_six(fields: Fields) -> Tensor:
    """Returns 16 scales of 6 bits: the low four of all, and then the high two."""
    return torch.cat([pack_planes(fields.scales, 4, 8), pack_planes(fields.scales >> 4, 2, 4)], -1)


def _unpack_six(packed: Tensor, fields: Fields) -> None:
    fields.scales = unpack_planes(packed[..., :8], 4, 8) | unpack_planes(packed[..., 8:], 2, 4) << 4


def _pack_six_of_both(fields: Fields) -> Tensor:
    """Returns 8 scales and 8 minima of 6 bits: the first four of each whole, with the high bits of the last four."""
    both = [fields.scales, fields.minima]
    whole = [numbers[..., :4] | (numbers[..., 4:] >> 4) << 6 for numbers in both]
    low = [numbers[..., 4:] for numbers in both]
    return torch.cat([*whole, pack_planes(torch.cat(low, -1), 4, 4)], -1)


def _unpack_six_of_both(packed: Tensor, fields: Fields) -> None:
    whole, low = packed[..., :8].chunk(2, -1), unpack_planes(packed[..., 8:], 4, 4).chunk(2, -1)
    pairs = zip(whole, low, strict=True)
    fields.scales, fields.minima = (torch.cat([some & 63, rest | (some >> 6) << 4], -1) for some, rest in pairs)


def _unpack_signed(packed: Tensor, fields: Fields) -> None:
    fields.scales = packed ^ 128


_SUPER_SCALE = Piece(2, lambda fields: as_bytes(fields.super_scale), _unpack_super_scale)
_SUPER_MINIMUM = Piece(2, lambda fields: as_bytes(fields.super_minimum), _unpack_super_minimum)
_NIBBLES = Piece(16, _pack_nibbles, _unpack_nibbles)
_SIX = Piece(12, _pack_six, _unpack_six)
_SIX_OF_BOTH = Piece(12, _pack_six_of_both, _unpack_six_of_both)
_SIGNED = Piece(16, lambda fields: fields.scales ^ 128, _unpack_signed)
LAYOUTS: Mapping[str, tuple[Piece, ...]] = {  # in the order in which they are stored
    "Q2_K": (_NIBBLES, _codes(2), _SUPER_SCALE, _SUPER_MINIMUM),
    "Q3_K": (_codes(1, above=2), _codes(2), _SIX, _SUPER_SCALE),
    "Q4_K": (_SUPER_SCALE, _SUPER_MINIMUM, _SIX_OF_BOTH, _codes(4)),
    "Q5_K": (_SUPER_SCALE, _SUPER_MINIMUM, _SIX_OF_BOTH, _codes(1, above=4), _codes(4)),
    "Q6_K": (_codes(4, run=64), _codes(2, above=4), _SIGNED, _SUPER_SCALE),
}
_BELOW = {"Q3_K": 32, "Q6_K": 128}  # what signed scales are shifted by


def pack_superblocks(
    kind: str,
    codes: Tensor,  # uint8 (out, in)
    params: SuperblockParams,  # (out, groups)
) -> Tensor:
    """Returns superblocks, uint8 (out, superblocks, bytes), of a type of :data:`LAYOUTS`."""
    groups = SIZE // GGUF_TYPES[kind].group_size
    subs = [params.sub_scale + _BELOW.get(kind, 0)]
    if kind not in _BELOW:
        subs.append(params.sub_minimum)
    scales, *minima = (sub.to(torch.uint8).unflatten(1, (-1, groups)) for sub in subs)
    supers = (number[:, ::groups] for number in (params.super_scale, params.super_minimum))
    fields = Fields(codes.unflatten(1, (-1, SIZE)), scales, *(minima or [scales]), *supers)
    return torch.cat([piece.pack(fields) for piece in LAYOUTS[kind]], -1)


def unpack_superblocks(kind: str, blocks: Tensor) -> tuple[Tensor, SuperblockParams]:
    """Returns the codes, uint8 (out, in), and the params, float32 (out, groups), of :func:`pack_superblocks`.

    Args:
        kind: one of :data:`LAYOUTS`.
        blocks: uint8 (out, superblocks, bytes).

    Raises:
        ValueError: a superblock of the type has another number of bytes.
    """
    check_blocks(kind, tuple(blocks.shape))
    layout, groups = LAYOUTS[kind], SIZE // GGUF_TYPES[kind].group_size
    none = blocks.new_zeros(*blocks.shape[:2], 1)
    fields = Fields(none.repeat(1, 1, SIZE), none, none, none[..., 0], none[..., 0])
    for piece, packed in zip(layout, blocks.split([piece.bytes for piece in layout], -1), strict=True):
        piece.unpack(packed, fields)
    sub_scale = fields.scales.flatten(1).float() - _BELOW.get(kind, 0)
    super_scale = fields.super_scale.float().repeat_interleave(groups, 1)
    if kind in _BELOW:  # see SuperblockGrid: the code in the middle stands for 0
        middle = 2 ** (GGUF_TYPES[kind].bits - 1)
        return fields.codes.flatten(1), SuperblockParams(super_scale, sub_scale, super_scale, middle * sub_scale)
    super_minimum = fields.super_minimum.float().repeat_interleave(groups, 1)
    return fields.codes.flatten(1), SuperblockParams(
        super_scale, sub_scale, super_minimum, fields.minima.flatten(1).float()
    )
