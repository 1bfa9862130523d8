"""The format of GPTQ's checkpoints (version 1), as AutoGPTQ and GPTQModel write it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.layout import Layout
from opt8bit.ptq.export.uniform import check_uniform, uniform_grid
from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.result import Result
from opt8bit.quant.packing import pack

BITS = (4, 8)


class GPTQFormat(Layout):
    """Symmetric integers of 4 or 8 bits, by group or by row, one scheme for all layers: what servers still take.

    ``qweight``, int32 (in * bits / 32, out), has the codes of an output in a column; ``qzeros``, int32
    (groups, out * bits / 32), the zero points less one; ``scales`` (groups, out) are float16, or of the model's dtype
    where that is bfloat16 or float32; ``g_idx``, int32 (in,), names each input's group.
    """

    def check(self, layer: Compressed, module: nn.Module) -> None:
        check_uniform("gptq", layer, module)
        grid = uniform_grid(layer.rounded)
        if grid.bits not in BITS or not grid.symmetric:
            kind = "symmetric" if grid.symmetric else "asymmetric"
            raise ValueError(
                f"gptq is served at 4 and 8 bits, symmetric, got {grid.bits} bits, {kind}: use compressed-tensors"
            )
        rows, columns = layer.rounded.codes.shape
        if rows * grid.bits % 32 or columns * grid.bits % 32:
            raise ValueError(f"gptq packs whole words of 32 bits, got {rows} outputs and {columns} inputs: use dense")

    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        rounded = layer.rounded
        bits = uniform_grid(rounded).bits
        zeros = rounded.scales.zero_point.T.to(torch.uint8) - 1
        columns, groups = rounded.codes.shape[1], rounded.scales.scale.shape[1]
        return {
            "qweight": pack(rounded.codes, bits).T,
            "qzeros": pack(zeros, bits),
            "scales": rounded.scales.scale.T.to(layer.dtype),
            "g_idx": torch.arange(columns, dtype=torch.int32) // (columns // groups),
        }

    def config(self, result: Result) -> dict[str, Any]:
        formats = {(uniform_grid(layer.rounded).bits, layer.rounded.format.group_size) for layer in result.layers.values()}
        if len(formats) > 1:
            raise ValueError(f"gptq has one width and one group size for all layers, got {sorted(map(str, formats))}")
        bits, group_size = formats.pop()
        return {
            "quant_method": "gptq",
            "bits": bits,
            "group_size": group_size or -1,
            "sym": True,
            "desc_act": False,
            "checkpoint_format": "gptq",
            "lm_head": False,
        }
