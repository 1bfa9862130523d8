"""Checkpoints in fp8 and int8, of any weights, with what they stand for: written by their own libraries where possible.

The values come from those libraries, or from loops over blocks that share nothing with the package.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

FP8 = torch.float8_e4m3fn
LARGEST = torch.finfo(FP8).max
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}


class Stored(NamedTuple):
    """A weight as it is in a checkpoint, by the ends of its tensors' names after "weight", and its values."""

    tensors: dict[str, Tensor]
    values: Tensor  # bfloat16


class Kind(NamedTuple):
    """A way to store weights.

    Attributes:
        header: of config.json; of hf_quant_config.json where it has "producer".
        store: a weight.
        others: ends of names of tensors that are no weight's, which stand beside each weight.
    """

    header: dict[str, Any]
    store: Callable[[Tensor], Stored]
    others: tuple[str, ...] = ()


def blocks(weight: Tensor, rows: int, columns: int, end: str, scale_shape: tuple[int, ...] | None = None) -> Stored:
    """Codes in fp8, block by block."""
    height, width = weight.shape
    scale = torch.empty(math.ceil(height / rows), math.ceil(width / columns))
    codes, values = torch.empty(height, width, dtype=FP8), torch.empty(height, width)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            part = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[part].abs().max().float() / LARGEST
            codes[part] = (weight[part].float() / scale[i, j]).clamp(-LARGEST, LARGEST).to(FP8)
            values[part] = codes[part].float() * scale[i, j]
    scale = scale if scale_shape is None else scale.reshape(scale_shape)
    return Stored({"": codes, end: scale}, values.to(torch.bfloat16))


def whole(weight: Tensor, end: str = "_scale", scale_shape: tuple[int, ...] = ()) -> Stored:
    return blocks(weight, len(weight), weight.shape[1], end, scale_shape)


def rows(weight: Tensor, scale_shape: tuple[int, ...]) -> Stored:
    return blocks(weight, 1, weight.shape[1], "_scale", scale_shape)


def compressed_tensors(format: str, scale_dtype: torch.dtype = torch.bfloat16, **weights: Any) -> Kind:
    """By the library of that name."""
    header = {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": weights, "input_activations": ACTIVATIONS},
            "group_1": {"targets": ["re:.*attn$"], "weights": None, "input_activations": ACTIVATIONS},
        },
        "ignore": ["lm_head"],
        "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False},
        "sparsity_config": {},
        "transform_config": {},
    }

    def store(weight: Tensor) -> Stored:
        pytest.importorskip("compressed_tensors", minversion="0.15")  # has compressors without instances
        from compressed_tensors.compressors import BaseCompressor
        from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
        from compressed_tensors.quantization.lifecycle.forward import dequantize

        args = QuantizationArgs(**weights)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        scale, zero_point = ranges(weight.to(scale_dtype), args)
        state = {"weight": weight, "weight_scale": scale, "weight_zero_point": zero_point}
        compressor: Any = BaseCompressor.get_value_from_registry(format)
        found = compressor.compress(state, scheme)
        # As decompress does from 0.20 on; before, it took short blocks for small ones.
        values = dequantize(found["weight"], scale, found.get("weight_zero_point"), args)
        return Stored({name.removeprefix("weight"): tensor for name, tensor in found.items()}, values.bfloat16())

    return Kind(header, store, ("input_scale", "k_scale"))


def ranges(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Scales and zero points as compressed-tensors computes them from the smallest and largest weights."""
    from compressed_tensors.quantization.utils import calculate_qparams

    height, width = {
        "tensor": tuple(weight.shape),
        "channel": (1, weight.shape[1]),
        "group": (1, args.group_size),
        "block": tuple(args.block_structure or ()),
    }[args.strategy]
    parts = [part.split(width, 1) for part in weight.split(height, 0)]
    low = torch.stack([torch.stack([part.min() for part in line]) for line in parts])
    high = torch.stack([torch.stack([part.max() for part in line]) for line in parts])
    scale, zero_point = calculate_qparams(low, high, args)
    return (scale.reshape(1), zero_point.reshape(1)) if args.strategy == "tensor" else (scale, zero_point)


FLOAT, INT = {"num_bits": 8, "type": "float"}, {"num_bits": 8, "type": "int"}
QUARK = {"dtype": "fp8_e4m3", "is_dynamic": False, "qscheme": "per_tensor", "symmetric": None}
KINDS: Mapping[str, Kind] = {
    "fp8-blocks": Kind(
        {"quant_method": "fp8", "weight_block_size": [24, 16], "activation_scheme": "dynamic", "fmt": "e4m3"},
        lambda weight: blocks(weight, 24, 16, "_scale_inv"),
    ),
    "fp8-tensor": Kind(
        {"quant_method": "fp8", "activation_scheme": "static", "ignored_layers": ["lm_head"]},
        whole,
        ("input_scale", "kv_scale"),
    ),
    "fp8-tensor-inverse": Kind(
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        lambda weight: whole(weight, "_scale_inv"),
        ("activation_scale",),
    ),
    "fbgemm": Kind(
        {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]},
        lambda weight: rows(weight, (len(weight), 1)),
        ("input_scale_ub",),
    ),
    "modelopt": Kind(
        {
            "quant_method": "modelopt",
            "quant_algo": "FP8",
            "config_groups": {"group_0": {"weights": FLOAT, "input_activations": FLOAT, "targets": ["Linear"]}},
            "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
            "ignore": ["lm_head"],
        },
        whole,
        ("input_scale", "k_scale", "v_scale"),
    ),
    "modelopt-file": Kind(
        {
            "producer": {"name": "modelopt", "version": "0.19.0"},
            "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]},
        },
        whole,
        ("input_scale", "k_scale", "v_scale"),
    ),
    "modelopt-rows": Kind(
        {"quant_method": "modelopt", "quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
        lambda weight: rows(weight, (len(weight),)),
    ),
    "quark": Kind(
        {
            "quant_method": "quark",
            "global_quant_config": {"weight": QUARK, "input_tensors": QUARK, "output_tensors": None, "bias": None},
            "layer_quant_config": {"*k_proj": {"weight": QUARK, "input_tensors": QUARK, "output_tensors": QUARK}},
            "layer_type_quant_config": {},
            "exclude": ["lm_head"],
            "algo_config": None,
            "export": {"kv_cache_group": ["*k_proj"], "pack_method": "reorder", "weight_format": "real_quantized"},
        },
        whole,
        ("input_scale", "output_scale"),
    ),
    "float-tensor": compressed_tensors("float-quantized", **FLOAT, strategy="tensor"),
    "float-rows": compressed_tensors("float-quantized", **FLOAT, strategy="channel"),
    "float-blocks": compressed_tensors(
        "float-quantized", torch.float32, **FLOAT, strategy="block", block_structure=[24, 16]
    ),
    "int-tensor": compressed_tensors("int-quantized", **INT, strategy="tensor"),
    "int-rows": compressed_tensors("int-quantized", torch.float32, **INT, strategy="channel"),
    "int-groups": compressed_tensors("int-quantized", torch.float32, **INT, strategy="group", group_size=16),
    "int-asymmetric": compressed_tensors("int-quantized", **INT, strategy="group", group_size=16, symmetric=False),
    "int-asymmetric-rows": compressed_tensors("int-quantized", **INT, strategy="channel", symmetric=False),
    "naive": compressed_tensors("naive-quantized", torch.float32, **FLOAT, strategy="channel"),
}
