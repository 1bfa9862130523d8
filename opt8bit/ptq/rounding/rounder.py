"""What every rounding method takes and gives."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from opt8bit.ptq.calibration.statistics import InputStatistics
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
        """A weight Ŵ of the scheme that makes ``objective(weight, Ŵ, statistics.second_moments)`` small.

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


def objective(
    weight: Tensor,  # (out, in)
    rounded: Tensor,  # (out, in)
    hessian: Tensor,  # (in, in)
) -> Tensor:
    """``tr((W - Ŵ) H (W - Ŵ)ᵀ)``: with H = E[x xᵀ] the squared error of the layer's output, summed over outputs."""
    difference = (weight - rounded).to(hessian.dtype)
    return ((difference @ hessian) * difference).sum()
