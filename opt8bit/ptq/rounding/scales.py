"""The scales of least layer objective for codes that are already chosen: a small linear system for each row."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import linear

from opt8bit.ptq.rounding.lines import COEFFICIENTS, ROWS, refit_lines
from opt8bit.quant.grid import at
from opt8bit.quant.superblocks import is_on_lines
from opt8bit.quant.weight import Part

PROPORTIONAL = 1e-5  # of a row's largest value: what decoding in float32 may be off


def refit_scales(
    wanted: Tensor,  # (out, in), W H; W without what outliers add
    part: Part,  # all columns of Ŵ
    hessian: Tensor,  # (in, in)
) -> Part:
    """Returns the same codes with new scales, so that ``tr((W - Ŵ) H (W - Ŵ)ᵀ)`` is least; no row's share of it rises.

    That takes a grid of evenly spaced values, see :func:`refit_lines`, or one whose values are proportional to a param
    ``scale``. Where a row's are not, it is left as it is.

    With ``v_g`` the row's grid values of group g at scale 1, zero elsewhere, ``ŵ = Σ s_g v_g``, and the best s solves
    ``Σ_h (v_gᵀ H v_h) s_h = v_gᵀ H w``. A row keeps its scales where the best ones have not all the signs of before.
    """
    if is_on_lines(part.grid):
        return refit_lines(wanted, part, hessian)
    if "scale" not in part.params._fields:
        return part
    hessian = hessian.to(wanted.dtype)
    groups = part.params.scale.shape[1]
    unit = part.params._replace(scale=torch.ones_like(part.params.scale))
    values = part.grid.decode(part.codes.unflatten(1, (groups, -1)), at(unit, (..., None)))
    size = values.shape[-1]
    # Of each group, H's columns from the diagonal down: the rest follows from symmetry.
    columns = [hessian[start:, start : start + size].contiguous() for start in range(0, len(hessian), size)]
    scale = part.params.scale.clone()
    together = max(1, min(ROWS, COEFFICIENTS // groups**2))
    for rows in torch.arange(len(wanted), device=wanted.device).split(together):
        before = part.by_row(partial(torch.index_select, dim=0, index=rows))
        found = _best(wanted[rows], values[rows], columns, before)
        keeps = _are_proportional(values[rows], before) & _are_proportional(values[rows], _scaled(before, found))
        scale[rows] = torch.where(keeps[:, None], found, scale[rows])
    return _scaled(part, scale)


def _scaled(part: Part, scale: Tensor) -> Part:
    return replace(part, params=part.params._replace(scale=scale))


def _are_proportional(
    values: Tensor,  # (out, groups, g), at scale 1
    part: Part,
) -> Tensor:
    """Tells whether a row's values are those at scale 1 times its scales, (out,)."""
    expected = (values * part.params.scale[..., None]).flatten(1)
    off = (part.dequantize() - expected).abs().amax(1)
    return off <= PROPORTIONAL * expected.abs().amax(1)


def _best(
    wanted: Tensor,  # (rows, in)
    values: Tensor,  # (rows, groups, g)
    columns: list[Tensor],  # (in - start of the group, g) each
    part: Part,  # of the rows
) -> Tensor:
    groups, size = values.shape[1:]
    scale = part.params.scale
    right = (wanted.unflatten(1, (groups, size)) * values).sum(-1).double()
    left = values.new_empty(len(values), groups, groups)
    for g, of_group in enumerate(columns):
        products = linear(values[:, g].contiguous(), of_group).unflatten(1, (groups - g, size))
        left[:, g, g:] = left[:, g:, g] = (products * values[:, g:]).sum(-1)
    left = left.double()
    dead = left.diagonal(dim1=1, dim2=2) <= 0  # all of a group's values are 0, or no input reaches it
    left.diagonal(dim1=1, dim2=2)[dead] = 1
    found, failed = torch.linalg.solve_ex(left, right)
    found = torch.where(dead, scale, found)
    same_signs = (failed == 0) & (found * scale > 0).all(1)
    found = part.grid.storable(found.abs(), part.params).copysign(scale)

    def cost(s: Tensor) -> Tensor:
        return ((left @ s[..., None])[..., 0] * s).sum(1) - 2 * (right * s).sum(1)

    better = same_signs & (cost(found) < cost(scale.double()))
    return torch.where(better[:, None], found.to(scale.dtype), scale)
