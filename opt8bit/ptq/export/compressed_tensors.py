"""The format ``pack-quantized`` of compressed-tensors, which vLLM, SGLang and transformers load."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.layout import Layout
from opt8bit.ptq.export.uniform import check_uniform, uniform_grid
from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.methods import Format
from opt8bit.ptq.result import Result
from opt8bit.quant.packing import pack


class CompressedTensors(Layout):
    """Integers of 2 to 8 bits, symmetric or not, by group or by row.

    ``weight_packed``, int32 (out, ceil(in * bits / 32)), has the codes; ``weight_scale`` (out, groups) is of the model's
    dtype; ``weight_zero_point``, int32 (ceil(out * bits / 32), groups), is there where the grid is not symmetric;
    ``weight_shape`` is (out, in). A weight is ``(code - zero_point) * weight_scale``.
    """

    def check(self, layer: Compressed, module: nn.Module) -> None:
        check_uniform("compressed-tensors", layer, module)

    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        rounded = layer.rounded
        grid = uniform_grid(rounded)
        tensors = {
            "weight_packed": pack(rounded.codes, grid.bits),
            "weight_scale": rounded.scales.scale.to(layer.dtype),
            "weight_shape": torch.tensor(rounded.codes.shape),
        }
        if not grid.symmetric:
            tensors["weight_zero_point"] = pack(rounded.scales.zero_point.T.to(torch.uint8), grid.bits).T
        return tensors

    def config(self, result: Result) -> dict[str, Any]:
        names = sorted(result.layers)
        formats = [(_scheme(result.layers[name].rounded.format), name) for name in names]
        schemes: list[dict[str, Any]] = []
        for scheme, _ in formats:
            if scheme not in schemes:
                schemes.append(scheme)
        targets = [[name for found, name in formats if found == scheme] for scheme in schemes]
        if len(schemes) == 1:
            targets = [["Linear"]]
        linear = [name for name, module in result.model.named_modules() if isinstance(module, nn.Linear)]
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": group,
                    "weights": scheme,
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
                for i, scheme, group in zip(itertools.count(), schemes, targets)
            },
            "ignore": [name for name in linear if name not in result.layers],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({} if all(scheme["symmetric"] for scheme in schemes) else {"dequantize": True}),
        }


def _scheme(format: Format) -> dict[str, Any]:
    grid = uniform_grid(format)
    by_group = {"strategy": "group", "group_size": format.group_size}
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "dynamic": False,
        "actorder": None,
        **(by_group if format.group_size else {"strategy": "channel", "group_size": None}),
    }
