"""Several processes that calibrate together: each sees its own part of the text, and all round by the sums of all."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# The functions of this module of torch's have the group as their default. Were they defined while there is one, as they
# are where transformers' code of a model is first needed, it would live as long as they do, and its threads fall over
# the interpreter's end.
if dist.is_available():
    importlib.import_module("torch.distributed.nn")


def rank() -> int:
    """Returns this process's number; 0 where there is no other."""
    return dist.get_rank() if _are_several() else 0


def size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if _are_several() else 1


def share(items: Sequence[T]) -> list[T]:
    """Returns this process's part."""
    return list(items[rank() :: size()])


def add(*tensors: Tensor) -> None:
    """Makes each the sum of all processes', in place."""
    if _are_several():
        for tensor in tensors:
            dist.all_reduce(tensor)


def total(values: Sequence[float]) -> list[float]:
    """Returns the sums of all processes' numbers."""
    return [sum(parts) for parts in zip(*gathered(list(values)), strict=True)]


def gathered(value: T) -> list[T]:
    """Returns what each process has, in the order of their numbers."""
    if not _are_several():
        return [value]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, value)
    return found


def concatenated(*tensors: Tensor) -> list[Tensor]:
    """Returns each with the rows of all processes, however many each has, in the order of their numbers."""
    if not _are_several():
        return list(tensors)
    found = gathered([tensor.cpu() for tensor in tensors])  # as they are, they would come back on the senders' devices
    return [torch.cat(parts).to(mine.device) for mine, parts in zip(tensors, zip(*found, strict=True), strict=True)]


def rows_of_this(tensor: Tensor) -> Tensor:
    """Returns this process's part of the rows of a tensor that all have; equally many for each, the last ones twice."""
    each = -(-len(tensor) // size())
    start = first_row(len(tensor))
    return tensor[start : start + each]


def first_row(rows: int) -> int:
    """Returns where this process's part of so many rows begins. Some of the last one's are another's, too."""
    each = -(-rows // size())
    return min(rank() * each, rows - each)


def rows_of_all(part: Tensor, rows: int) -> Tensor:
    """Returns the tensor whose part :func:`rows_of_this` gave each process."""
    if not _are_several():
        return part
    parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(size())]
    dist.all_gather(parts, part.contiguous())
    each = len(part)
    whole = part.new_empty(rows, *part.shape[1:])
    for number, found in enumerate(parts):
        start = min(number * each, rows - each)
        whole[start : start + each] = found
    return whole


def _are_several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
