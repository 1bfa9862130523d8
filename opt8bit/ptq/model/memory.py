"""The machine's memory, and what a model takes of it."""

from __future__ import annotations

import ctypes
import math
import os
import sys
from pathlib import Path
from typing import Any

from torch import nn

from opt8bit.ptq.model.blocks import find_blocks

# The bytes from which on a tensor is large. Large ones take fresh pages each time, whose faults cost the same for every
# byte, while products cost more the wider a layer is. With 4 MB, compressing SmolLM2 takes 9% longer.
LARGE_IN_NARROW, LARGE_IN_WIDE = 32 << 20, 4 << 20  # glibc takes no more than 32 MB
WIDE = 64e6  # bytes of a block
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
CGROUP = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))


def machine_memory() -> float:
    """Returns the memory in bytes that this process may have; infinite where the system does not say."""
    try:
        found = float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        found = math.inf
    for limit in CGROUP:
        try:
            found = min(found, float(limit.read_text()))
        except (OSError, ValueError):  # there is none, or it is "max"
            continue
    return found


def outside(model: nn.Module) -> int:
    """Returns the bytes of what is in no block, which stays in memory: embeddings, head, norms."""
    _, blocks = find_blocks(model)
    return bytes_of(model) - sum(map(bytes_of, blocks))


def check_room(model: nn.Module) -> None:
    """Checks that there is room for a model of which one block at a time is in memory.

    Raises:
        ValueError: not even for one block and what is outside of all.
    """
    _, blocks = find_blocks(model)
    around, block, memory = outside(model), max(map(bytes_of, blocks)), machine_memory()
    if around + block > memory:
        raise ValueError(
            f"the machine's memory of {gigabytes(memory)} does not hold the embeddings and the head, "
            f"{gigabytes(around)}, and one block, {gigabytes(block)}: compress the model on a larger machine"
        )


def return_freed() -> None:
    """Makes the C library return freed memory to the system, where it can be told to: glibc keeps much of it for later.

    Tensors of some megabytes come and go by the hundred while passes go through a block, and leave holes that larger
    ones do not fit into.
    """
    trim = _of_c_library("malloc_trim")
    if trim is not None:
        trim(0)


def return_large_at_once(model: nn.Module) -> None:
    """Makes the C library return large tensors to the system as soon as they are freed, where it can be told to.

    For a process that does nothing but compute with this model: it holds until the process ends.
    """
    _, blocks = find_blocks(model)
    large = LARGE_IN_WIDE if max(map(bytes_of, blocks)) > WIDE else LARGE_IN_NARROW
    set_option = _of_c_library("mallopt")
    for option in M_MMAP_THRESHOLD, M_TRIM_THRESHOLD:
        if set_option is not None:
            set_option(option, large)


def _of_c_library(name: str) -> Any:
    """Returns a function of glibc's, or None where there is no such library."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def bytes_of(module: nn.Module) -> int:
    """Returns the bytes of a module's parameters."""
    return sum(param.numel() * param.element_size() for param in module.parameters())


def gigabytes(size: float) -> str:
    """Returns a size in bytes in words."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.3g} MB"
