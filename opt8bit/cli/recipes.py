"""Recipe files: the options of ``opt8bit compress`` in JSON, with others for single layers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opt8bit.cli.models import DTYPES, CommandError
from opt8bit.ptq.bias import CORRECTIONS, SHIFTS
from opt8bit.ptq.export import FORMATS
from opt8bit.ptq.methods.outliers import STRUCTURES
from opt8bit.quant.grid import RANGES

Overrides = Sequence[Mapping[str, Any]]
METHODS = ("rtn", "gptq", "quantease")
STATISTICS = SHIFTS[:2]
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
OF_RUNS: dict[str, type | tuple[str, ...]] = {  # what a recipe may have
    **{name: allowed for name, allowed in OF_LAYERS.items() if name != "skip"},
    "correct": CORRECTIONS,
    "statistic": STATISTICS,
    "error_propagation": float,
    "samples": int,
    "held_out": int,
    "sequence_length": int,
    "format": tuple(FORMATS),
    "seed": int,
    "dtype": DTYPES,
}
WORDS = {int: "a whole number", float: "a number", bool: "true or false"}


def read_recipe(path: Path) -> tuple[list[str], Overrides]:
    """A file's options as the command line would have them, and what it has for single layers.

    Raises:
        CommandError: the file cannot be read, or has something else in it.
    """
    try:
        recipe = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise CommandError(f"cannot read the recipe {path}: {error}") from error
    if not isinstance(recipe, dict):
        raise CommandError(f"{path}: a recipe is an object with names of options")
    overrides = recipe.pop("overrides", [])
    unknown = sorted(recipe.keys() - OF_RUNS.keys())
    if unknown:
        raise CommandError(f"{path}: {unknown[0]!r} is none of {', '.join(OF_RUNS)}, overrides")
    if not isinstance(overrides, list):
        raise CommandError(f"{path}: overrides must be a list")
    for override in overrides:
        _check_override(path, override)
    for name, value in recipe.items():
        _check_value(f"{path}: {name}", OF_RUNS[name], value)
    return [_word(name, value) for name, value in recipe.items()], overrides


def _check_override(path: Path, override: Any) -> None:
    if not isinstance(override, dict) or not isinstance(override.get("layers"), str):
        raise CommandError(f"{path}: an override is an object with a pattern of names as 'layers', got {override!r}")
    given = {name: value for name, value in override.items() if name != "layers"}
    if not given:
        raise CommandError(f"{path}: an override has some of {', '.join(OF_LAYERS)}, got {override!r}")
    for name, value in given.items():
        if name not in OF_LAYERS:
            raise CommandError(f"{path}: an override may have {', '.join(OF_LAYERS)}, got {name!r}")
        _check_value(f"{path}: {name} of an override", OF_LAYERS[name], value)
    if given.get("skip") and len(given) > 1:
        raise CommandError(f"{path}: an override that skips its layers has no other options, got {override!r}")


def _check_value(where: str, allowed: type | tuple[str, ...], value: Any) -> None:
    if isinstance(allowed, tuple) and value not in allowed:
        raise CommandError(f"{where} must be one of {', '.join(allowed)}, got {value!r}")
    if isinstance(allowed, type) and type(value) not in (allowed, int if allowed is float else allowed):
        raise CommandError(f"{where} must be {WORDS[allowed]}, got {value!r}")


def _word(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    return f"--{flag}={value}"  # as one word, or a negative number would be taken for a flag
