"""The format ``pack-quantized`` of compressed-tensors, which vLLM, SGLang and transformers load."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.layout import Layout, Planned
from opt8bit.ptq.export.uniform import check_uniform, scheme_of, uniform_grid, uniform_part
from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.result import Result
from opt8bit.ptq.saved import saved_layer
from opt8bit.quant.grid import UniformGrid
from opt8bit.quant.packing import pack
from opt8bit.quant.weight import WeightScheme

# Types of models that transformers 5 initializes before their weights come, and so needs them as the model has them.
INITIALIZED = ("gpt_bigcode", "recurrent_gemma")


class CompressedTensors(Layout):
    """Integers of 2 to 8 bits, symmetric or not, by group or by row.

    ``weight_packed``, int32 (out, ceil(in * bits / 32)), has the codes; ``weight_scale`` (out, groups) is of the
    model's dtype; ``weight_zero_point``, int32 (ceil(out * bits / 32), groups), is there where the grid is not
    symmetric; ``weight_shape`` is (out, in). A weight is ``(code - zero_point) * weight_scale``.
    """

    def check(self, layers: Mapping[str, Planned], left: Sequence[str]) -> None:
        grids = {name: check_uniform("compressed-tensors", name, planned) for name, planned in layers.items()}
        schemes = {repr(sorted(_scheme(planned.scheme).items(), key=str)) for planned in layers.values()}
        if len(schemes) > 1 and _brought_back({planned.module for planned in layers.values()}, grids.values()):
            raise ValueError(
                "transformers loads compressed-tensors of several widths or group sizes where all grids are symmetric "
                "and all layers nn.Linear themselves: use symmetric grids, or format 'dense'"
            )

    def weight(self, layer: Compressed, module: nn.Module) -> dict[str, Tensor]:
        part, grid = uniform_part(layer.rounded)
        tensors = {
            "weight_packed": pack(part.codes, grid.bits),
            "weight_scale": part.params.scale.to(layer.dtype),
            "weight_shape": torch.tensor(part.codes.shape, device="cpu"),
        }
        if not grid.symmetric:
            tensors["weight_zero_point"] = pack(part.params.zero_point.T.to(torch.int64), grid.bits).T
        return tensors

    def config(self, result: Result) -> dict[str, Any]:
        modules = dict(result.model.named_modules())
        schemes: list[dict[str, Any]] = []
        targets: list[list[str]] = []  # names, by scheme
        for name in sorted(result.layers):
            scheme = _scheme(scheme_of(result, name))
            if scheme not in schemes:
                schemes.append(scheme)
                targets.append([])
            targets[schemes.index(scheme)] += _names(result.model, name)
        classes = sorted({type(modules[name]).__name__ for name in result.layers} | {"Linear"})
        if len(schemes) == 1:
            targets = [classes]
        linear = [name for name, module in modules.items() if isinstance(module, nn.Linear)]
        grids = (uniform_grid(scheme_of(result, name)) for name in result.layers)
        model: Any = result.model
        brought_back = _brought_back((modules[name] for name in result.layers), grids)
        return {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {
                f"group_{i}": {
                    "targets": target,
                    "weights": scheme,
                    "input_activations": None,
                    "output_activations": None,
                    "format": "pack-quantized",
                }
                for i, (scheme, target) in enumerate(zip(schemes, targets, strict=True))
            },
            "ignore": [each for name in linear if name not in result.layers for each in _names(result.model, name)],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
            **({"dequantize": True} if brought_back or model.config.model_type in INITIALIZED else {}),
        }


def _names(model: nn.Module, name: str) -> list[str]:
    """A layer's in the model and in the checkpoint: which of them is read differs among transformers and servers."""
    return list(dict.fromkeys([name, saved_layer(model, name)]))


def _brought_back(modules: Iterable[nn.Module], grids: Iterable[UniformGrid]) -> bool:
    """Whether transformers must be told to dequantize on loading: it runs plain nn.Linear and symmetric grids alone."""
    return not all(type(module) is nn.Linear for module in modules) or not all(grid.symmetric for grid in grids)


def _scheme(scheme: WeightScheme) -> dict[str, Any]:
    grid = uniform_grid(scheme)
    by_group = {"strategy": "group", "group_size": scheme.group_size}
    return {
        "num_bits": grid.bits,
        "type": "int",
        "symmetric": grid.symmetric,
        "dynamic": False,
        "actorder": None,
        **(by_group if scheme.group_size else {"strategy": "channel", "group_size": None}),
    }
