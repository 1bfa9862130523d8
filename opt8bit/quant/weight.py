"""A quantized weight: codes on grids, and the few weights beside them that are kept exact."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opt8bit.quant.grid import Grid, at, mapped


@dataclass(frozen=True)
class WeightScheme:
    """Says how a weight (out, in) is stored: a grid, fitted to every ``group_size`` weights of a row.

    Args:
        grid: the values of one group.
        group_size: weights per group, a divisor of ``in``; None for whole rows (per channel).
    """

    grid: Grid
    group_size: int | None = None

    def groups_of(self, weight: Tensor) -> int:
        """Returns the group size for a weight (out, in).

        Raises:
            ValueError: it does not divide ``in``, or the grid fits several groups together, which do not.
        """
        columns = weight.shape[1]
        size = columns if self.group_size is None else self.group_size
        if isinstance(size, bool) or not isinstance(size, int) or size < 1 or columns % size:
            raise ValueError(f"group_size must be a positive divisor of the {columns} inputs, got {size!r}")
        if columns % (size * self.grid.together):
            raise ValueError(f"superblocks of {size * self.grid.together} weights do not divide the {columns} inputs")
        return size


@dataclass(frozen=True)
class Part:
    """Columns of a weight that are stored on one grid.

    Args:
        grid: of all its groups, which are equally large.
        codes: of the columns' weights, uint8 (out, n).
        params: what the grid keeps per group, (out, groups) each.
        columns: which columns of the weight these are, int64 (n,); None for all of them.
    """

    grid: Grid
    codes: Tensor
    params: Any
    columns: Tensor | None = None

    @classmethod
    def of(cls, grid: Grid, weight: Tensor, params: Any) -> Part:
        """Encodes a weight (out, n): each number becomes the nearest value of its group's grid."""
        groups = weight.unflatten(1, (params[0].shape[1], -1))
        return cls(grid, grid.encode(groups, at(params, (..., None))).flatten(1), params)

    def dequantize(self) -> Tensor:
        """Returns the values, (out, n), in the dtype of the params."""
        groups = self.codes.unflatten(1, (self.params[0].shape[1], -1))
        return self.grid.decode(groups, at(self.params, (..., None))).flatten(1)

    def by_row(self, change: Callable[[Tensor], Tensor]) -> Part:
        """Returns the part with every tensor that has the weight's rows replaced by what ``change`` makes of it."""
        columns = None if self.columns is None else self.columns.clone()  # a file has no place for what several share
        return replace(self, codes=change(self.codes), params=mapped(self.params, change), columns=columns)

    @property
    def stored_bits(self) -> int:
        """The bits of the codes and params, and 32 for the number of each column where not all are here."""
        indices = 0 if self.columns is None else 32 * self.columns.numel()
        return self.grid.stored_bits(self.codes, self.params) + indices


