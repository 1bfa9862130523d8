"""The layout of GPTQ's checkpoints, as AutoGPTQ, GPTQModel and AutoRound write it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from opt8bit.ptq.model.packed.layout import Layout, Unpacked, groups_of_columns, part_of
from opt8bit.quant.packing import WORD, unpack

ZERO_SHIFTS = {"gptq": 1, "gptq_v2": 0}  # by the header's word: version 1 stores zero points less one


@dataclass(frozen=True)
class GPTQLayout(Layout):
    """Stores the codes of an output as a column of words.

    ``qweight``, int32 (in * bits / 32, out), has the codes, ``qzeros``, int32 (groups, out * bits / 32), the zero
    points, ``scales`` are (groups, out), and ``g_idx``, int32 (in,), names each input's group.

    Attributes:
        zero_shift: what is to be added to stored zero points.
    """

    zero_shift: int
    codes: ClassVar[str] = "qweight"
    others: ClassVar[tuple[str, ...]] = ("qzeros", "scales", "g_idx")

    @staticmethod
    def of(header: Mapping[str, Any]) -> GPTQLayout:
        """Returns the layout that a header is of.

        Raises:
            ValueError: it is of another one.
        """
        name = header.get("checkpoint_format") or header.get("format") or "gptq"
        if name not in ZERO_SHIFTS or header.get("is_marlin_format"):
            name = "marlin" if header.get("is_marlin_format") else name
            raise ValueError(f"GPTQ's checkpoint_format must be one of {', '.join(ZERO_SHIFTS)}, got {name!r}")
        return GPTQLayout(ZERO_SHIFTS[name])

    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        words, zeros, scale = (part_of(parts, name) for name in ("qweight", "qzeros", "scales"))
        groups, outputs = scale.shape
        bits = _bits(zeros, outputs)  # which may differ from layer to layer
        columns, rest = divmod(WORD * len(words), bits)
        if rest:
            raise ValueError(f"qweight {tuple(words.shape)} does not fit {bits} bits")
        group = parts.get("g_idx")
        if group is None or not group.numel():
            group = groups_of_columns(columns, groups)
        codes = unpack(words.T.contiguous(), bits, columns)
        zero_point = unpack(zeros, bits, outputs).int() + self.zero_shift
        return Unpacked(codes, scale.T, zero_point.T, group, bits)


def _bits(zeros: Tensor, outputs: int) -> int:
    """
    Raises:
        ValueError: the zero points of that many outputs are not of a whole number of bits.
    """
    bits, rest = divmod(WORD * zeros.shape[1], outputs)
    if rest or not 1 <= bits <= 8:
        raise ValueError(f"qzeros {tuple(zeros.shape)} do not fit {outputs} outputs")
    return bits
