"""check_distributed_checkpoint: finds out whether a distributed checkpoint can be loaded before a tensor changes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opt8bit.optim.distributed_layout import form_of, leaves, name_of, state_of

CONVERTER = "opt8bit.optim.convert_distributed_checkpoint(state_dict, folder, new_folder)"
IN_FULL = "opt8bit.optim.to_torch_state_dict(optimizer)"


def check_distributed_checkpoint(state_dict: Mapping[str, Any], folder: str | os.PathLike[str]) -> None:
    """Refuses what ``torch.distributed.checkpoint.load(state_dict, checkpoint_id=folder)`` would find out half-way.

    That function fills the tensors of ``state_dict``, which are those of the model and the optimizer, one after
    another: a file that turns out to be truncated leaves some of them loaded, and codes of the old layout, which lie
    under the names of states, are taken for numbers. This one only looks: at what the checkpoint lists, and whether its
    files are long enough to hold it.

    Args:
        state_dict: as ``load`` takes it; tensors, plain or DTensors, at any depth.
        folder: that ``torch.distributed.checkpoint.save`` wrote to.

    Raises:
        ValueError: the checkpoint is unfinished, lacks a tensor of ``state_dict`` or has one of another shape or dtype,
            or a file of it is missing or truncated. The message names the tensor. Where the optimizer's states are
            stored in another layout than ``state_dict`` has, it names both layouts and what converts one into the
            other: :func:`opt8bit.optim.convert_distributed_checkpoint`.
    """
    folder = Path(folder)
    metadata = read_metadata(folder)
    tensors = {name_of(path): value for path, value in leaves(state_dict) if isinstance(value, Tensor)}
    _check_tensors(tensors, metadata.state_dict_metadata, folder)
    check_files([item for item in metadata.storage_data.items() if item[0].fqn in tensors], folder)


def read_metadata(folder: Path) -> Any:
    """Returns what a distributed checkpoint lists.

    Raises:
        ValueError: the folder is missing, or the checkpoint is unfinished or damaged.
    """
    if not (folder / ".metadata").is_file():
        raise ValueError(f"{folder} is no checkpoint, or one whose saving did not end: it has no .metadata")
    dcp: Any = importlib.import_module("torch.distributed.checkpoint")
    try:
        return dcp.FileSystemReader(folder).read_metadata()
    except Exception as error:  # whatever a damaged file makes of its reader
        raise ValueError(f"{folder / '.metadata'} is damaged: {error}") from error


def _check_tensors(tensors: Mapping[str, Tensor], listed: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where a checkpoint lists another shape or dtype of a tensor, or none."""
    for name, tensor in tensors.items():
        saved = listed.get(name)
        if saved is None or not is_as_wanted(saved, tensor.shape, tensor.dtype):
            _refuse_layout(name, tensors, listed, folder)
            check_listed(name, tensor.shape, tensor.dtype, listed, folder)


def is_as_wanted(saved: Any, shape: torch.Size, dtype: torch.dtype) -> bool:
    """Tells whether a checkpoint lists a tensor of this shape and dtype."""
    return hasattr(saved, "size") and saved.size == shape and saved.properties.dtype == dtype


def check_listed(name: str, shape: torch.Size, dtype: torch.dtype, listed: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where a checkpoint lists another shape or dtype of a tensor, or none; whatever it is."""
    if name not in listed:
        raise ValueError(f"{folder} has no {name}: it is another model's or optimizer's")
    saved = listed[name]
    if not hasattr(saved, "size"):
        raise ValueError(f"{name} must be a tensor, {folder} has another kind of value")
    if not is_as_wanted(saved, shape, dtype):
        raise ValueError(
            f"{name} must have shape {tuple(shape)} and be {dtype}, "
            f"{folder} has {tuple(saved.size)} and {saved.properties.dtype}"
        )


def _refuse_layout(name: str, tensors: Mapping[str, Tensor], listed: Mapping[str, Any], folder: Path) -> None:
    """Raises ValueError where a tensor is a part of a state that a checkpoint has in another layout."""
    state = state_of(name)
    wanted = form_of(state, tensors) if state else None
    saved = form_of(state, listed) if state else None
    if wanted is None or saved is None or not _is_of_shape(listed.get(saved.codes), tensors.get(wanted.codes)):
        return
    way_out = f"{CONVERTER} writes a checkpoint that has it so"
    if wanted.scale is None:
        way_out += f" (and {IN_FULL} is what to save for torch.optim, which has all states in 32 bits)"
    if wanted.words != saved.words:
        raise ValueError(f"{folder} has {state} {saved.words}, {name} is wanted {wanted.words}: {way_out}")
    if name == wanted.scale and hasattr(listed.get(name), "size"):
        raise ValueError(
            f"{folder} has {state} {saved.words}, in blocks of another size than is wanted: {name} has shape "
            f"{tuple(listed[name].size)} and must have {tuple(tensors[name].shape)}: {way_out}"
        )


def _is_of_shape(saved: Any, tensor: Tensor | None) -> bool:
    return tensor is not None and getattr(saved, "size", None) == tensor.shape


def check_files(parts: Iterable[tuple[Any, Any]], folder: Path) -> None:
    """Raises ValueError where a file is too short for a part of a tensor that it is listed to have, or missing."""
    for index, place in parts:
        file = folder / place.relative_path
        if not file.is_file():
            raise ValueError(f"{file} is missing, which has a part of {index.fqn}")
        if file.stat().st_size < place.offset + place.length:
            raise ValueError(f"{file} is truncated: it lacks a part of {index.fqn}")
