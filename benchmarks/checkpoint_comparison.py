"""Compares the files of a compressed checkpoint with the original's, for ``architecture_checks.py``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

OF_A_MATRIX = 0.5  # of its norm, which rounding and what makes up for the layers before may change
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")  # of a packed weight
OF_THE_RUN = ("transformers_version", "quantization_config")  # entries of config.json that may differ


class Wrong(Exception):
    """The compressed checkpoint is not what it should be."""


def tensors_of(folder: Path) -> dict[str, Tensor]:
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            found |= {name: handle.get_tensor(name) for name in handle.keys()}
    return found


def compare_files(source: Mapping[str, Tensor], written: Mapping[str, Tensor], *, packed: bool) -> None:
    """
    Raises:
        Wrong: a tensor is missing, or is not the source's, or there is one too many.
    """
    layers = {name.removesuffix("_packed") for name in written if name.endswith(".weight_packed")}
    parts = {name for name in written if name.rpartition(".")[2] in PARTS} if packed else set()
    missing, added = source.keys() - written.keys() - layers, written.keys() - source.keys() - parts
    if missing or added:
        names = f"lacks {min(missing)}" if missing else f"has {min(added)} too"
        raise Wrong(f"the file {names}, {len(missing)} are missing and {len(added)} added")
    changed = set(layers)
    for name in source.keys() & written.keys():
        before, after = source[name], written[name]
        if (before.shape, before.dtype) != (after.shape, after.dtype):
            raise Wrong(f"{name} is {after.dtype} {tuple(after.shape)}, was {before.dtype} {tuple(before.shape)}")
        if torch.equal(before, after):
            continue
        changed.add(name)
        change = float((before - after).float().norm() / before.float().norm())
        if packed or before.dim() < 2 or change > OF_A_MATRIX:
            raise Wrong(f"{name} has other values, {change:.1%} of its norm away")
    if not changed:
        raise Wrong("no tensor was rounded")


def compare_configurations(source: Path, written: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        if not (source / name).is_file():
            continue
        if not (written / name).is_file():
            raise Wrong(f"{name} is missing")
        differences = list(changed_entries(*(json.loads((folder / name).read_text()) for folder in (source, written))))
        if differences:
            raise Wrong(f"{name}: {'; '.join(differences[:3])}")


def changed_entries(before: Mapping[str, Any], after: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key in sorted(before.keys() | after.keys()):
        if key in OF_THE_RUN:
            continue
        old, new = before.get(key, "nothing"), after.get(key, "nothing")
        if isinstance(old, dict) and isinstance(new, dict):
            yield from changed_entries(old, new, f"{prefix}{key}.")
        elif old != new:
            yield f"{prefix}{key} was {str(old)[:60]}, is {str(new)[:60]}"
