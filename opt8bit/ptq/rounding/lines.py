"""Scales and minima of least layer objective for codes that are already chosen, among those that can be stored."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from opt8bit.quant.evenly_spaced import EvenlySpaced, Line
from opt8bit.quant.grid import at
from opt8bit.quant.superblocks import SuperblockGrid, SuperblockParams, is_on_lines
from opt8bit.quant.weight import Part

ROWS, COEFFICIENTS = 512, 2**23  # of the systems that are in memory at once, at most
SWEEPS = 3  # over all blocks of a row


def refit_lines(
    wanted: Tensor,  # (out, in), W H; W without what outliers add
    part: Part,  # all columns of Ŵ, on evenly spaced values
    hessian: Tensor,  # (in, in)
) -> Part:
    """Returns the same codes with new scales and minima; no row's share of ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` rises.

    With ``v_g`` the codes of block g, zero elsewhere, and ``u_g`` ones there, ``ŵ = Σ s_g v_g + m_g u_g``, of which the
    objective is a quadratic function. Blocks go one after another: each gets the scale and the minimum that are best
    while all others of the row stay, among numbers that the grid stores. Super-scales follow in the same way.
    """
    hessian, grid = hessian.to(wanted.dtype), part.grid
    assert is_on_lines(grid)
    coefficients = 2 * part.params[0].shape[1]
    together = max(1, min(ROWS, COEFFICIENTS // coefficients**2))
    found = []
    for rows in torch.arange(len(wanted), device=wanted.device).split(together):
        some = part.by_row(partial(torch.index_select, dim=0, index=rows))
        params = _own(wanted[rows], some, hessian, grid)
        if isinstance(grid, SuperblockGrid):
            params = _super(wanted[rows], replace(some, params=params), hessian, grid)
        found.append(params)
    return replace(part, params=type(part.params)(*map(torch.cat, zip(*found, strict=True))))


def _own(wanted: Tensor, part: Part, hessian: Tensor, grid: EvenlySpaced[Any]) -> Any:
    """Returns the params with the best numbers of each block's own."""
    line = grid.line(part.params)
    codes = part.codes.unflatten(1, (line.scale.shape[1], -1)).to(wanted.dtype)
    features = [codes - grid.middle] if grid.centred else [codes, torch.ones_like(codes)]

    def near(g: int) -> Near:
        own = at(part.params, (slice(None), g))
        return Near(lambda scale: grid.near_scales(scale, own), lambda minimum: grid.near_minimum(minimum, own))

    found = _Quadratic.of(wanted, features, hessian).descend(list(line)[: len(features)], near)
    minimum = -grid.middle * found[0] if grid.centred else found[1]
    return grid.of_line(Line(found[0], minimum), part.params)


def _super(wanted: Tensor, part: Part, hessian: Tensor, grid: SuperblockGrid) -> SuperblockParams:
    """Returns the params with the best super-scales."""
    params: SuperblockParams = part.params
    blocks, together = params.sub_scale.shape[1], grid.together
    codes = part.codes.unflatten(1, (blocks, -1)).to(wanted.dtype)
    features = [(codes - grid.middle if grid.centred else codes) * params.sub_scale[..., None]]
    starts = [params.super_scale]
    if not grid.centred:
        features.append(-params.sub_minimum[..., None].expand_as(codes))
        starts.append(params.super_minimum)
    features = [each.unflatten(1, (-1, together)).flatten(2) for each in features]
    stored = Near(lambda scale: [grid.super_stored(scale)], grid.super_stored)
    found = _Quadratic.of(wanted, features, hessian).descend(
        [start[:, ::together] for start in starts], lambda g: stored
    )
    scale, minimum = (each.repeat_interleave(together, 1) for each in (found[0], found[-1]))
    return params._replace(super_scale=scale, super_minimum=minimum)


@dataclass(frozen=True)
class Near:
    """Says which numbers can be stored: scales near a scale, to try, and the minimum that is nearest to one."""

    scales: Callable[[Tensor], list[Tensor]]
    minimum: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Quadratic:
    """The objective of each row by one or two numbers per block: ``θᵀ left θ - 2 right θ``, and a constant.

    Attributes:
        left: (rows, numbers, numbers), a block's numbers beside each other.
        right: (rows, numbers).
        each: numbers of a block.
    """

    left: Tensor
    right: Tensor
    each: int

    @classmethod
    def of(
        cls,
        wanted: Tensor,  # (rows, in)
        features: list[Tensor],  # (rows, blocks, g) each: what a weight gets of each number of its block
        hessian: Tensor,  # (in, in)
    ) -> _Quadratic:
        values = torch.stack(features, 2)  # (rows, blocks, numbers, g)
        rows, blocks, each, size = values.shape
        right = (wanted.unflatten(1, (blocks, 1, size)) * values).sum(-1).flatten(1).double()
        left = wanted.new_empty(rows, blocks, each, blocks, each)
        for g in range(blocks):
            products = values[:, g] @ hessian[g * size : (g + 1) * size, g * size :]  # (rows, each, columns from g on)
            for i, own in enumerate(products.unflatten(2, (blocks - g, size)).unbind(1)):
                for j in range(each):
                    left[:, g, i, g:, j] = left[:, g:, j, g, i] = (own * values[:, g:, j]).sum(-1)
        return cls(left.view(rows, blocks * each, -1).double(), right, each)

    def descend(self, starts: list[Tensor], near: Callable[[int], Near]) -> list[Tensor]:
        """Returns the numbers of each kind, (rows, blocks), after a few sweeps over the blocks.

        Args:
            starts: the numbers of each kind.
            near: for a block, what can be stored of it.
        """
        dtype = starts[0].dtype
        theta = torch.stack(starts, -1).flatten(1).double()
        for _ in range(SWEEPS):
            for g in range(theta.shape[1] // self.each):
                own = slice(g * self.each, (g + 1) * self.each)
                left, had = self.left[:, own, own], theta[:, own]
                right = self.right[:, own] - _times(self.left[:, own], theta) + _times(left, had)
                theta[:, own] = _best(left, right, had, near(g))
        return list(theta.to(dtype).unflatten(1, (-1, self.each)).unbind(-1))


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector[..., None])[..., 0]


def _best(
    left: Tensor,  # (rows, numbers, numbers) of one block
    right: Tensor,  # (rows, numbers)
    had: Tensor,  # (rows, numbers)
    near: Near,
) -> Tensor:
    """Returns a block's best numbers that can be stored, or those that it had."""

    def cost(theta: Tensor) -> Tensor:
        return (theta * (_times(left, theta) - 2 * right)).sum(1)

    best, least = had, cost(had)
    if right.shape[1] == 1:
        candidates = [scale[:, None] for scale in near.scales(right[:, 0] / left[:, 0, 0])]
    else:
        aa, ab, bb = left[:, 0, 0], left[:, 0, 1], left[:, 1, 1]
        scales = near.scales((right[:, 0] * bb - right[:, 1] * ab) / (aa * bb - ab * ab))
        candidates = [torch.stack([s, near.minimum((right[:, 1] - ab * s) / bb)], 1) for s in scales]
    for theta in candidates:
        total = cost(theta)
        better = total < least  # not where no input reaches the block, and numbers are not finite
        best = torch.where(better[:, None], theta, best)
        least = torch.where(better, total, least)
    return best
