"""The format of GPTQ's checkpoints (version 1), as AutoGPTQ and GPTQModel write it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.export.uniform import check_uniform, kind_of, scheme_of, stored_part, uniform_grid
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.ptq.result import Result
from opt8bit.quant.packing import WORD, pack
from opt8bit.quant.weight import QuantizedWeight

BITS = (4, 8)


class GPTQFormat(HuggingFaceFormat):
    """Writes symmetric integers of 4 or 8 bits, by group or row, in one scheme for all layers: what servers still take.

    ``qweight``, int32 (in * bits / 32, out), has the codes of an output in a column; ``qzeros``, int32
    (groups, out * bits / 32), the zero points less one; ``scales`` (groups, out) are of the
    model's dtype, negative where the grid is mirrored; ``g_idx``, int32 (in,), names each input's group.
    """

    parts = ("qweight", "qzeros", "scales", "g_idx")
    is_packed = True
    is_symmetric = True
    decoded_in = torch.float16  # by GPTQModel

    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        for name, planned in layers.items():
            grid = check_uniform("gptq", name, planned)
            if grid.bits not in BITS or not grid.symmetric:
                kind = "symmetric" if grid.symmetric else "asymmetric"
                raise ValueError(
                    f"{name}: gptq is served at 4 and 8 bits, symmetric, got {grid.bits} bits, {kind}: "
                    "use format 'compressed-tensors'"
                )
            shape = tuple(matrix(planned.module).shape)
            if any(length * grid.bits % WORD for length in shape):
                raise ValueError(
                    f"{name}: gptq packs whole words of {WORD} bits, got shape {shape}: use format 'compressed-tensors'"
                )
        if left:
            raise ValueError(f"{left[0]}: gptq has no word for layers that stay as they are: use format 'dense'")
        schemes = {(uniform_grid(planned.scheme).bits, planned.scheme.group_size) for planned in layers.values()}
        if len(schemes) > 1:
            raise ValueError("gptq has one width and one group size for all layers: use format 'compressed-tensors'")

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        part, grid = stored_part(weight)
        bits = grid.bits
        zeros = part.params.zero_point.T.to(torch.uint8) - 1
        columns, groups = part.codes.shape[1], part.params.scale.shape[1]
        return {
            "qweight": pack(part.codes, bits).T,
            "qzeros": pack(zeros, bits),
            "scales": part.params.scale.T.to(matrix(module).dtype),
            "g_idx": torch.arange(columns, dtype=torch.int32, device="cpu") // (columns // groups),
        }

    def quantization(self, result: Result) -> dict[str, Any]:
        scheme = scheme_of(result, result.report[0].name)
        return {
            "quant_method": "gptq",
            "bits": uniform_grid(scheme).bits,
            "group_size": scheme.group_size or -1,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": False,
        }

    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        if "qweight" not in parts:
            return None
        if "g_idx" not in parts:
            raise ValueError("qweight, but no g_idx")
        words, rows = parts["qweight"].shape
        (columns,) = parts["g_idx"].shape
        return (rows, columns), WORD * words // columns

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        return kind_of(read("scales"), symmetric=True) if "scales" in parts else None  # the only ones written here

    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None


FORMAT = GPTQFormat()
