"""GPTQ's loop in plain torch: columns are rounded one after another, and those that are left take up the error."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opt8bit.ptq.rounding.groups import by_column
from opt8bit.quant.grid import Grid, P, at

PIECE = 128  # columns that are rounded before those behind them are brought up to date


def round_columns(
    weight: Tensor,  # (out, in), columns in the order in which they are rounded
    factor: Tensor,  # (in, in), U
    importance: Tensor,  # (in,)
    group_of: Tensor,  # (in,)
    params: P | None,  # (out, groups); fitted on the way where None: columns then go group by group
    grid: Grid[P],
) -> tuple[Tensor, P]:
    """Returns the rounded weight, (out, in), and its params, (out, groups)."""
    fits = params is None
    free = weight.T.clone(memory_format=torch.contiguous_format)  # (in, out): a column of the weight is a row here
    reached = -1
    for start, stop in pieces(group_of) if fits else pieces(torch.zeros_like(group_of)):
        if fits and int(group_of[start]) // grid.together != reached:
            reached = int(group_of[start]) // grid.together
            columns = group_of // grid.together == reached
            shape = (grid.together, -1)
            blocks = free[columns].T.unflatten(1, shape)
            fitted = at(grid.fit(blocks, importance[columns].unflatten(0, shape)), (..., 0))  # (out, together)
            params = fitted if params is None else joined(params, fitted)
        assert params is not None
        own = by_column(params, group_of[start:stop])
        errors = _round_piece(free[start:stop], factor[start:stop, start:stop], own, grid)
        free[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    assert params is not None
    return free.T, params


def joined(params: P, more: P) -> P:
    """Params (out, groups) of some groups, and behind them those of others."""
    make: Any = type(params)
    return make(*(torch.cat(both, 1) for both in zip(params, more, strict=True)))


def _round_piece(
    piece: Tensor,  # (n, out), rounded in place
    factor: Tensor,  # (n, n)
    params: P,  # (n, out)
    grid: Grid[P],
) -> Tensor:
    """Rounds the columns of one piece, each after the errors of those before it; returns ``e``, (n, out)."""
    errors = torch.empty_like(piece)
    for j in range(len(piece)):
        value = grid.nearest(piece[j], at(params, j))
        errors[j] = (piece[j] - value) / factor[j, j]
        piece[j] = value
        piece[j + 1 :].addcmul_(factor[j, j + 1 :, None], errors[j], value=-1)
    return errors


def pieces(group_of: Tensor) -> Iterator[tuple[int, int]]:
    """Cuts columns into runs of at most ``PIECE`` that never cross from one group into the next."""
    start = 0
    for length in torch.unique_consecutive(group_of, return_counts=True)[1].tolist():
        for first in range(start, start + length, PIECE):
            yield first, min(first + PIECE, start + length)
        start += length
