"""Layers on grids of 4-bit floats, as compressed-tensors stores them: nvfp4-pack-quantized and mxfp4-pack-quantized."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.model.tensor_files import Header
from opt8bit.quant.described import described
from opt8bit.quant.float4 import E4M3_LEAST, E4M3_MOST, Float4Grid, MXFP4Grid, NVFP4Grid, pack_e2m1
from opt8bit.quant.grid import Grid
from opt8bit.quant.weight import QuantizedWeight

NAMES: Mapping[type[Grid], str] = {NVFP4Grid: "nvfp4", MXFP4Grid: "mxfp4"}
GLOBAL_SCALE = "weight_global_scale"
EXPONENT_BIAS = 127  # of e8m0


def is_float4(grid: Grid) -> TypeGuard[Float4Grid]:
    """Tells whether a grid is one of 4-bit floats itself. A subclass may fit or decode otherwise."""
    return type(grid) in NAMES


def check_float4(name: str, planned: Planned) -> None:
    """Checks that compressed-tensors holds a layer on a grid of 4-bit floats.

    Raises:
        ValueError: it does not. The message names the layer, and what is allowed.
    """
    module, scheme = planned.module, planned.scheme
    assert is_float4(scheme.grid)
    kind = NAMES[type(scheme.grid)]
    if scheme.group_size != scheme.grid.group_size:
        raise ValueError(f"{name}: {kind} has groups of {scheme.grid.group_size} weights, got {scheme.group_size}")
    if type(module) is not nn.Linear:
        raise ValueError(f"{name}: {kind} is read in nn.Linear alone, got {type(module).__name__}: use format 'dense'")
    of_method = described(planned.method.grids(scheme)) != described((scheme.grid,))
    if of_method or planned.method.keeps_outliers:
        raise ValueError(f"{name}: {kind} has no place for what {planned.method} keeps beside: use format 'dense'")


def float4_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Returns the tensors that are a weight on a grid of 4-bit floats.

    ``weight_packed``, uint8 (out, in / 2), has the codes. ``weight_scale``, (out, groups), is float8 (e4m3) for NVFP4,
    divided by ``weight_global_scale``, float32 (1,), and for MXFP4 an exponent with 127 added, uint8.
    """
    (part,) = weight.parts
    scale = part.params.scale
    packed = {"weight_packed": pack_e2m1(part.codes)}
    if type(part.grid) is MXFP4Grid:
        exponent = scale.frexp().exponent - 1 + EXPONENT_BIAS
        return {**packed, "weight_scale": exponent.to(torch.uint8)}
    unit = part.params.unit.amax()
    stored = (scale / unit).clamp(E4M3_LEAST, E4M3_MOST).to(torch.float8_e4m3fn)
    return {**packed, "weight_scale": stored, GLOBAL_SCALE: (1 / unit).to(torch.float32).reshape(1)}


def float4_scheme(grid: Float4Grid) -> dict[str, Any]:
    """Returns what the header says of weights on a grid of 4-bit floats."""
    is_nvfp4 = type(grid) is NVFP4Grid
    dtype = "torch.float8_e4m3fn" if is_nvfp4 else "torch.uint8"
    return {
        "num_bits": 4,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
        "actorder": None,
        "strategy": "tensor_group" if is_nvfp4 else "group",
        "group_size": grid.group_size,
        "scale_dtype": dtype,
        "zp_dtype": dtype,
    }


def float4_format(grid: Float4Grid) -> str:
    """Returns compressed-tensors' name for weights on a grid of 4-bit floats."""
    return f"{NAMES[type(grid)]}-pack-quantized"


def float4_shape(parts: Mapping[str, Header]) -> tuple[int, int] | None:
    """Returns the shape (out, in) of a weight on a grid of 4-bit floats, or None where the tensors are another's."""
    packed = parts["weight_packed"]
    return (packed.shape[0], 2 * packed.shape[1]) if packed.dtype == "U8" else None


def float4_name(parts: Mapping[str, Header]) -> str:
    """Returns the name of the grid of a stored weight that has a :func:`float4_shape`."""
    return NAMES[NVFP4Grid if GLOBAL_SCALE in parts else MXFP4Grid]
