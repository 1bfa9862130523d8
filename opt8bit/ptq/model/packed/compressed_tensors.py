"""The layout ``pack-quantized`` of compressed-tensors, as llm-compressor and others write it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of
from opt8bit.ptq.model.quantization_header import refuse_transforms, weight_groups
from opt8bit.quant.packing import unpack, words_of

FORMAT = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensorsLayout(Layout):
    """Stores the codes of an output as a row of words.

    ``weight_packed``, int32, has the codes, ``weight_scale`` is (out, groups), ``weight_zero_point``, where there is
    one, int32 packed along the outputs, or int8 (out, groups); ``weight_shape`` is (out, in), ``weight_g_idx`` (in,)
    names each input's group. Codes, and packed zero points, are stored with ``2^(bits - 1)`` added.

    Attributes:
        groups: of the header, those with weights in this format.
    """

    groups: tuple[Mapping[str, Any], ...]
    codes: ClassVar[str] = "weight_packed"
    others: ClassVar[tuple[str, ...]] = ("weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx")

    @staticmethod
    def of(header: Mapping[str, Any]) -> CompressedTensorsLayout:
        """Returns the layout that a header is of.

        Raises:
            ValueError: it is of another one.
        """
        refuse_transforms(header)
        found = []
        for group, layout in weight_groups(header):
            weights = group["weights"]
            if layout != FORMAT or weights.get("type", "int") != "int":
                kind = f"{layout}, of type {weights.get('type', 'int')}"
                raise ValueError(f"packed weights of compressed-tensors must be {FORMAT} and integers, got {kind}")
            found.append(group)
        return CompressedTensorsLayout(tuple(found))

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        words, scale, shape = (part_of(parts, name) for name in ("weight_packed", "weight_scale", "weight_shape"))
        outputs, columns = shape.tolist()
        weights = self.weights_of(layer)
        bits = bits_of(weights)
        whole = has_whole_codes(words.shape[1], bits, columns)
        codes = unpack(words, bits, columns, whole_codes=whole)
        if len(codes) != outputs:
            raise ValueError(f"weight_packed {tuple(words.shape)} does not fit a weight of {outputs} × {columns}")
        scale = scale.reshape(-1, scale.shape[-1]) if scale.dim() > 1 else scale.reshape(-1, 1)
        scale = scale.expand(outputs, -1)  # of a whole tensor there is one
        group = parts.get("weight_g_idx")
        if group is None or bool((group < 0).any()):  # -1 stands for a group that is not named
            size = weights.get("group_size") or -1
            group = groups_of_columns(columns, scale.shape[1], size if size > 0 else None)
        zero_point = _zero_point(parts.get("weight_zero_point"), bits, scale.shape, whole)
        return Unpacked(codes, scale, zero_point, group, bits)

    def weights_of(self, layer: str) -> Mapping[str, Any]:
        """Returns what the header says of a layer's weight: by its name first, else by its class.

        Raises:
            ValueError: several groups may be meant.
        """
        named = [group for group in self.groups if any(_is_meant(target, layer) for target in group["targets"])]
        classes = [group for group in self.groups if any(_is_class(target) for target in group["targets"])]
        found = named or classes
        if len(found) != 1:
            raise ValueError(f"{len(found)} groups of the header name {layer}, one was expected")
        return found[0]["weights"]


def _is_class(target: str) -> bool:
    return not target.startswith("re:") and "." not in target


def _is_meant(target: str, layer: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), layer) is not None
    return target == layer


def bits_of(weights: Mapping[str, Any]) -> int:
    """Returns the bits of a code that a group of the header has."""
    return int(weights.get("num_bits", 8))


def has_whole_codes(words: int, bits: int, count: int) -> bool:
    """Tells by the number of words of a row whether each holds whole codes only.

    That is how versions before 0.18 of the package pack; since then codes stand bit to bit. Where both take the same
    number of words, which for multiples of 32 codes they do only if they are the same, codes stand bit to bit.
    """
    return words == words_of(count, bits, whole_codes=True) != words_of(count, bits)


def _zero_point(stored: Tensor | None, bits: int, shape: torch.Size, whole_codes: bool) -> Tensor:
    """Returns zero points as codes are counted, int32 (out, groups)."""
    middle = 2 ** (bits - 1)
    if stored is None:
        return torch.full(shape, middle, dtype=torch.int32)
    if stored.dtype == torch.int32 and stored.shape != shape:
        return unpack(stored.T.contiguous(), bits, shape[0], whole_codes=whole_codes).T.to(torch.int32)
    return stored.reshape(-1, shape[1]).expand(shape).to(torch.int32) + middle
