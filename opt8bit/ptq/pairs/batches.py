"""Reads what both models are called with: batches of any form, and which of their tokens count."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opt8bit.ptq.model.recording import no_cache


class Target(NamedTuple):
    """Says where a model computes, and in which dtype; the dtype is None where batches need not be cast."""

    device: torch.device
    dtype: torch.dtype | None


def as_batches(name: str, data: Iterable[Any]) -> list[Any]:
    """Returns what a model is called with, batch by batch.

    Args:
        name: of the data, for messages.
        data: an iterable of tensors, tuples or lists of positional arguments, or dictionaries of keyword arguments.

    Raises:
        TypeError: it is no iterable of these, or a single tensor.
        ValueError: it is empty.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise TypeError(f"{name} must be an iterable of batches, got {type(data).__name__}: put a single one in a list")
    batches = list(data)
    for batch in batches:
        if not isinstance(batch, Tensor | Mapping | tuple | list):
            raise TypeError(f"{name} must hold tensors, tuples or dictionaries, got {type(batch).__name__}")
    if not batches:
        raise ValueError(f"{name} must hold at least one batch, got none")
    return batches


def samples_of(batch: Any) -> int:
    """Returns how many samples a batch has: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else batch
    first = next((value for value in values if isinstance(value, Tensor) and value.dim()), None)
    return 1 if first is None else len(first)


def mask_of(batch: Any) -> Tensor | None:
    """Returns the ``attention_mask`` (samples, length) of a dictionary as true and false, or None: all tokens count."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    if not isinstance(mask, Tensor) or mask.dim() != 2 or bool(mask.all()):
        return None
    return mask.bool()


def mask_for(mask: Tensor | None, output: Tensor, channel_axis: int) -> Tensor | None:
    """Returns a batch's mask in the form of a layer's output, or None where that has not one row for each token."""
    if mask is None or channel_axis != -1:
        return None
    if output.dim() > 2 and output.shape[:2] == mask.shape:
        return mask.to(output.device)
    if output.dim() == 2 and len(output) == mask.numel():  # all tokens in one dimension, as in OPT
        return mask.flatten().to(output.device)
    return None


def call(model: nn.Module, batch: Any, target: Target | None = None) -> Any:
    """Calls a model with a batch, without a cache of keys and values."""
    batch = batch if target is None else moved(batch, target)
    if isinstance(batch, Mapping):
        return model(**{**no_cache(model), **batch})
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def moved(value: Any, target: Target) -> Any:
    """Moves the tensors in arguments to another device, and casts those of floating-point numbers."""
    if isinstance(value, Tensor):
        dtype = target.dtype if value.is_floating_point() else None
        return value.to(target.device, dtype)
    if isinstance(value, dict):
        return {key: moved(each, target) for key, each in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(each, target) for each in value)
    return value


def target_of(quantized: nn.Module, reference: nn.Module) -> Target | None:
    """Returns how batches of the float model become those of the quantized one, or None where they are the same."""
    dtypes, devices = zip(*(_computes_in(model) for model in (quantized, reference)), strict=True)
    if devices[0] == devices[1] and (dtypes[0] == dtypes[1] or None in dtypes):
        return None
    return Target(devices[0], None if dtypes[0] == dtypes[1] or None in dtypes else dtypes[0])


def _computes_in(model: nn.Module) -> tuple[torch.dtype | None, torch.device]:
    """Returns the dtype of most parameters outside of layers' weights, which may be packed, and the device."""
    params = list(model.named_parameters())
    tensors = [tensor for _, tensor in params] or list(model.buffers())
    device = tensors[0].device if tensors else torch.device("cpu")
    vectors = Counter[torch.dtype]()
    for _, param in params:
        if param.is_floating_point() and param.dim() == 1 and param.element_size() >= 2:
            vectors[param.dtype] += param.numel()
    if not vectors:
        return next((param.dtype for _, param in params if param.is_floating_point()), None), device
    return vectors.most_common(1)[0][0], device
