"""Grids whose scales and minima are codes themselves, of a few bits, under two numbers for several blocks together."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from opt8bit.quant.affine import AffineGrid, cut, spanning
from opt8bit.quant.evenly_spaced import EvenlySpaced, Line, Weighted, least, on_line, search, squared_error
from opt8bit.quant.grid import Grid, checked_range, mapped

PARTS = (1.0, 0.92, 0.84, 0.75)  # of the super-scale that holds the largest scale, which the search starts from
CENTRED = (1.0, *torch.linspace(1.08, 0.6, 16, dtype=torch.float64).tolist())  # fractions of a block's magnitude
REFINED = 4  # how often codes, sub-scales and super-scales then take turns
SINGULAR = 1e-6  # of a system of two equations
ALL = (-2, -1)  # dimensions of a superblock


class SuperblockParams(NamedTuple):
    """Holds what a :class:`SuperblockGrid` keeps per block; blocks of a superblock have the same super-scales."""

    super_scale: Tensor
    sub_scale: Tensor  # integers
    super_minimum: Tensor
    sub_minimum: Tensor  # integers


class SuperblockGrid(EvenlySpaced[SuperblockParams]):
    """Rounds to ``super_scale * sub_scale * q - super_minimum * sub_minimum`` for q = 0 .. 2^bits - 1.

    Args:
        bits: 1 to 8.
        together: blocks of a superblock, neighbours in a row.
        sub_bits: of a sub-scale, and of a sub-minimum, 1 to 8.
        centred: whether the values are ``super_scale * sub_scale * (q - 2^(bits-1))``: nothing is stored of minima,
            and sub-scales have a sign. Otherwise sub-scales and sub-minima are from 0.
        range: "minmax" spans each block's smallest and largest weight, and zero. "mse" searches for the numbers of
            least squared error: codes, sub-scales and super-scales take turns, from several starts.
        scale_dtype: of super-scales; see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.

    Source: the K-quants of ggml, whose blocks it is stored in.
    """

    params_type = SuperblockParams

    def __init__(
        self,
        bits: int,
        *,
        together: int,
        sub_bits: int,
        centred: bool = False,
        range: str = "minmax",
        scale_dtype: torch.dtype = torch.float16,
    ) -> None:
        super().__init__(bits, scale_dtype)
        if not isinstance(together, int) or together < 1:
            raise ValueError(f"together must be a positive integer, got {together!r}")
        if not isinstance(sub_bits, int) or not 1 <= sub_bits <= 8:
            raise ValueError(f"sub_bits must be 1 to 8, got {sub_bits!r}")
        self._together, self.sub_bits, self._centred = together, sub_bits, centred
        self.range = checked_range(range)

    def __repr__(self) -> str:
        centred = ", centred=True" if self.centred else ""
        sizes = f"together={self.together}, sub_bits={self.sub_bits}{centred}"
        return f"SuperblockGrid({self.bits}, {sizes}, range={self.range!r}, scale_dtype={self.scale_dtype})"

    @property
    def together(self) -> int:
        return self._together

    @property
    def centred(self) -> bool:
        return self._centred

    @property
    def sub_limits(self) -> tuple[int, int]:
        """The smallest and the largest sub-scale."""
        half = 2 ** (self.sub_bits - 1)
        return (-half, half - 1) if self.centred else (0, 2 * half - 1)

    def stored_bits(self, codes: Tensor, params: SuperblockParams) -> int:
        kinds = 1 if self.centred else 2
        sub, super_ = kinds * self.sub_bits, kinds * 8 * self.scale_dtype.itemsize
        blocks = params.sub_scale.numel()
        return self.bits * codes.numel() + sub * blocks + super_ * blocks // self.together

    def line(self, params: SuperblockParams) -> Line:
        return Line(params.super_scale * params.sub_scale, -params.super_minimum * params.sub_minimum)

    def near_scales(self, scale: Tensor, params: SuperblockParams) -> list[Tensor]:
        nearest = (scale / params.super_scale).round_()
        return [params.super_scale * (nearest + change).clamp_(*self.sub_limits) for change in (0, -1, 1)]

    def near_minimum(self, minimum: Tensor, params: SuperblockParams) -> Tensor:
        return -params.super_minimum * (-minimum / params.super_minimum).round_().clamp_(*self.sub_limits)

    def super_stored(self, number: Tensor) -> Tensor:
        """Returns the nearest super-scales that can be stored; none is 0, as sub-scales are told by division."""
        stored = self.nearest_stored(number)
        least = self.storable(torch.full_like(stored, torch.finfo(torch.float32).tiny))
        return torch.where(stored == 0, least, stored)

    def of_line(self, line: Line, params: SuperblockParams) -> SuperblockParams:
        return self._coded(line, params.super_scale, params.super_minimum)

    def fit(self, block: Tensor, importance: Tensor | None = None) -> SuperblockParams:
        if block.dim() < 2 or block.shape[-2] % self.together:
            raise ValueError(f"{self.together} blocks are fitted together, got blocks {tuple(block.shape)}")
        grouped = block.unflatten(-2, (-1, self.together))  # (..., superblocks, together, g)
        if importance is not None:
            importance = importance.expand_as(block).unflatten(-2, (-1, self.together))
            importance = importance / importance.amax(ALL, keepdim=True).clamp_(min=torch.finfo(block.dtype).tiny)
        found = least(
            (params, squared_error(grouped, self.nearest(grouped, params), importance, ALL))
            for params in self._candidates(grouped, importance)
        )
        return mapped(found, lambda part: part.flatten(-3, -2))

    def _candidates(self, x: Tensor, importance: Tensor | None) -> Iterator[SuperblockParams]:
        low, high = x.amin(-1, keepdim=True).clamp_(max=0), x.amax(-1, keepdim=True).clamp_(min=0)
        if self.range == "minmax":
            line = next(self._starts(low, high))
            yield self._coded(line, self._super(line.scale), self._super(-line.minimum))
            return
        weighted = Weighted(x, importance)
        line = search(x, self._starts(low, high), self.largest, partial(self._best, weighted))
        for part in PARTS:
            params = self._coded(line, self._super(line.scale, part), self._super(-line.minimum, part))
            yield params
            for _ in range(REFINED):
                params = self._refined(weighted, importance, params)
                yield params

    def _starts(self, low: Tensor, high: Tensor) -> Iterator[Line]:
        """Yields lines to begin with, the first of which reaches to the weight of largest magnitude, and to zero."""
        if not self.centred:
            yield spanning(low, high, self.largest)
            yield from cut(low, high, self.largest)
            return
        scale = torch.where(high > -low, -high, -low) / self.middle
        for part in CENTRED:
            yield self._about_zero(scale * part)
            yield self._about_zero(-scale * part)

    def _about_zero(self, scale: Tensor) -> Line:
        return Line(scale, -self.middle * scale)

    def _best(self, weighted: Weighted, codes: Tensor) -> tuple[Line, Tensor]:
        """Returns the lines of least squared error for codes, of those that could be stored with enough bits."""
        if self.centred:
            scale, error = weighted.proportion(codes - self.middle)
            return self._about_zero(scale), error
        line, error = weighted.line(codes)
        above = line.minimum > 0
        scale, error_from_zero = weighted.proportion(codes)
        line = Line(torch.where(above, scale, line.scale), line.minimum.clamp(max=0))
        return line, torch.where(above, error_from_zero, error)

    def _super(self, numbers: Tensor, part: float = 1.0) -> Tensor:
        """Returns the super-scale (..., superblocks, 1, 1) with which the largest number has the largest code."""
        if self.centred:  # the largest in magnitude has the lowest code: there is one more below zero
            place = numbers.abs().argmax(-2, keepdim=True)
            largest = numbers.gather(-2, place) / self.sub_limits[0]
        else:
            largest = numbers.amax(-2, keepdim=True) / self.sub_limits[1]
        return self.super_stored(largest * part)

    def _coded(self, line: Line, super_scale: Tensor, super_minimum: Tensor) -> SuperblockParams:
        """Returns the params nearest to lines (..., superblocks, together, 1) under super-scales."""
        low, high = self.sub_limits
        sub_scale = (line.scale / super_scale).round_().clamp_(low, high)
        if self.centred:
            super_minimum, sub_minimum = super_scale, self.middle * sub_scale
        else:
            sub_minimum = (-line.minimum / super_minimum).round_().clamp_(low, high)
        return SuperblockParams(
            super_scale.expand_as(sub_scale), sub_scale, super_minimum.expand_as(sub_scale), sub_minimum
        )

    def _refined(self, weighted: Weighted, importance: Tensor | None, params: SuperblockParams) -> SuperblockParams:
        """Returns the best params for the codes that params give: sub-scales first, then super-scales."""
        x = weighted.block
        codes = on_line(x, self.line(params), self.largest)
        super_scale, super_minimum = params.super_scale[..., :1, :], params.super_minimum[..., :1, :]
        line, _ = self._best(weighted, codes)
        coded = self._coded(line, super_scale, super_minimum)
        if self.centred:
            steps = (codes - self.middle) * coded.sub_scale
            return self._coded_as(coded, self.super_stored(_proportion(x, steps, importance)), None)
        # What a stored scale leaves to the minimum.
        stored = coded.super_scale * coded.sub_scale
        minimum = (line.minimum + (line.scale - stored) * weighted.mean(codes)).clamp_(max=0)
        coded = self._coded(Line(stored, minimum), super_scale, super_minimum)
        found = _two_proportions(x, codes * coded.sub_scale, -coded.sub_minimum.expand_as(codes), importance)
        return self._coded_as(coded, *map(self.super_stored, found))

    def _coded_as(self, coded: SuperblockParams, super_scale: Tensor, super_minimum: Tensor | None) -> SuperblockParams:
        """Returns the same sub-scales under others."""
        scales = super_scale.expand_as(coded.sub_scale)
        minima = scales if super_minimum is None else super_minimum.expand_as(coded.sub_scale)
        return coded._replace(super_scale=scales, super_minimum=minima)


def is_on_lines(grid: Grid[Any]) -> TypeGuard[EvenlySpaced[Any]]:
    """Tells whether a grid is an :class:`AffineGrid` or a :class:`SuperblockGrid`. A subclass may decode otherwise."""
    return type(grid) in (AffineGrid, SuperblockGrid)


def _weighted(importance: Tensor | None, values: Tensor) -> Tensor:
    return values if importance is None else values * importance


def _proportion(x: Tensor, steps: Tensor, importance: Tensor | None) -> Tensor:
    """Returns the s of each superblock for which ``s * steps`` is nearest to x (..., together, g); 0 without steps."""
    weighted = _weighted(importance, steps)
    below = (weighted * steps).sum(ALL, keepdim=True)
    return torch.where(below > 0, (weighted * x).sum(ALL, keepdim=True) / below, 0)


def _two_proportions(x: Tensor, first: Tensor, second: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns the s and t for which ``s * first + t * second`` is nearest to x (..., together, g)."""
    a, b = _weighted(importance, first), _weighted(importance, second)
    aa, ab, bb = ((left * right).sum(ALL, keepdim=True) for left, right in ((a, first), (a, second), (b, second)))
    ax, bx = ((left * x).sum(ALL, keepdim=True) for left in (a, b))
    determinant = aa * bb - ab * ab
    is_regular = determinant > SINGULAR * aa * bb
    s = torch.where(is_regular, (ax * bb - bx * ab) / determinant, _proportion(x, first, importance))
    t = torch.where(is_regular, (bx * aa - ax * ab) / determinant, 0)
    return s, t
