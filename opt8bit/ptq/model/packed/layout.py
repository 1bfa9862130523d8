"""Defines a layout of packed weights: which tensors are a layer's weight, and what they stand for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor


class Unpacked(NamedTuple):
    """A layer's weight with one code in each element, ``(codes - zero_point) * scale`` by groups of inputs."""

    codes: Tensor  # uint8 (out, in)
    scale: Tensor  # (out, groups)
    zero_point: Tensor  # (out, groups)
    group: Tensor  # (in,), of each input
    bits: int | None = None  # of a code, where the layout says it


class Layout(ABC):
    """One layout.

    Attributes:
        codes: what stands behind a layer's name in the name of its codes.
        others: the same of what may be beside them.
        mark: that of them by which a packed layer is told; None for the codes.
    """

    codes: ClassVar[str]
    others: ClassVar[tuple[str, ...]]
    mark: ClassVar[str | None] = None

    @abstractmethod
    def unpacked(self, layer: str, parts: Mapping[str, Tensor]) -> Unpacked:
        """Returns the weight of a layer, unpacked.

        Args:
            layer: its name in the checkpoint.
            parts: its tensors, by what stands behind its name.

        Raises:
            ValueError: a part is missing, or does not fit.
        """

    def weight(self, layer: str, parts: Mapping[str, Tensor]) -> Tensor:
        """Returns the weight of a layer, (out, in), in float32. Arguments and errors are those of :meth:`unpacked`."""
        found = self.unpacked(layer, parts)
        return dequantized(found.codes, found.scale, found.zero_point, found.group)


def part_of(parts: Mapping[str, Tensor], name: str) -> Tensor:
    """
    Raises:
        ValueError: it is missing.
    """
    if name not in parts:
        raise ValueError(f"{name} is missing")
    return parts[name]


def groups_of_columns(columns: int, groups: int, group_size: int | None = None) -> Tensor:
    """Returns the group of each input, int64 (in,), where groups are runs of inputs of one length.

    Args:
        columns: how many inputs there are.
        groups: how many groups.
        group_size: inputs of a group; by default as many as make the groups equal.
    """
    return torch.arange(columns) // (group_size or -(-columns // groups))


def dequantized(
    codes: Tensor,  # (out, in)
    scale: Tensor,  # (out, groups)
    zero_point: Tensor,  # (out, groups)
    group: Tensor,  # (in,)
) -> Tensor:
    """Returns ``(codes - zero_point) * scale``, (out, in), in float32, which is exact up to the one product.

    Raises:
        ValueError: an input has no group, or the shapes do not fit.
    """
    outputs, columns = codes.shape
    if scale.dim() != 2 or len(scale) != outputs or scale.shape != zero_point.shape:
        shapes = f"scales {tuple(scale.shape)} and zero points {tuple(zero_point.shape)}"
        raise ValueError(f"{shapes} do not fit {outputs} outputs")
    groups = scale.shape[1]
    if group.shape != (columns,) or not 0 <= int(group.min()) <= int(group.max()) < groups:
        raise ValueError(f"the groups of {columns} inputs must be from 0 to {groups - 1}")
    group = group.to(torch.int64)
    differences = codes.to(torch.float32) - zero_point.to(torch.float32)[:, group]
    return differences.mul_(scale.to(torch.float32)[:, group])
