"""The layout of llama.cpp's files: blocks of one of ggml's types."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.model.gguf.blocks import unpack_blocks
from opt8bit.ptq.model.gguf.grids import NON_LINEAR
from opt8bit.ptq.model.gguf.reading import BLOCKS, TYPE, package, type_named
from opt8bit.ptq.model.gguf.superblocks import LAYOUTS, unpack_superblocks
from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of
from opt8bit.recipe.gguf_types import GGUF_TYPES

MIDDLE = 128  # of codes that stand for the values of IQ4_NL


class GGUFLayout(Layout):
    """Scales and codes of each group stand together: ``blocks``, uint8 (out, blocks, bytes), of a ``type``."""

    codes: ClassVar[str] = BLOCKS
    others: ClassVar[tuple[str, ...]] = (TYPE,)

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        """Returns the weight of a layer; a zero point may be no integer. Codes of IQ4_NL are those of its values."""
        codes, scale, zero_point = _unpacked(type_named(part_of(parts, TYPE)), part_of(parts, BLOCKS))
        return Unpacked(codes, scale, zero_point, groups_of_columns(codes.shape[1], scale.shape[1]))

    def weight(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight as the package gguf decodes it, which knows nothing of how it is packed here."""
        blocks, gguf = part_of(parts, BLOCKS), package()
        kind = gguf.GGMLQuantizationType[type_named(part_of(parts, TYPE))]
        return torch.from_numpy(gguf.quants.dequantize(blocks.flatten(1).numpy(), kind))


def _unpacked(kind: str, blocks: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns codes (out, in), and scales and zero points, (out, groups)."""
    if kind in LAYOUTS:
        codes, params = unpack_superblocks(kind, blocks)
        scale, offset = params.super_scale * params.sub_scale, params.super_minimum * params.sub_minimum
        return codes, scale, _steps(offset, scale)
    codes, (scale, *minimum) = unpack_blocks(kind, blocks)
    if minimum:
        return codes, scale, _steps(-minimum[0].float(), scale.float())
    if kind == "IQ4_NL":
        values = torch.tensor(NON_LINEAR) + MIDDLE
        return values.to(torch.uint8)[codes.long()], scale, torch.full(scale.shape, MIDDLE)
    return codes, scale, torch.full(scale.shape, 2 ** (GGUF_TYPES[kind].bits - 1))


def _steps(offset: Tensor, scale: Tensor) -> Tensor:
    """Returns how many steps an offset is; 0 where there are no steps."""
    return torch.where(scale == 0, 0, offset / scale)
