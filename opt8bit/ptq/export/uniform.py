"""What packed formats ask of a layer: integers on an evenly spaced grid, scales of its own dtype, an nn.Linear."""

from __future__ import annotations

from torch import nn

from opt8bit.ptq.export.layout import Planned
from opt8bit.ptq.methods import Format
from opt8bit.ptq.result import Result
from opt8bit.quant.grid import UniformGrid


def check_uniform(layout: str, name: str, planned: Planned) -> UniformGrid:
    """The grid of a layer.

    Raises:
        ValueError: it is none of these.
    """
    module, grid = planned.module, planned.format.grid
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


def format_of(result: Result, name: str) -> Format:
    """Of a compressed layer, told without reading it."""
    recipe = result.recipe.of(name)
    assert recipe is not None
    return recipe.format


def uniform_grid(format: Format) -> UniformGrid:
    """The grid of a format that :func:`check_uniform` has let through."""
    assert isinstance(format.grid, UniformGrid)
    return format.grid
