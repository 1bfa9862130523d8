"""The format of mlx-lm's checkpoints, for Macs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.export.huggingface import HuggingFaceFormat
from opt8bit.ptq.export.uniform import check_uniform, kind_of, scheme_of, stored_part, uniform_grid
from opt8bit.ptq.model.blocks import matrix
from opt8bit.ptq.model.packed.mlx import OTHERS, bits_of
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.ptq.result import Result
from opt8bit.quant.packing import WORD, pack
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import QuantizedWeight

BITS, GROUP_SIZES = (2, 3, 4, 5, 6, 8), (32, 64, 128)


class MLXFormat(HuggingFaceFormat):
    """Symmetric integers by group, of any width in each layer.

    ``weight``, uint32 (out, in * bits / 32), has the codes of an output in a row, bit to bit. ``scales`` and
    ``biases``, (out, groups), are of the model's dtype. A code q stands for ``scale * q + bias``, and the bias is
    ``-2^(bits-1) * scale``, which no dtype rounds. It would round the product of a scale and any other zero point.

    Source: mlx.core.quantize (https://ml-explore.github.io/mlx/build/html/python/_autosummary/mlx.core.quantize.html).
    """

    parts = ("weight", *OTHERS)
    is_packed = True
    runtime = "mlx"
    is_symmetric = True
    is_read_by_transformers = False
    headers = ("quantization", "quantization_config")  # mlx-lm reads the first; by the other the format is told here

    def check(self, model: nn.Module, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        for name, planned in layers.items():
            grid = check_uniform("mlx", name, planned)
            if grid.bits not in BITS or not grid.symmetric:
                kind = "symmetric" if grid.symmetric else "asymmetric"
                raise ValueError(
                    f"{name}: mlx holds symmetric grids of {', '.join(map(str, BITS))} bits, "
                    f"got {grid.bits} bits, {kind}"
                )
            if planned.scheme.group_size not in GROUP_SIZES:
                allowed = ", ".join(map(str, GROUP_SIZES))
                raise ValueError(f"{name}: mlx has groups of {allowed} weights, got {planned.scheme.group_size}")

    def tensors(self, weight: QuantizedWeight, module: nn.Module) -> dict[str, Tensor]:
        part, grid = stored_part(weight)
        scale = part.params.scale.to(matrix(module).dtype)
        words = pack(part.codes, grid.bits).view(torch.uint32)
        return {"weight": words, "scales": scale, "biases": scale * -(2 ** (grid.bits - 1))}

    def quantization(self, result: Result) -> dict[str, Any]:
        schemes = {each.name: scheme_of(result, each.name) for each in result.report}
        kinds = {name: _kind(uniform_grid(scheme), scheme.group_size) for name, scheme in schemes.items()}
        (usual, _), *_ = Counter(kinds.values()).most_common(1)
        others = {name: dict(kind) for name, kind in kinds.items() if kind != usual}
        return {"quant_method": "mlx", "mode": "affine", **dict(usual), **others}

    def shape_and_bits(
        self, parts: Mapping[str, Header], read: Callable[[str], Tensor]
    ) -> tuple[tuple[int, int], int | None] | None:
        if "scales" not in parts or "weight" not in parts:
            return None
        if "biases" not in parts:
            raise ValueError("scales, but no biases")
        bits = bits_of(read("scales"), read("biases"))
        rows, words = parts["weight"].shape
        return (rows, WORD * words // bits), bits

    def grid_of(self, parts: Mapping[str, Header], read: Callable[[str], Tensor]) -> str | None:
        return kind_of(read("scales"), symmetric=True)

    def load_options(self, quantization: Mapping[str, Any] | None) -> dict[str, Any] | None:
        return None


def _kind(grid: UniformGrid, group_size: int | None) -> tuple[tuple[str, int | None], ...]:
    return ("group_size", group_size), ("bits", grid.bits)


FORMAT = MLXFormat()
