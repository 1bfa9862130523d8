"""The layout of llama.cpp's files: blocks that hold a symmetric grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.blocks import TYPES, bits_of, unpack_blocks
from opt8bit.ptq.model.gguf.reading import BLOCKS, package
from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of


class GGUFLayout(Layout):
    """Scale and codes of each group stand together: ``blocks``, uint8 (out, groups, bytes)."""

    codes: ClassVar[str] = BLOCKS
    others: ClassVar[tuple[str, ...]] = ()

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        blocks = part_of(parts, BLOCKS)
        codes, scale = unpack_blocks(blocks)
        zero_point = torch.full(scale.shape, 2 ** (bits_of(tuple(blocks.shape)) - 1))
        return Unpacked(codes, scale, zero_point, groups_of_columns(codes.shape[1], scale.shape[1]))

    def weight(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight as the package gguf decodes it, which knows nothing of how it is packed here."""
        blocks, gguf = part_of(parts, BLOCKS), package()
        kind = gguf.GGMLQuantizationType[TYPES[bits_of(tuple(blocks.shape))]]
        return torch.from_numpy(gguf.quants.dequantize(blocks.flatten(1).numpy(), kind))
