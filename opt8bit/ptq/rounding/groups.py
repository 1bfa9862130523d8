"""Columns of a weight and the groups that share a scale."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.quant.grid import P, mapped


def group_numbers(weight: Tensor, group_size: int) -> Tensor:
    """Returns the group that each column of a weight (out, in) belongs to, (in,)."""
    return torch.arange(weight.shape[1], device=weight.device) // group_size


def by_column(params: P, group_of: Tensor) -> P:
    """Params (out, groups) laid out column by column of the weight, (in, out)."""
    return mapped(params, lambda part: part.T[group_of])
