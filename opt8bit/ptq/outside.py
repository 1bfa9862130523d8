"""Rounds the matrices outside of a model's blocks, embeddings and head, where a format stores them in few bits."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.model.blocks import find_blocks
from opt8bit.ptq.result import Change
from opt8bit.ptq.rounding import RTN
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme

ROWS = 16_384  # that are rounded at once


class Outside:
    """The matrices outside of a model's blocks, rounded to nearest.

    Args:
        model: stays as it is.
        scheme: of the rounded matrices; None leaves them, and so do rows that its groups do not divide.

    Attributes:
        changes: the rounded matrices, by the names of the model's parameters.
    """

    def __init__(self, model: nn.Module, scheme: WeightScheme | None) -> None:
        self._rounded: list[tuple[nn.Parameter, Tensor]] = []
        self.changes: dict[str, Change] = {}
        if scheme is None:
            return
        prefix, _ = find_blocks(model)
        for name, param in model.named_parameters():
            is_outside = not name.startswith(f"{prefix}.")
            if is_outside and param.dim() == 2 and param.shape[1] % (scheme.group_size or 1) == 0:
                self.changes[name], weight = _rounded(param.detach(), scheme)
                self._rounded.append((param, weight))

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Lets the model have the rounded matrices inside the context."""
        had = [param.data for param, _ in self._rounded]
        for param, weight in self._rounded:
            param.data = weight
        try:
            yield
        finally:
            for (param, _), data in zip(self._rounded, had, strict=True):
                param.data = data


def _rounded(weight: Tensor, scheme: WeightScheme) -> tuple[QuantizedWeight, Tensor]:
    """Returns a weight (out, in) rounded to nearest, and its values in its dtype. Some rows at a time are copied."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    found = [RTN().round(rows.to(dtype), InputStatistics(), scheme) for rows in weight.split(ROWS)]
    parts = [rounded.parts[0] for rounded in found]
    params = type(parts[0].params)(*map(torch.cat, zip(*(part.params for part in parts), strict=True)))
    whole = Part(scheme.grid, torch.cat([part.codes for part in parts]), params)
    values = torch.cat([part.dequantize().to(weight.dtype) for part in parts])
    return QuantizedWeight((weight.shape[0], weight.shape[1]), (whole,)), values
