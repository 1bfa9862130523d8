"""Recipe files: the options of ``opt8bit compress`` in JSON, with others for single layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt8bit.cli.models import CommandError
from opt8bit.ptq.methods.outliers import STRUCTURES
from opt8bit.quant.grid import RANGES

Overrides = Sequence[Mapping[str, Any]]
METHODS = ("rtn", "gptq", "quantease")
OF_LAYERS: dict[str, type | tuple[str, ...]] = {  # what an override may have: values of a type, or some words
    "method": METHODS,
    "bits": int,
    "group_size": int,
    "symmetric": bool,
    "range": RANGES,
    "polish": bool,
    "outliers": float,
    "outlier_structure": STRUCTURES,
    "act_order": bool,
    "skip": bool,
}
FLAGS = {name for name, allowed in OF_LAYERS.items() if allowed is bool}
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


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
    for name in FLAGS & recipe.keys():
        if not isinstance(recipe[name], bool):
            raise CommandError(f"{path}: {name} must be true or false, got {recipe[name]!r}")
    return [word for name, value in recipe.items() for word in _words(name, value)], overrides


def _check_override(path: Path, override: Any) -> None:
    if not isinstance(override, dict) or not isinstance(override.get("layers"), str):
        raise CommandError(f"{path}: an override is an object with a pattern of names as 'layers', got {override!r}")
    for name, value in override.items():
        if name == "layers":
            continue
        if name not in OF_LAYERS:
            raise CommandError(f"{path}: an override may have {', '.join(OF_LAYERS)}, got {name!r}")
        allowed = OF_LAYERS[name]
        if isinstance(allowed, tuple) and value not in allowed:
            raise CommandError(f"{path}: {name} of an override must be one of {', '.join(allowed)}, got {value!r}")
        if isinstance(allowed, type) and type(value) not in (allowed, int if allowed is float else allowed):
            raise CommandError(f"{path}: {name} of an override must be {WORDS[allowed]}, got {value!r}")


def _words(name: str, value: Any) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}", str(value)]
