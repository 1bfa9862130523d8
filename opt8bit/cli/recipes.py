"""Recipe files: the options of ``opt8bit compress`` in JSON, with others for single layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt8bit.cli.models import CommandError

Overrides = Sequence[Mapping[str, Any]]
OF_LAYERS = (
    "method",
    "bits",
    "group_size",
    "symmetric",
    "range",
    "polish",
    "outliers",
    "outlier_structure",
    "act_order",
    "skip",
)


def read_recipe(path: Path, options: Sequence[str]) -> tuple[list[str], Overrides]:
    """A file's options as the command line would have them, and what it has for single layers.

    Args:
        options: that a file may have, with underscores.

    Raises:
        CommandError: the file cannot be read, or has something else in it.
    """
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise CommandError(f"{path}: a recipe is an object with names of options")
    overrides = recipe.pop("overrides", [])
    unknown = sorted(recipe.keys() - set(options))
    if unknown:
        raise CommandError(f"{path}: {unknown[0]!r} is none of {', '.join(options)}, overrides")
    if not isinstance(overrides, list):
        raise CommandError(f"{path}: overrides must be a list")
    for override in overrides:
        _check_override(path, override)
    return [word for name, value in recipe.items() for word in _words(name, value)], overrides


def _check_override(path: Path, override: Any) -> None:
    if not isinstance(override, dict) or not isinstance(override.get("layers"), str):
        raise CommandError(f"{path}: an override is an object with a pattern of names as 'layers', got {override!r}")
    unknown = sorted(override.keys() - {"layers", *OF_LAYERS})
    if unknown:
        raise CommandError(f"{path}: an override may have {', '.join(OF_LAYERS)}, got {unknown[0]!r}")
    if override.get("skip") not in (None, False, True):
        raise CommandError(f"{path}: skip must be true or false, got {override['skip']!r}")


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
