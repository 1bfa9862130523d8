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
from opt8bit.quant.weight import WeightScheme


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
                weight = param.detach().to(torch.promote_types(param.dtype, torch.float32))
                rounded = RTN().round(weight, InputStatistics(), scheme)
                self.changes[name] = rounded
                self._rounded.append((param, rounded.dequantize().to(param.dtype)))

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
