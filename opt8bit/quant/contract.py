"""Checks, on a few blocks, what a grid owes to whoever uses it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from opt8bit.quant.grid import SCALE_DTYPES, Grid, at

MAX_BITS = 8  # of a code, which is a byte
ROUNDING = 1e-3  # by how much of the largest value ``nearest`` may differ from ``decode(encode(...))``


def check_grid(
    grid: Grid[Any],
    block: Tensor,  # (out, groups, g), float32 or float64
) -> None:
    """Tries a grid on a few blocks of a weight. Whether its numbers are finite is for others to say.

    Raises:
        TypeError: something is of another type than :class:`Grid` says.
        ValueError: something has another shape or value. The message names the class and what is allowed.
    """
    name = type(grid).__name__
    if getattr(grid, "scale_dtype", None) not in SCALE_DTYPES:
        raise TypeError(f"{name}.__init__ must call super().__init__(), which sets scale_dtype")
    if type(grid.bits) is not int or not 1 <= grid.bits <= MAX_BITS:
        raise ValueError(f"{name}.bits must be 1 to {MAX_BITS}, got {grid.bits!r}")
    kind = getattr(grid, "params_type", None)
    if not (isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")):
        raise TypeError(f"{name}.params_type must be a NamedTuple of tensors, got {kind!r}")
    _check_fit(name, grid, block, None)
    params = _check_fit(name, grid, block, torch.ones_like(block[0]))
    if not all(bool(param.isfinite().all()) for param in params):
        return
    codes = _tensor(f"{name}.encode", grid.encode(block.clone(), params), block.shape, torch.uint8)
    if int(codes.max()) >= 2**grid.bits:
        raise ValueError(f"{name}.encode must return codes below {2**grid.bits}, got {int(codes.max())}")
    dtype = params[0].dtype if params[0].is_floating_point() else None
    decoded = _tensor(f"{name}.decode", grid.decode(codes, params), block.shape, dtype)
    nearest = _tensor(f"{name}.nearest", grid.nearest(block.clone(), params), block.shape, dtype)
    if not bool(decoded.isfinite().all()):
        return
    allowed = ROUNDING * float(decoded.abs().max())
    if not torch.allclose(nearest, decoded, rtol=0, atol=allowed, equal_nan=True):
        off = float((nearest - decoded).abs().max())
        raise ValueError(
            f"{name}.nearest must be decode(encode(x)), differs by {off:.3g} of {float(decoded.abs().max()):.3g}"
        )
    stored = grid.stored_bits(codes.flatten(1), at(params, (..., 0)))
    if type(stored) is not int or stored < 0:
        raise ValueError(f"{name}.stored_bits must return an integer from 0, got {stored!r}")


def _check_fit(name: str, grid: Grid[Any], block: Tensor, importance: Tensor | None) -> Any:
    """Returns the params for blocks.

    Raises:
        TypeError, ValueError: they are not the grid's, or of another shape.
    """
    params = grid.fit(block.clone(), importance)
    if not isinstance(params, grid.params_type):
        raise TypeError(f"{name}.fit must return {grid.params_type.__name__}, got {type(params).__name__}")
    for field, param in zip(grid.params_type._fields, params, strict=True):
        _tensor(f"{name}.fit, {field},", param, torch.Size((*block.shape[:-1], 1)), None)
    return params


def _tensor(what: str, found: Any, shape: torch.Size, dtype: torch.dtype | None) -> Tensor:
    """
    Raises:
        TypeError: it is no tensor.
        ValueError: it has another shape or dtype.
    """
    if not isinstance(found, Tensor):
        raise TypeError(f"{what} must return a tensor, got {type(found).__name__}")
    if found.shape != shape:
        raise ValueError(f"{what} must return {tuple(shape)} for blocks, got {tuple(found.shape)}")
    if dtype is not None and found.dtype != dtype:
        raise ValueError(f"{what} must return {dtype}, got {found.dtype}")
    return found
