"""Writes tensors as safetensors, one file after another, so that only one file's tensors are in memory."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

SHARD_BYTES = 4 * 2**30
INDEX = "model.safetensors.index.json"


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int = SHARD_BYTES) -> int:
    """Writes named tensors as ``model.safetensors``, or as several files of up to ``limit`` bytes and their index.

    A tensor larger than that has a file of its own.

    Returns:
        The bytes of all tensors.
    """
    save = _safetensors().save_file
    names: list[list[str]] = []  # by file
    batch: dict[str, Tensor] = {}
    total = filled = 0

    def write() -> None:
        save(batch, folder / f"{len(names)}.partial", metadata={"format": "pt"})
        names.append(list(batch))
        batch.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if batch and filled + size > limit:
            write()
            filled = 0
        batch[name] = tensor.contiguous()
        filled += size
        total += size
    write()
    files = _file_names(len(names))
    for i, file in enumerate(files):
        (folder / f"{i}.partial").rename(folder / file)
    if len(files) > 1:
        where = {name: file for file, inside in zip(files, names, strict=True) for name in inside}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _file_names(count: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]


def _safetensors() -> Any:
    try:
        return importlib.import_module("safetensors.torch")
    except ImportError as error:
        raise ImportError("safetensors is missing: pip install 'opt8bit[compress]'") from error
