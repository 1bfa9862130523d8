"""The scheme of a layer's weight: the grid that a recipe describes, or a type of llama.cpp's blocks."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from opt8bit.backends import first_of
from opt8bit.ptq import ranks
from opt8bit.ptq.model.blocks import by_pattern, find_blocks
from opt8bit.ptq.model.gguf.grids import scheme_of_type
from opt8bit.quant.uniform import UniformGrid
from opt8bit.quant.weight import WeightScheme
from opt8bit.recipe.gguf_types import GGUF_TYPES, is_gguf_type
from opt8bit.recipe.recipe import Recipe
from opt8bit.recipe.registry import GRIDS
from opt8bit.recipe.runtimes import DENSE

NAMED = 4  # patterns of layers in a line
HOLD_TYPES = (None, "gguf", DENSE)  # formats that weights on a type's grid can be written in

logger = logging.getLogger(__name__)


def scheme_for(recipe: Recipe, range: str, scale_dtype: torch.dtype) -> WeightScheme:
    """Returns the scheme of a layer.

    Args:
        recipe: of the layer, with nothing left to be chosen.
        range: of the grid.
        scale_dtype: of scales, where the recipe's grid has no other.
    """
    if is_gguf_type(recipe.grid):
        return scheme_of_type(recipe.grid, range)
    grid = recipe.grid
    if isinstance(grid, str):
        grid = GRIDS[grid](range=range)
    elif grid is None:
        grid = UniformGrid(recipe.bits, symmetric=recipe.symmetric or False, range=range, scale_dtype=scale_dtype)
    return WeightScheme(grid, recipe.group_size)  # type: ignore[arg-type]


def fallen_back(recipe: Recipe, columns: int, checkpoint_format: str | None) -> tuple[Recipe, str]:
    """Returns a layer's recipe with the type that llama.cpp takes where one does not divide rows, and a note on it.

    Args:
        recipe: of the layer.
        columns: inputs of the layer.
        checkpoint_format: that it is meant for.

    Raises:
        ValueError: the format does not hold the recipe's type of blocks.
    """
    if not is_gguf_type(recipe.grid):
        return recipe, ""
    if checkpoint_format not in HOLD_TYPES:
        raise ValueError(f"grid={recipe.grid!r} is for the formats gguf and dense, got {checkpoint_format!r}")
    asked = GGUF_TYPES[recipe.grid]
    if asked.fallback is None or columns % asked.block == 0:
        return recipe, ""
    note = f"{asked.fallback} in place of {recipe.grid}, as {asked.block} does not divide its {columns} inputs"
    return replace(recipe, grid=asked.fallback), note


def log_fallbacks(model: nn.Module, notes: Mapping[str, str]) -> None:
    """Logs the layers that get another type of blocks than was asked for.

    Args:
        model: of the layers.
        notes: of :func:`fallen_back`, by layer; empty ones are left out.
    """
    fell = {name: note for name, note in notes.items() if note}
    if fell and not ranks.rank():
        prefix, blocks = find_blocks(model)
        found = [f"{pattern}: {note}" for pattern, note in by_pattern(fell, prefix, len(blocks))]
        logger.info("%s", first_of(found, NAMED, "; "))
