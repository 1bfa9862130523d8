"""Recipe files: the options of ``opt8bit compress`` in JSON, with others for single layers. Needs no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from opt8bit.cli.errors import CommandError
from opt8bit.cli.run_options import RunOptions
from opt8bit.recipe import Recipe
from opt8bit.recipe.options import options_of, values_of
from opt8bit.recipe.recipe import OVERRIDES, read_values


def read_recipe(path: Path) -> dict[str, Any]:
    """Returns a file's options by name, checked one by one, and its overrides.

    Raises:
        CommandError: the file cannot be read, or has something else in it.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the recipe {path}: {error}") from error
    try:
        return read_values(values, options_of(RunOptions))
    except ValueError as error:
        raise CommandError(f"{path}: {error}") from error


def options_from(values: dict[str, Any]) -> tuple[Recipe, RunOptions]:
    """Returns the recipe, and the options beside it, that have these values.

    Raises:
        CommandError: they contradict each other.
    """
    beside = options_of(RunOptions)
    try:
        recipe = Recipe(**{name: value for name, value in values.items() if name not in beside})
        return recipe, RunOptions(**{name: value for name, value in values.items() if name in beside})
    except (TypeError, ValueError) as error:
        raise CommandError(str(error)) from error


def recipe_file(recipe: Recipe, run: RunOptions) -> dict[str, Any]:
    """Returns what a recipe file says."""
    values = recipe.to_dict()
    overrides = values.pop(OVERRIDES)
    return {**values, **values_of(run), OVERRIDES: overrides}
