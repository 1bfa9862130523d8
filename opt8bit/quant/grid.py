"""Grids: the values that the weights of one block can take. A grid fits its scales to a block, encodes, decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

RANGES = ("minmax", "mse")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The fractions of a block's full range that the search tries. Below a fifth, clipping costs more than it gains.
FRACTIONS = torch.linspace(1.0, 0.2, 41, dtype=torch.float64).tolist()
STEP = 0.02  # from one to the next


# What a grid keeps per block: a NamedTuple of tensors of a shape that broadcasts against the block, (..., 1).
P = TypeVar("P", bound=tuple[Tensor, ...])


def mapped(params: P, change: Callable[[Tensor], Tensor]) -> P:
    """Returns the params that ``change`` makes of each of a grid's params."""
    make: Any = type(params)
    return make(*(change(part) for part in params))


def at(params: P, index: Any) -> P:
    """Returns a grid's params at an index, as of a tensor."""
    return mapped(params, lambda part: part[index])


class Grid(ABC, Generic[P]):
    """The values of one block: ``decode(code, params)`` for every code below ``2^bits``.

    Args:
        scale_dtype: that scales are stored in: float32, bfloat16 or float16. Only what it holds is ever fitted.

    Raises:
        ValueError: ``scale_dtype`` is another one.
    """

    params_type: ClassVar[Any]  # P

    def __init__(self, scale_dtype: torch.dtype = torch.float32) -> None:
        if scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype must be one of {', '.join(map(str, SCALE_DTYPES))}, got {scale_dtype!r}")
        self.scale_dtype = scale_dtype

    @property
    @abstractmethod
    def bits(self) -> int:
        """The bits of one code."""

    @property
    def together(self) -> int:
        """The number of neighbouring blocks of a row that ``fit`` has to see together, as (..., blocks, g)."""
        return 1

    @abstractmethod
    def stored_bits(self, codes: Tensor, params: P) -> int:
        """Returns the bits that codes and params take when they are stored."""

    @abstractmethod
    def fit(
        self,
        block: Tensor,  # (..., g)
        importance: Tensor | None = None,  # (..., g) or (g,)
    ) -> P:
        """Params for blocks of weights; errors of ``block[..., k]`` weigh by ``importance[..., k]`` (default 1)."""

    @abstractmethod
    def encode(self, x: Tensor, params: P) -> Tensor:
        """Returns the codes of the grid values nearest to ``x``, as uint8 of its shape."""

    @abstractmethod
    def decode(self, codes: Tensor, params: P) -> Tensor:
        """Returns the values of ``codes``, in the dtype of the params."""

    @abstractmethod
    def nearest(self, x: Tensor, params: P) -> Tensor:
        """Returns ``decode(encode(x, params), params)``, without the codes."""

    def for_weights(self, weights: Sequence[Tensor]) -> Grid[P]:
        """Returns the grid on which weights (out, in) are fitted together, as those of layers that share an input."""
        return self

    def storable(self, scale: Tensor, params: P | None = None) -> Tensor:
        """Returns the nearest positive scales that ``scale_dtype`` holds, in the dtype of ``scale``.

        Args:
            scale: (out, groups).
            params: of the same groups, on which it may depend what is stored.
        """
        if self.scale_dtype == torch.float32:
            return scale
        info = torch.finfo(self.scale_dtype)
        least = info.tiny * info.eps if self.scale_dtype == torch.float16 else info.tiny  # of float16 subnormals, too
        return scale.to(self.scale_dtype).to(scale.dtype).clamp(least, info.max)

    def nearest_stored(self, x: Tensor) -> Tensor:
        """Returns the nearest numbers of either sign that ``scale_dtype`` holds, in the dtype of ``x``."""
        largest = torch.finfo(self.scale_dtype).max
        return x.clamp(-largest, largest).to(self.scale_dtype).to(x.dtype)


def checked_range(range: str) -> str:
    if range not in RANGES:
        raise ValueError(f"range must be one of {', '.join(RANGES)}, got {range!r}")
    return range


def best(grid: Grid[P], block: Tensor, importance: Tensor | None, candidates: Iterable[P], full: P) -> P:
    """Returns the candidate of least squared error, block by block; ties go to the earlier one."""
    least, best = torch.full_like(full[0], torch.inf), full
    for candidate in candidates:
        error = (grid.nearest(block, candidate) - block).square_()
        if importance is not None:
            error *= importance
        total = error.sum(-1, keepdim=True)
        better = total < least
        least = torch.where(better, total, least)
        make: Any = type(full)
        best = make(*(torch.where(better, new, old) for new, old in zip(candidate, best, strict=True)))
    return best
