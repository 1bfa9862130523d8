"""What ``compress`` is asked for, as a recipe: schemes from options, for single layers, and for dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from opt8bit.ptq.blocks import block_layers, matrix
from opt8bit.ptq.layer import Override, Recipe
from opt8bit.ptq.methods import Method
from opt8bit.ptq.methods.method import check_method
from opt8bit.quant.grid import SCALE_DTYPES, Grid, UniformGrid
from opt8bit.quant.weight import WeightScheme

Overrides = Mapping[str, "Mapping[str, Any] | None"]


def recipe_for(
    model: nn.Module, options: Mapping[str, Any], overrides: Overrides | None, whole: Mapping[str, Any]
) -> Recipe:
    """Returns the recipe for a model.

    Scales are stored in the dtype of a layer's weight, as packed checkpoints have them.

    Args:
        model: to be compressed.
        options: of layers, as :func:`compress` takes them.
        overrides: likewise, for single layers.
        whole: what a :class:`Recipe` has for all layers.

    Raises:
        TypeError, ValueError: as :func:`compress`.
    """
    if not isinstance(overrides, Mapping | None):
        raise TypeError(f"overrides must be a mapping from patterns of names to options, got {overrides!r}")
    dtypes = {name: _scale_dtype(layer) for name, layer in block_layers(model).items()}
    first = next(iter(dtypes.values()))
    recipes = {dtype: _of_dtype(dtype, options, overrides or {}, whole) for dtype in dict.fromkeys(dtypes.values())}
    # Most models have one dtype. A layer of another is an exception by its name.
    odd = []
    for name, dtype in dtypes.items():
        own = recipes[dtype].of(name)
        if dtype != first and own is not None:
            odd.append(Override(name, own.method, own.scheme))
    return replace(recipes[first], overrides=(*recipes[first].overrides, *odd))


def _of_dtype(
    scale_dtype: torch.dtype, options: Mapping[str, Any], overrides: Overrides, whole: Mapping[str, Any]
) -> Recipe:
    scheme = _scheme(scale_dtype, **options)
    others = tuple(_override(pattern, given, options, scale_dtype) for pattern, given in overrides.items())
    return Recipe(options["method"], scheme, **whole, overrides=others)


def _scale_dtype(layer: nn.Module) -> torch.dtype:
    dtype = matrix(layer).dtype
    return dtype if dtype in SCALE_DTYPES else torch.float32


def _scheme(
    scale_dtype: torch.dtype,
    *,
    method: Method,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    range: str | None,
    grid: Grid | None,
) -> WeightScheme:
    check_method("method", method)
    if grid is not None and not isinstance(grid, Grid):
        raise TypeError(f"grid must be one of opt8bit.quant, such as UniformGrid(4), got {grid!r}")
    if grid is None:
        if range is None:
            range = "mse" if method.uses_hessian else "minmax"
        return WeightScheme(UniformGrid(bits, symmetric=symmetric, range=range, scale_dtype=scale_dtype), group_size)
    if (bits, symmetric, range) != (4, False, None):
        raise ValueError(f"bits, symmetric and range are those of grid={grid!r}: leave them out")
    return WeightScheme(grid, group_size)


def _override(
    pattern: str, given: Mapping[str, Any] | None, options: Mapping[str, Any], scale_dtype: torch.dtype
) -> Override:
    if given is None:
        return Override(pattern, None, _scheme(scale_dtype, **options))
    if not isinstance(given, Mapping):
        raise TypeError(f"overrides[{pattern!r}] must be a mapping of options, or None, got {given!r}")
    unknown = sorted(given.keys() - options.keys())
    if unknown:
        allowed = ", ".join(options)
        raise ValueError(f"overrides[{pattern!r}] may have {allowed}, got {unknown[0]!r}")
    of_grids = {"bits": 4, "symmetric": False, "range": None}
    base = {**options, **(of_grids if given.get("grid") is not None else {})}
    if given.keys() & of_grids.keys():
        base["grid"] = None
    merged = {**base, **given}
    try:
        return Override(pattern, merged["method"], _scheme(scale_dtype, **merged))
    except (TypeError, ValueError) as error:
        raise type(error)(f"overrides[{pattern!r}]: {error}") from error
