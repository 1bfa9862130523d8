"""Grids of evenly spaced values whose lowest one is stored."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from opt8bit.quant.grid import Grid, P, mapped

FIRST_TURNS, LAST_TURNS = 2, 4  # that codes and line take from each start of a search, and from the best line then
SAME = 1e-6  # of the square of codes: a spread that is none


class Line(NamedTuple):
    """Values on a line: ``scale * q + minimum``."""

    scale: Tensor
    minimum: Tensor


class EvenlySpaced(Grid[P]):
    """Rounds to ``scale * q + minimum`` for q = 0 .. 2^bits - 1. What is stored of both is a subclass's matter.

    Args:
        bits: 1 to 8.
        scale_dtype: see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.
    """

    def __init__(self, bits: int, scale_dtype: torch.dtype) -> None:
        super().__init__(scale_dtype)
        if not isinstance(bits, int) or isinstance(bits, bool) or not 1 <= bits <= 8:
            raise ValueError(f"bits must be 1 to 8, got {bits!r}")
        self._bits = bits

    @property
    def bits(self) -> int:
        return self._bits

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self._bits - 1

    @abstractmethod
    def line(self, params: P) -> Line:
        """Returns the line of each block. A scale may be 0 or negative."""

    @property
    def centred(self) -> bool:
        """Whether the code ``middle`` stands for 0 in every block, so that the scale says everything."""
        return False

    @property
    def middle(self) -> int:
        """The code of zero where the grid is centred."""
        return 2 ** (self._bits - 1)

    @abstractmethod
    def near_scales(self, scale: Tensor, params: P) -> list[Tensor]:
        """Returns stored scales near a scale, to choose from, where params say what blocks share."""

    @abstractmethod
    def near_minimum(self, minimum: Tensor, params: P) -> Tensor:
        """Returns the stored minimum nearest to one, where params say what blocks share."""

    @abstractmethod
    def of_line(self, line: Line, params: P) -> P:
        """Returns the params of lines that can be stored, with what blocks share as params have it."""

    def encode(self, x: Tensor, params: P) -> Tensor:
        return on_line(x, self.line(params), self.largest).to(torch.uint8)

    def decode(self, codes: Tensor, params: P) -> Tensor:
        line = self.line(params)
        return codes * line.scale + line.minimum

    def nearest(self, x: Tensor, params: P) -> Tensor:
        line = self.line(params)
        return on_line(x, line, self.largest).mul_(line.scale).add_(line.minimum)


def on_line(x: Tensor, line: Line, largest: int) -> Tensor:
    """Returns the codes of the values of a line that are nearest to ``x``, in its dtype; 0 where the scale is 0."""
    inverse = torch.where(line.scale == 0, 0, line.scale.reciprocal())
    return (x - line.minimum).mul_(inverse).round_().clamp_(0, largest)


class Weighted:
    """Blocks, and what the errors of their weights count for: the closed forms that a search for their lines takes.

    Args:
        block: (..., g).
        importance: of errors, (..., g) or (g,); None where they count alike.
    """

    def __init__(self, block: Tensor, importance: Tensor | None) -> None:
        share = torch.ones_like(block) if importance is None else importance.expand_as(block)
        self.block = block
        self.share = share / share.sum(-1, keepdim=True).clamp_(min=torch.finfo(block.dtype).tiny)
        self._middle = (self.share * block).sum(-1, keepdim=True)
        self._off = self.share * (block - self._middle)
        self._variance = (self._off * block).sum(-1, keepdim=True)
        self._square = self._variance + self._middle * self._middle

    def line(self, codes: Tensor) -> tuple[Line, Tensor]:
        """Returns the lines (..., 1) of least squared error for codes (..., g), and that error; no scale is negative.

        Where all codes of a block are the same, the scale is 0.
        """
        weighted = self.share * codes
        middle = weighted.sum(-1, keepdim=True)
        square = weighted.mul_(codes).sum(-1, keepdim=True)
        spread = square - middle * middle
        product = (codes * self._off).sum(-1, keepdim=True).clamp_(min=0)
        scale = torch.where(spread > SAME * square, product / spread, 0)
        return Line(scale, self._middle - scale * middle), self._variance - scale * product

    def proportion(self, steps: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the s (..., 1) for which ``s * steps`` errs least, and that error; 0 where all steps are 0."""
        weighted = self.share * steps
        product = (weighted * self.block).sum(-1, keepdim=True)
        square = weighted.mul_(steps).sum(-1, keepdim=True)
        scale = torch.where(square > 0, product / square, 0)
        return scale, self._square - scale * product

    def mean(self, values: Tensor) -> Tensor:
        """Returns the weighted means of values (..., g), (..., 1)."""
        return (self.share * values).sum(-1, keepdim=True)


def search(
    block: Tensor,  # (..., g)
    starts: Iterable[Line],
    largest: int,  # code
    best: Callable[[Tensor], tuple[Line, Tensor]],
) -> Line:
    """Returns lines (..., 1) of little error: codes and the best line for them take turns, longest where it pays most.

    Args:
        block: the weights.
        starts: lines to begin with.
        largest: code.
        best: returns the best lines for codes, and their errors.
    """

    def turns(line: Line, count: int) -> Iterator[tuple[Line, Tensor]]:
        for _ in range(count):
            line, error = best(on_line(block, line, largest))
            yield line, error

    line = least(chain.from_iterable(turns(start, FIRST_TURNS) for start in starts))
    return least(turns(line, LAST_TURNS))


def least(candidates: Iterable[tuple[P, Tensor]]) -> P:
    """Returns, block by block, the params of least error of some params with errors (..., 1); ties go to the earlier.

    Raises:
        ValueError: there are none.
    """
    found, least = None, None
    for params, error in candidates:
        if found is None or least is None:
            found, least = params, error
            continue
        better = error < least
        pairs = iter(found)
        found = mapped(params, lambda new, better=better, pairs=pairs: torch.where(better, new, next(pairs)))
        least = torch.where(better, error, least)
    if found is None:
        raise ValueError("there must be params to choose from, got none")
    return found


def squared_error(
    x: Tensor,
    rounded: Tensor,  # of the shape of x, overwritten
    importance: Tensor | None,  # that broadcasts against x
    dim: int | tuple[int, ...] = -1,
) -> Tensor:
    """Returns the sums of squared errors over dimensions, which are kept."""
    error = rounded.sub_(x).square_()
    if importance is not None:
        error *= importance
    return error.sum(dim, keepdim=True)
