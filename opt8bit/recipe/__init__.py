"""Describes compressions without torch: the command's help and recipe files need no more."""

from opt8bit.recipe.overrides import Override
from opt8bit.recipe.recipe import Recipe

__all__ = ["Override", "Recipe"]