@dataclass(frozen=True)
class Outliers:
    """Holds weights that are kept exact: ``values`` at (``rows``, ``columns``), added to what the codes hold there."""

    rows: Tensor  # (k,) int64
    columns: Tensor  # (k,) int64
    values: Tensor  # (k,)
    whole_columns: bool = False  # then one index a column is enough

    @property
    def stored_bits(self) -> int:
        """The bits of the values, at 16, and of the indices that say where they are, at 32."""
        indices = len(self.columns.unique()) if self.whole_columns else self.values.numel()
        return 16 * self.values.numel() + 32 * indices

    def rows_from(self, start: int, stop: int) -> Outliers:
        """Returns those of rows ``start`` to ``stop``, counted from ``start``."""
        inside = (self.rows >= start) & (self.rows < stop)
        return Outliers(self.rows[inside] - start, self.columns[inside], self.values[inside], self.whole_columns)


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight (out, in): the sum of its parts, and of the outliers beside them.

    Only its grids know what the parts' codes and params mean. All else asks the weight itself.
    """

    shape: tuple[int, int]
    parts: tuple[Part, ...]
    outliers: Outliers | None = None

    @classmethod
    def of(cls, weight: Tensor, params: Any, scheme: WeightScheme, outliers: Outliers | None = None) -> QuantizedWeight:
        """Encodes a weight (out, in) on a single grid: each number becomes the nearest value of its group."""
        return cls((weight.shape[0], weight.shape[1]), (Part.of(scheme.grid, weight, params),), outliers)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """The grid of each part."""
        return tuple(part.grid for part in self.parts)

    def on_grid(self) -> Tensor:
        """Returns the weight without outliers, (out, in), in the dtype of the params."""
        if len(self.parts) == 1 and self.parts[0].columns is None:
            return self.parts[0].dequantize()
        values = [part.dequantize() for part in self.parts]
        weight = values[0].new_zeros(self.shape)
        for part, value in zip(self.parts, values, strict=True):
            columns = slice(None) if part.columns is None else part.columns
            weight[:, columns] += value
        return weight

    def dequantize(self) -> Tensor:
        """Returns the weight, (out, in), in the dtype of the params."""
        weight = self.on_grid()
        if self.outliers is not None:
            weight[self.outliers.rows, self.outliers.columns] += self.outliers.values
        return weight

    def rows_from(self, start: int, stop: int) -> QuantizedWeight:
        """Returns rows ``start`` to ``stop`` as a weight of their own."""
        outliers = None if self.outliers is None else self.outliers.rows_from(start, stop)
        return self.by_row(lambda tensor: tensor[start:stop], outliers)

    def by_row(self, change: Callable[[Tensor], Tensor], outliers: Outliers | None = None) -> QuantizedWeight:
        """Returns the weight that has ``change(tensor)`` in place of each tensor of its parts, rows first."""
        parts = tuple(part.by_row(change) for part in self.parts)
        return QuantizedWeight((parts[0].codes.shape[0], self.shape[1]), parts, outliers)

    @property
    def stored_bits(self) -> int:
        """The bits of everything stored: codes, scales, zero points, and 16 of value and 32 of place per outlier."""
        outliers = 0 if self.outliers is None else self.outliers.stored_bits
        return sum(part.stored_bits for part in self.parts) + outliers

    @property
    def bits_per_weight(self) -> float:
        """The bits of everything stored, divided by the number of weights."""
        return self.stored_bits / (self.shape[0] * self.shape[1])

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that :meth:`from_tensors` needs beside the grids, by names without a space."""
        found: dict[str, Tensor] = {}
        for i, part in enumerate(self.parts):
            fields: dict[str, Tensor] = {"codes": part.codes, **part.params._asdict()}
            if part.columns is not None:
                fields["columns"] = part.columns
            found |= {f"{i}.{field}": tensor for field, tensor in fields.items()}
        if self.outliers is not None:
            found |= {
                "outliers.rows": self.outliers.rows,
                "outliers.columns": self.outliers.columns,
                "outliers.values": self.outliers.values,
                "outliers.whole_columns": torch.tensor(self.outliers.whole_columns, device="cpu"),
            }
        return {**found, "shape": torch.tensor(self.shape, device="cpu")}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], grids: Sequence[Grid]) -> QuantizedWeight:
        """Returns the weight whose :meth:`tensors` these are.

        Args:
            tensors: by name.
            grids: one for each part.
        """
        parts = []
        for i, grid in enumerate(grids):
            params = grid.params_type(**{field: tensors[f"{i}.{field}"] for field in grid.params_type._fields})
            parts.append(Part(grid, tensors[f"{i}.codes"], params, tensors.get(f"{i}.columns")))
        outliers = None
        if "outliers.rows" in tensors:
            whole = bool(tensors["outliers.whole_columns"])
            places = (tensors["outliers.rows"], tensors["outliers.columns"])
            outliers = Outliers(*places, tensors["outliers.values"], whole)
        rows, columns = tensors["shape"].tolist()
        return cls((rows, columns), tuple(parts), outliers)
