"""What packed formats ask of a layer: integers on an evenly spaced grid, scales of its own dtype, an nn.Linear."""

from __future__ import annotations

from torch import nn

from opt8bit.ptq.export.layout import Planned
from opt8bit.ptq.result import Result
from opt8bit.quant.grid import UniformGrid
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme


def check_uniform(layout: str, name: str, planned: Planned) -> UniformGrid:
    """The grid of a layer.

    Raises:
        ValueError: it is none of these.
    """
    module, grid = planned.module, planned.scheme.grid
    if not isinstance(grid, UniformGrid):
        raise ValueError(f"{name}: {layout} holds evenly spaced values alone, got {grid!r}: use format 'dense'")
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{name}: {layout} holds nn.Linear alone, got {type(module).__name__}: use format 'dense'")
    if planned.method.keeps_outliers:
        raise ValueError(f"{name}: {layout} has no place for weights that are kept exact: use format 'dense'")
    if module.weight.dtype != grid.scale_dtype:
        raise ValueError(
            f"{name}: {layout} holds scales of the weight's dtype, {module.weight.dtype}, got {grid.scale_dtype}"
        )
    return grid


def scheme_of(result: Result, name: str) -> WeightScheme:
    """Of a compressed layer, told without reading it."""
    recipe = result.recipe.of(name)
    assert recipe is not None
    return recipe.scheme


def uniform_grid(scheme: WeightScheme) -> UniformGrid:
    """The grid of a scheme that :func:`check_uniform` has let through."""
    assert isinstance(scheme.grid, UniformGrid)
    return scheme.grid


def uniform_part(weight: QuantizedWeight) -> tuple[Part, UniformGrid]:
    """All there is of a weight of such a scheme, and its grid."""
    (part,) = weight.parts
    assert isinstance(part.grid, UniformGrid)
    return part, part.grid
