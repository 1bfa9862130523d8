"""Grids: the values that the weights of one block can take. A grid fits its scales to a block, encodes, decodes."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from opt8bit.quant.codebook import check_codebook

RANGES = ("minmax", "mse")
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The fractions of a block's full range that the search tries. Below a fifth, clipping costs more than it gains.
FRACTIONS = torch.linspace(1.0, 0.2, 41, dtype=torch.float64).tolist()


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
        """Bits of one code."""

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
        """The codes of the grid values nearest to ``x``, as uint8 of its shape."""

    @abstractmethod
    def decode(self, codes: Tensor, params: P) -> Tensor:
        """The values of ``codes``, in the dtype of the params."""

    @abstractmethod
    def nearest(self, x: Tensor, params: P) -> Tensor:
        """``decode(encode(x, params), params)``, without the codes."""

    def storable(self, scale: Tensor) -> Tensor:
        """The nearest positive scales that ``scale_dtype`` holds, in the dtype of ``scale``; float32 takes all."""
        if self.scale_dtype == torch.float32:
            return scale
        info = torch.finfo(self.scale_dtype)
        least = info.tiny * info.eps if self.scale_dtype == torch.float16 else info.tiny  # of float16 subnormals, too
        return scale.to(self.scale_dtype).to(scale.dtype).clamp(least, info.max)


class UniformParams(NamedTuple):
    """What a :class:`UniformGrid` keeps per block."""

    scale: Tensor  # positive
    zero_point: Tensor  # integers


class UniformGrid(Grid[UniformParams]):
    """Evenly spaced values: ``(q - zero_point) * scale`` for q = 0 .. 2^bits - 1, zero among them.

    Args:
        bits: 2 to 8.
        symmetric: the zero point is ``2^(bits-1)`` in every block and none is stored; otherwise it is fitted.
        range: "minmax" spans a block's smallest and largest weight (and zero); "mse" tries fractions of that
            range and takes the one of least squared error, clipping what lies beyond it.
        scale_dtype: see :class:`Grid`.

    Raises:
        ValueError: an argument is not one of these.
    """

    params_type = UniformParams

    def __init__(
        self,
        bits: int,
        *,
        symmetric: bool = False,
        range: str = "minmax",
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(scale_dtype)
        if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 8:
            raise ValueError(f"bits must be 2 to 8, got {bits!r}")
        if not isinstance(symmetric, bool):
            raise ValueError(f"symmetric must be True or False, got {symmetric!r}")
        self._bits = bits
        self.symmetric = symmetric
        self.range = _checked_range(range)

    def __repr__(self) -> str:
        scales = "" if self.scale_dtype == torch.float32 else f", scale_dtype={self.scale_dtype}"
        return f"UniformGrid({self._bits}, symmetric={self.symmetric}, range={self.range!r}{scales})"

    @property
    def bits(self) -> int:
        return self._bits

    def stored_bits(self, codes: Tensor, params: UniformParams) -> int:
        per_block = 8 * self.scale_dtype.itemsize + (0 if self.symmetric else self._bits)
        return self._bits * codes.numel() + per_block * params.scale.numel()

    @property
    def largest(self) -> int:
        """The largest code."""
        return 2**self._bits - 1

    def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
        low = block.amin(-1, keepdim=True).clamp(max=0)
        high = block.amax(-1, keepdim=True).clamp(min=0)
        if self.symmetric:
            high = torch.maximum(high, -low)
            low = -high
        full = self._spanning(low, high)
        if self.range == "minmax":
            return full
        return _best(self, block, importance, (self._spanning(low * part, high * part) for part in FRACTIONS), full)

    def _spanning(self, low: Tensor, high: Tensor) -> UniformParams:
        scale = (high - low) / self.largest
        scale = self.storable(torch.where(scale > 0, scale, 1))  # 1 for a block of zeros
        middle = torch.full_like(scale, 2 ** (self._bits - 1))
        # A scale that was rounded down would put it beyond the last code.
        return UniformParams(scale, middle if self.symmetric else (-low / scale).round().clamp_(max=self.largest))

    def encode(self, x: Tensor, params: UniformParams) -> Tensor:
        return (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest).to(torch.uint8)

    def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
        return (codes - params.zero_point) * params.scale

    def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
        steps = (x / params.scale).round_().add_(params.zero_point).clamp_(0, self.largest)
        return steps.sub_(params.zero_point).mul_(params.scale)


class CodebookParams(NamedTuple):
    """What a :class:`CodebookGrid` keeps per block."""

    scale: Tensor  # positive


class CodebookGrid(Grid[CodebookParams]):
    """Any values: ``codebook[q] * scale``, as the optimizer states are stored.

    Args:
        codebook: (n,) float32, ascending, 2 to 256 values: :func:`normal_float`, :func:`dynamic_map` ...
        range: "minmax" scales a block's largest magnitude to the codebook's; "mse" a fraction of it, that of the least
            squared error.
        scale_dtype: see :class:`Grid`.

    Raises:
        TypeError, ValueError: ``codebook``, ``range`` or ``scale_dtype`` is not one.
    """

    params_type = CodebookParams

    def __init__(self, codebook: Tensor, *, range: str = "minmax", scale_dtype: torch.dtype = torch.float32) -> None:
        super().__init__(scale_dtype)
        check_codebook(codebook)
        self.codebook = codebook
        self.range = _checked_range(range)

    def __repr__(self) -> str:
        values = f"{self.codebook.numel()} values #{zlib.crc32(self.codebook.cpu().numpy().tobytes()):08x}"
        return f"CodebookGrid({values}, range={self.range!r}, scale_dtype={self.scale_dtype})"

    @property
    def bits(self) -> int:
        return (self.codebook.numel() - 1).bit_length()

    def stored_bits(self, codes: Tensor, params: CodebookParams) -> int:
        return self.bits * codes.numel() + 8 * self.scale_dtype.itemsize * params.scale.numel()

    def fit(self, block: Tensor, importance: Tensor | None = None) -> CodebookParams:
        absmax = block.abs().amax(-1, keepdim=True) / self.codebook.abs().max().to(block)
        absmax = torch.where(absmax > 0, absmax, 1)
        full = CodebookParams(self.storable(absmax))
        if self.range == "minmax":
            return full
        candidates = (CodebookParams(self.storable(absmax * part)) for part in FRACTIONS)
        return _best(self, block, importance, candidates, full)

    def encode(self, x: Tensor, params: CodebookParams) -> Tensor:
        values = self.codebook.to(device=x.device, dtype=torch.float64)
        middles = ((values[1:] + values[:-1]) / 2).to(x.dtype)
        return torch.bucketize((x / params.scale).contiguous(), middles).to(torch.uint8)

    def decode(self, codes: Tensor, params: CodebookParams) -> Tensor:
        return self.codebook.to(params.scale)[codes.long()] * params.scale

    def nearest(self, x: Tensor, params: CodebookParams) -> Tensor:
        return self.decode(self.encode(x, params), params)


def _checked_range(range: str) -> str:
    if range not in RANGES:
        raise ValueError(f"range must be one of {', '.join(RANGES)}, got {range!r}")
    return range


def _best(grid: Grid[P], block: Tensor, importance: Tensor | None, candidates: Iterable[P], full: P) -> P:
    """The candidate of least squared error, block by block; ties go to the earlier one."""
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
