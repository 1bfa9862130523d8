"""Writes tensors as they come, in as many files as it takes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from opt8bit.ptq.model.checkpoint_files import INDEX, SINGLE
from opt8bit.ptq.model.tensor_files import Writer

SHARD_BYTES = 4 * 2**30


def write_shards(tensors: Iterable[tuple[str, Tensor]], folder: Path, limit: int = SHARD_BYTES) -> int:
    """Writes named tensors as ``model.safetensors``, or as several files of up to ``limit`` bytes and their index.

    A tensor larger than that has a file of its own.

    Returns:
        The bytes of all tensors.
    """
    writer = Writer(folder / "0.partial")
    done: list[Writer] = []
    for name, tensor in tensors:
        if writer.names and writer.bytes + tensor.nbytes > limit:
            writer.close()
            done.append(writer)
            writer = Writer(folder / f"{len(done)}.partial")
        writer.add(name, tensor)
    writer.close()
    done.append(writer)
    total, files = sum(writer.bytes for writer in done), _file_names(len(done))
    for i, file in enumerate(files):
        (folder / f"{i}.partial").rename(folder / file)
    if len(files) > 1:
        where = {name: file for file, writer in zip(files, done, strict=True) for name in writer.names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return total


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE]
    return [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
