"""Checks what packed formats ask of a layer: evenly spaced integers, scales of its own dtype, an nn.Linear."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from opt8bit.ptq.export.checkpoint_format import Planned
from opt8bit.ptq.result import Result
from opt8bit.quant.described import described
from opt8bit.quant.grid import SCALE_DTYPES, at
from opt8bit.quant.uniform import UniformGrid, is_uniform, signed
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme


def check_uniform(format: str, name: str, planned: Planned, scale_dtype: torch.dtype | None = None) -> UniformGrid:
    """Returns the grid of a layer.

    Args:
        format: its name.
        name: of the layer.
        planned: the layer.
        scale_dtype: that the format stores scales in; None for that of the layer's weight.

    Raises:
        ValueError: a packed format cannot hold the layer.
    """
    module, grid = planned.module, planned.scheme.grid
    if not is_uniform(grid):
        of = f" of {type(grid).__qualname__}" if isinstance(grid, UniformGrid) else ""
        raise ValueError(f"{name}: {format} holds evenly spaced values alone, got {grid!r}{of}: use format 'dense'")
    check_codes_only(format, name, planned)
    if scale_dtype is None and module.weight.dtype not in SCALE_DTYPES:
        raise ValueError(
            f"{name}: {format} has no scales of the weight's dtype, {module.weight.dtype}: convert the model first, as "
            "by model.float(), or use format 'dense'"
        )
    wanted, whose = (module.weight.dtype, "the weight's dtype, ") if scale_dtype is None else (scale_dtype, "")
    if wanted != grid.scale_dtype:
        raise ValueError(f"{name}: {format} holds scales of {whose}{wanted}, got {grid.scale_dtype}")
    return grid


def check_codes_only(format: str, name: str, planned: Planned) -> None:
    """
    Raises:
        ValueError: a layer is not the weight of an ``nn.Linear`` on the grid of its scheme, and nothing else.
    """
    grid = planned.scheme.grid
    if described(planned.method.grids(planned.scheme)) != described((grid,)):
        raise ValueError(f"{name}: {format} holds the grid of the scheme, not those of {planned.method}: use 'dense'")
    if not isinstance(planned.module, nn.Linear):
        kind = type(planned.module).__name__
        raise ValueError(f"{name}: {format} holds nn.Linear alone, got {kind}: use format 'dense'")
    if planned.method.keeps_outliers:
        raise ValueError(f"{name}: {format} has no place for weights that are kept exact: use format 'dense'")


def scheme_of(result: Result, name: str) -> WeightScheme:
    """Returns the scheme of a compressed layer without reading the layer."""
    plan = result.plan.of(name)
    assert plan is not None
    return plan.scheme


def uniform_grid(scheme: WeightScheme) -> UniformGrid:
    """Returns the grid of a scheme that :func:`check_uniform` has let through."""
    assert is_uniform(scheme.grid)
    return scheme.grid


def stored_part(weight: QuantizedWeight) -> tuple[Part, UniformGrid]:
    """Returns all there is of a weight of such a scheme, and its grid.

    All zero points of a symmetric grid are in the middle; scales may be negative.
    """
    (part,) = weight.parts
    assert is_uniform(part.grid)
    if not part.grid.symmetric:
        return part, part.grid
    groups = part.codes.unflatten(1, (part.params.scale.shape[1], -1))
    codes, params = signed(part.grid, groups, at(part.params, (..., None)))
    return replace(part, codes=codes.flatten(1), params=at(params, (..., 0))), part.grid


def kind_of(scale: Tensor, symmetric: bool) -> str:
    """Returns what a stored grid is called: "asymmetric", "symmetric", or "signed" where scales have both signs."""
    if not symmetric:
        return "asymmetric"
    return "signed" if bool((scale < 0).any()) else "symmetric"
