"""Defines what every rounding method takes and returns."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.quant.described import described
from opt8bit.quant.grid import Grid
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme


class Rounder(ABC):
    """Decides which grid value each weight becomes.

    Attributes:
        needs: fields of :class:`InputStatistics` without which it cannot round; none, if it looks at no inputs.
        rowwise: whether a row's result depends on no other row.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"second_moments"})
    rowwise: ClassVar[bool] = True

    @property
    def looks_at_inputs(self) -> bool:
        """Whether anything that is known of the inputs changes the result."""
        return bool(self.needs)

    @property
    def keeps_outliers(self) -> bool:
        """Whether some weights are kept exact, beside the codes."""
        return False

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        """Returns the grid of each part of the weights that it makes."""
        return (scheme.grid,)

    @abstractmethod
    def round(
        self,
        weight: Tensor,  # (out, in), float32 or float64
        statistics: InputStatistics,
        scheme: WeightScheme,
    ) -> QuantizedWeight:
        """Returns a weight Ŵ of the scheme that makes ``objective(weight, Ŵ, statistics.second_moments)`` small.

        Raises:
            ValueError: the group size does not divide ``in``, or the second moments are not finite or not those of any
                inputs.
        """


def check_rounder(name: str, value: object) -> None:
    """
    Raises:
        TypeError: ``value`` is not a rounding method.
    """
    if not isinstance(value, Rounder):
        raise TypeError(f"{name} must be one of opt8bit.ptq, such as GPTQ(), got {value!r}")


def single_part(method: Rounder, start: QuantizedWeight) -> Part:
    """Returns all that a method has to start from.

    Raises:
        ValueError: that is not on a single grid.
    """
    if len(start.parts) != 1 or start.parts[0].columns is not None:
        raise ValueError(f"{type(method).__name__} goes on from a weight on one grid, got {len(start.parts)} parts")
    return start.parts[0]


def check_needs(rounder: Rounder) -> None:
    """
    Raises:
        TypeError: ``needs`` is not a frozenset.
        ValueError: it names something that is not known of inputs.
    """
    name, needs, known = type(rounder).__name__, rounder.needs, InputStatistics._fields
    if not isinstance(needs, frozenset):
        raise TypeError(f"{name}.needs must be a frozenset of some of {', '.join(known)}, got {needs!r}")
    if not needs <= set(known):
        raise ValueError(f"{name}.needs may have {', '.join(known)}, got {', '.join(map(repr, sorted(needs)))}")


def checked_round(
    rounder: Rounder,
    weight: Tensor,  # (out, in)
    statistics: InputStatistics,
    scheme: WeightScheme,
) -> QuantizedWeight:
    """Returns the weight that a method makes of another one, if it is what a method has to return.

    Raises:
        TypeError: it is not a :class:`QuantizedWeight`, or its params are not those of its grid.
        ValueError: it has another shape, or has what the method's ``grids`` and ``keeps_outliers`` do not say.
    """
    name, shape = type(rounder).__name__, tuple(weight.shape)
    rounded: Any = rounder.round(weight, statistics, scheme)
    if not isinstance(rounded, QuantizedWeight):
        raise TypeError(f"{name}.round must return a QuantizedWeight, got {type(rounded).__name__}")
    if tuple(rounded.shape) != shape:
        raise ValueError(f"{name}.round must return a weight of shape {shape}, got {tuple(rounded.shape)}")
    for part in rounded.parts:
        _check_part(f"{name}.round", part, shape)
    said, found = tuple(rounder.grids(scheme)), tuple(rounded.grids)
    if described(said) != described(found):  # by those that are said a resumed run reads the weight
        raise ValueError(f"{name}.grids must name the grid of each part, {found}, got {said}")
    if rounded.outliers is not None and not rounder.keeps_outliers:
        raise ValueError(f"{name}.round returned outliers: its keeps_outliers must be True, got False")
    return rounded


def _check_part(name: str, part: Part, shape: tuple[int, ...]) -> None:
    """
    Raises:
        TypeError, ValueError: the part is not one of a weight of this shape.
    """
    columns = shape[1] if part.columns is None else len(part.columns)
    if part.codes.shape != (shape[0], columns) or part.codes.dtype != torch.uint8:
        found = f"{part.codes.dtype} {tuple(part.codes.shape)}"
        raise ValueError(f"{name} must return codes as torch.uint8 {(shape[0], columns)}, got {found}")
    kind = part.grid.params_type
    if not isinstance(part.params, kind):
        raise TypeError(f"{name} must return params as {kind.__name__}, got {type(part.params).__name__}")
    for field, param in zip(part.params._fields, part.params, strict=True):
        if param.dim() != 2 or len(param) != shape[0] or columns % max(param.shape[1], 1):
            raise ValueError(f"{name} must return {field} as ({shape[0]}, groups), got {tuple(param.shape)}")


def objective(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
) -> Tensor:
    """Returns ``tr((W - Ŵ) H (W - Ŵ)ᵀ)``: with H = E[x xᵀ] the squared error of the output, summed over outputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()
