"""Blocks of the states in a distributed checkpoint, as its names, options and shapes tell them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from opt8bit.quant import block_view

GROUPS = "param_groups"


def check_blocks(name: str, shape: torch.Size, scale_shape: torch.Size, block_size: int, where: str) -> None:
    """Raises ValueError where scales are not those of a shape in blocks of a size."""
    expected = block_view(shape, block_size).absmax_shape
    if tuple(scale_shape) != expected:
        raise ValueError(
            f"{name} must have shape {expected} for codes of shape {tuple(shape)} in blocks of {block_size}, {where} "
            f"has {tuple(scale_shape)}"
        )


def block_size_of(
    state: str, options: Mapping[str, Any], shape: torch.Size, scale_shape: torch.Size, where: str
) -> int:
    """Returns the elements per block of a state: as its parameter group says, else as shapes tell.

    Args:
        state: its full name, such as ``optimizer.state.layer.weight.exp_avg``.
        options: of parameter groups, by their full names.
        where: the checkpoint or state dict, in words.

    Raises:
        ValueError: there is no group of it, and shapes allow several sizes.
    """
    for prefix, param in owners(state):
        groups = f"{prefix}{GROUPS}."
        sizes = [name for name in options if name.startswith(groups) and name.endswith(".block_size")]
        for name in sizes:
            group = name.removesuffix(".block_size")
            params = options.get(f"{group}.params", ())
            if group == groups + param or param in map(str, params):
                return options[name]
    # Rows of r elements in n blocks: the smallest size that makes so few of them, and the largest that makes so many.
    row_length, blocks = block_view(shape, 1).row_length, scale_shape[-1] if len(scale_shape) else 0
    if blocks <= 1:
        return max(row_length, 1)
    least, most = -(-row_length // blocks), -(-row_length // (blocks - 1)) - 1
    if least != most:
        raise ValueError(f"{where} has no block_size of {state}: rows of {row_length} elements lie in {blocks} blocks")
    return least


def owners(state: str) -> Iterator[tuple[str, str]]:
    """Yields what may stand before ``state.`` and ``param_groups.`` in an optimizer's names, and the parameter."""
    keys = state.split(".")
    for index, key in enumerate(keys):
        if key == "state":
            yield "".join(f"{each}." for each in keys[:index]), ".".join(keys[index + 1 : -1])
