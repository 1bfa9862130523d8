"""What packed formats ask of a layer: integers on an evenly spaced grid, scales of the model's dtype, a plain Linear."""

from __future__ import annotations

from torch import nn

from opt8bit.ptq.layer import Compressed
from opt8bit.ptq.methods import Format, Rounded
from opt8bit.quant.grid import UniformGrid


def uniform_grid(of: Format | Rounded) -> UniformGrid:
    """The grid of a layer that :func:`check_uniform` has let through."""
    grid = of.grid if isinstance(of, Format) else of.format.grid
    assert isinstance(grid, UniformGrid)
    return grid


def check_uniform(format: str, layer: Compressed, module: nn.Module) -> None:
    """
    Raises:
        ValueError: the layer is none of these.
    """
    rounded = layer.rounded
    grid = rounded.format.grid
    if not isinstance(grid, UniformGrid):
        raise ValueError(f"{format} holds evenly spaced values alone, got {grid!r}: use format='dense'")
    if rounded.outliers is not None:
        raise ValueError(f"{format} has no place for weights that are kept exact: use format='dense'")
    if not isinstance(module, nn.Linear):
        raise ValueError(f"{format} holds nn.Linear alone, got {type(module).__name__}: use format='dense'")
    if not bool((rounded.scales.scale.to(layer.dtype) == rounded.scales.scale).all()):
        raise ValueError(f"{format} holds scales of the weight's dtype: round on {grid!r} with scale_dtype={layer.dtype}")
