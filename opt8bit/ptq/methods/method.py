"""What every rounding method takes and gives: the layer objective, the format, the rounded weight."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.methods.kernels import kernels_for
from opt8bit.quant.grid import Grid, Scales

PIECE = 128  # columns that are rounded before those behind them are brought up to date


@dataclass(frozen=True)
class Format:
    """How a weight (out, in) is stored: a grid, fitted to every ``group_size`` weights of a row.

    Args:
        grid: the values of one group.
        group_size: weights per group, a divisor of ``in``; None for whole rows (per channel).
    """

    grid: Grid
    group_size: int | None = None

    def groups_of(self, weight: Tensor) -> int:
        """The group size for a weight (out, in).

        Raises:
            ValueError: it does not divide ``in``.
        """
        columns = weight.shape[1]
        size = columns if self.group_size is None else self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or columns % size:
            raise ValueError(f"group_size must be a positive divisor of the {columns} inputs, got {size!r}")
        return size


@dataclass(frozen=True)
class Outliers:
    """Weights that are kept exact: ``values`` at (``rows``, ``columns``), added to what the codes hold there."""

    rows: Tensor  # (k,) int64
    columns: Tensor  # (k,) int64
    values: Tensor  # (k,)
    whole_columns: bool = False  # then one index a column is enough

    @property
    def bits(self) -> int:
        """Of the values, at 16 bits, and of the indices that say where they stand, at 32 bits."""
        indices = len(self.columns.unique()) if self.whole_columns else self.values.numel()
        return 16 * self.values.numel() + 32 * indices

    def rows_from(self, start: int, stop: int) -> Outliers:
        """Those of rows ``start`` to ``stop``, counted from ``start``."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Outliers(self.rows[inside] - start, self.columns[inside], self.values[inside], self.whole_columns)


@dataclass(frozen=True)
class Rounded:
    """A weight (out, in) as codes and scales, and the outliers beside them."""

    codes: Tensor  # (out, in) uint8
    scales: Scales  # (out, groups) each
    format: Format
    outliers: Outliers | None = None

    @classmethod
    def of(cls, on_grid: Tensor, scales: Scales, format: Format, outliers: Outliers | None = None) -> Rounded:
        """Codes a weight (out, in) that lies on its grid already, or takes the nearest."""
        groups = on_grid.unflatten(1, (scales.scale.shape[1], -1))
        codes = format.grid.encode(groups, scales.at((..., None)))
        return cls(codes.flatten(1), scales, format, outliers)

    def on_grid(self) -> Tensor:
        """The weight without outliers, (out, in), in the dtype of the scales."""
        groups = self.codes.unflatten(1, (self.scales.scale.shape[1], -1))
        return self.format.grid.decode(groups, self.scales.at((..., None))).flatten(1)

    def dequantize(self) -> Tensor:
        """The weight, (out, in), in the dtype of the scales."""
        weight = self.on_grid()
        if self.outliers is not None:
            weight[self.outliers.rows, self.outliers.columns] += self.outliers.values
        return weight

    def rows_from(self, start: int, stop: int) -> Rounded:
        """Rows ``start`` to ``stop`` as a weight of their own."""
        outliers = None if self.outliers is None else self.outliers.rows_from(start, stop)
        part = slice(start, stop)
        return Rounded(self.codes[part], self.scales.at(part), self.format, outliers)

    @property
    def bits_per_weight(self) -> float:
        """Everything stored counted: codes, scales, zero points; 16 bits of value and 32 of place per outlier."""
        grid, weights = self.format.grid, self.codes.numel()
        stored = weights * grid.bits + self.scales.scale.numel() * grid.bits_per_block
        if self.outliers is not None:
            stored += self.outliers.bits
        return stored / weights


class Method(ABC):
    """Decides which grid value each weight becomes."""

    rowwise: ClassVar[bool] = True  # whether a row's result depends on no other row
    uses_hessian: ClassVar[bool] = True

    @property
    def keeps_outliers(self) -> bool:
        """Whether some weights are kept exact, beside the codes."""
        return False

    @abstractmethod
    def round(
        self,
        weight: Tensor,  # (out, in), float32 or float64
        hessian: Tensor,  # (in, in), symmetric, positive semi-definite
        format: Format,
    ) -> Rounded:
        """A weight Ŵ of the format that makes ``objective(weight, Ŵ, hessian)`` small.

        Raises:
            ValueError: the group size does not divide ``in``, or ``hessian`` is not finite or not that of any inputs.
        """


def check_method(name: str, value: object) -> None:
    """
    Raises:
        TypeError: ``value`` is not a method.
    """
    if not isinstance(value, Method):
        raise TypeError(f"{name} must be one of opt8bit.ptq, such as GPTQ(), got {value!r}")


def objective(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
) -> Tensor:
    """``tr((W - Ŵ) H (W - Ŵ)ᵀ)``: with H = E[x xᵀ] the squared error of the layer's output, summed over outputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()


def fit_groups(weight: Tensor, format: Format, importance: Tensor | None = None) -> Scales:
    """Scales (out, groups) of a whole weight (out, in); ``importance`` (in,) weighs the errors of its columns."""
    group_size = format.groups_of(weight)
    kernels = kernels_for(weight, format.grid)
    if kernels is not None:
        return kernels.fit(weight, group_size, weight.new_ones(weight.shape[1]) if importance is None else importance)
    groups = weight.unflatten(1, (-1, group_size))
    if importance is not None:
        importance = importance.to(weight.dtype).unflatten(0, groups.shape[1:])
    return format.grid.fit(groups, importance).at((..., 0))


def group_numbers(weight: Tensor, group_size: int) -> Tensor:
    """The group that each column of a weight (out, in) belongs to, (in,)."""
    return torch.arange(weight.shape[1], device=weight.device) // group_size


def by_column(scales: Scales, group_of: Tensor) -> Scales:
    """Scales (out, groups) laid out column by column of the weight, (in, out)."""
    return Scales(*(part.T[group_of] for part in scales))


def pieces(group_of: Tensor) -> Iterator[tuple[int, int]]:
    """Cuts columns into runs of at most ``PIECE`` that never cross from one group into the next."""
    start = 0
    for length in torch.unique_consecutive(group_of, return_counts=True)[1].tolist():
        for first in range(start, start + length, PIECE):
            yield first, min(first + PIECE, start + length)
        start += length
