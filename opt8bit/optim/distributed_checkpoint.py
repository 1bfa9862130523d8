"""check_distributed_checkpoint: finds out whether a distributed checkpoint can be loaded before a tensor changes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor


def check_distributed_checkpoint(state_dict: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Refuses what ``torch.distributed.checkpoint.load(state_dict, checkpoint_id=folder)`` would find out half-way.

    That function fills the tensors of ``state_dict``, which are those of the model and the optimizer, one after
    another: a file that turns out to be truncated leaves some of them loaded. This one only looks: at what the
    checkpoint lists, and whether its files are long enough to hold it.

    Args:
        state_dict: as ``load`` takes it; tensors, plain or DTensors, at any depth.
        folder: that ``torch.distributed.checkpoint.save`` wrote to.

    Raises:
        ValueError: the checkpoint is unfinished, lacks a tensor of ``state_dict`` or has one of another shape or dtype,
            or a file of it is missing or truncated. The message names the tensor.
    """
    folder = Path(folder)
    dcp: Any = importlib.import_module("torch.distributed.checkpoint")
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no checkpoint, or one whose saving did not end: it has no .metadata")
    try:
        metadata = dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{folder / '.metadata'} is damaged: {error}") from error
    tensors = dict(_tensors(state_dict))
    _check_tensors(tensors, metadata.state_dict_metadata, folder)
    _check_files([item for item in metadata.storage_data.items() if item[0].fqn in tensors], folder)


def _check_tensors(tensors: Mapping[str, Tensor], listed: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where a checkpoint lists another shape or dtype of a tensor, or none."""
    for name, tensor in tensors.items():
        if name not in listed:
            raise ValueError(f"{folder} has no {name}: it is another model's or optimizer's")
        saved = listed[name]
        if not hasattr(saved, "size"):
            raise ValueError(f"{name} must be a tensor, {folder} has another kind of value")
        if saved.size != tensor.shape or saved.properties.dtype != tensor.dtype:
            raise ValueError(
                f"{name} must have shape {tuple(tensor.shape)} and be {tensor.dtype}, "
                f"{folder} has {tuple(saved.size)} and {saved.properties.dtype}"
            )


def _check_files(parts: Iterable[tuple[Any, Any]], folder: Path) -> None:
    """Raises ValueError where a file is too short for a part of a tensor that it is listed to have, or missing."""
    for index, place in parts:
        file = folder / place.relative_path
        if not file.is_file():
            raise ValueError(f"{file} is missing, which has a part of {index.fqn}")
        if file.stat().st_size < place.offset + place.length:
            raise ValueError(f"{file} is truncated: it lacks a part of {index.fqn}")


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """The tensors of a nested state dict, by the names that a checkpoint has for them."""
    if isinstance(value, Tensor):
        yield name, value
    elif hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):  # which DCP asks for it
        yield from _tensors(value.state_dict(), name)
    elif isinstance(value, (Mapping, list)):
        for key, inner in value.items() if isinstance(value, Mapping) else enumerate(value):
            yield from _tensors(inner, f"{name}.{key}" if name else str(key))
