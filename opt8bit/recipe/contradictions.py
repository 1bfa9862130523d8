"""Options of a recipe that contradict each other."""

from __future__ import annotations

from typing import Any

from opt8bit.recipe.arguments import check_fraction
from opt8bit.recipe.gguf_types import is_gguf_type
from opt8bit.recipe.options import defaults_of

# What a method has itself, if it is no name, or another than the recipe's.
METHOD_OPTIONS = ("act_order", "polish", "outliers", "outlier_structure")
GRID_OPTIONS = ("bits", "symmetric", "range")  # that a grid has itself


def grid_options(grid: Any) -> tuple[str, ...]:
    """Returns the options that a recipe's grid has itself: one that is named is made with the recipe's range."""
    if not isinstance(grid, str):
        return GRID_OPTIONS
    own = GRID_OPTIONS[:2]
    return (*own, "group_size") if is_gguf_type(grid) else own


def check_contradictions(recipe: Any) -> None:
    """Checks the options of a :class:`Recipe` against each other.

    Raises:
        ValueError: two contradict each other. The message says what to leave out.
    """
    _check_method(recipe)
    _check_grid(recipe)
    _check_correction(recipe)


def _check_method(recipe: Any) -> None:
    """
    Raises:
        ValueError: options contradict the method.
    """
    method = recipe.method
    if not isinstance(method, str):
        own = [
            name for name, default in defaults_of(recipe, METHOD_OPTIONS).items() if getattr(recipe, name) != default
        ]
        if own:
            raise ValueError(f"{own[0]} is that of method={method!r}: leave it out")
        return
    if recipe.act_order is not None and method != "gptq":
        raise ValueError(f"act_order, on or off, is GPTQ's: it has no meaning for {method}")
    if method == "quantease" and recipe.polish is False:
        raise ValueError("quantease is coordinate descent: without polish nothing is left of it")
    check_fraction("outliers", recipe.outliers)
    if method == "rtn" and recipe.outliers:
        raise ValueError("outliers are chosen by the inputs, which rtn does not look at: use gptq or quantease")
    if recipe.outlier_structure is not None and not recipe.outliers:
        raise ValueError("outlier_structure says how outliers stand: give their fraction, outliers, too")


def _check_grid(recipe: Any) -> None:
    """
    Raises:
        ValueError: options contradict the grid, or there is no such width or group size.
    """
    names = grid_options(recipe.grid)
    defaults = defaults_of(recipe, names)
    if recipe.grid is not None and any(getattr(recipe, name) != value for name, value in defaults.items()):
        *most, last = names
        raise ValueError(f"{', '.join(most)} and {last} are those of grid={recipe.grid!r}: leave them out")
    if not 2 <= recipe.bits <= 8:
        raise ValueError(f"bits must be 2 to 8, got {recipe.bits!r}")
    if isinstance(recipe.group_size, int) and recipe.group_size < 1:  # whole rows are kept as None
        raise ValueError(f"group_size must be at least 1, or 0, -1 or None for whole rows, got {recipe.group_size!r}")


def _check_correction(recipe: Any) -> None:
    """
    Raises:
        ValueError: options contradict the correction.
    """
    if recipe.error_propagation is not None:
        check_fraction("error_propagation", recipe.error_propagation)
    if recipe.bias_correction == "none" and recipe.statistic != "mean":
        raise ValueError(f"statistic={recipe.statistic!r} has no bias to serve: bias_correction is 'none'")
    if recipe.bias_correction == "joint" and recipe.statistic != "mean":
        raise ValueError(
            f"bias_correction='joint' is least squares: statistic must be 'mean', got {recipe.statistic!r}"
        )
    if recipe.error_propagation and recipe.bias_correction == "local":
        raise ValueError(
            "bias_correction='local' would undo what the asymmetric target does: error_propagation must be 0"
        )
