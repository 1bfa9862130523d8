"""Fills the structures of kernels/optimizer_step.h, which the compiled kernels read, from the batches of a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends.interface import ADDRESSES, DTYPES, ROUNDINGS, Batch, Step

MAX_HYPER = 12  # kMaxHyper of kernels/optimizer_step.h
TENSOR = numpy.dtype(  # Tensor of kernels/optimizer_step.h, which says what the fields are
    [
        ("at", ADDRESSES),
        *(
            (name, numpy.int64)
            for name in (
                *("rows", "row_length", "dtype", "grad_dtype", "state_bits", "group", "number", "first", "positions"),
                *("param_away", "grad_away"),
            )
        ),
    ]
)
GROUP = numpy.dtype(  # Group, likewise
    [
        ("rule", numpy.int64),
        ("block_size", numpy.int64),
        ("hyper", numpy.float64, MAX_HYPER),
        ("grad_scale", numpy.float64),
        ("rounding", numpy.int64),
        ("seed", numpy.int64),
    ]
)


class Tables:
    """The tensors and groups of a step as the kernels read them.

    Args:
        batches: what becomes a group of the kernels each.
        numbers: the number of each batch's rule in the kernels' list.
    """

    def __init__(self, batches: Sequence[Batch], numbers: Sequence[int]) -> None:
        self._tensors = numpy.concatenate([_tensors(batch, group) for group, batch in enumerate(batches)])
        self._groups = numpy.zeros(len(batches), GROUP)
        self._groups["rule"] = numbers
        self._groups["block_size"] = [batch.block_size for batch in batches]
        self._groups["rounding"] = [ROUNDINGS.index(batch.rounding) for batch in batches]
        self._groups["seed"] = [batch.seed for batch in batches]
        self._addresses = self._tensors.view(numpy.int64).reshape(len(self._tensors), -1)[:, : ADDRESSES.itemsize // 8]
        self._hyper: list[object] = [None] * len(batches)  # what the groups hold now
        self._grad_scale = 0.0
        self._pointers = self._tensors.ctypes.data, len(self._tensors), self._groups.ctypes.data

    def filled(self, step: Step, grad_scale: float) -> tuple[int, int, int]:
        """Returns where the tensors lie, how many they are, and where the groups lie, with what is new in a step."""
        self._addresses[:] = step.addresses
        for group, hyper in enumerate(step.hyper):
            if hyper is not self._hyper[group]:
                values = [value.item() if isinstance(value, Tensor) else value for value in hyper.values()]
                self._groups["hyper"][group, : len(values)] = values
                self._hyper[group] = hyper
        if grad_scale != self._grad_scale:
            self._groups["grad_scale"] = self._grad_scale = grad_scale
        return self._pointers


def _tensors(batch: Batch, group: int) -> NDArray[numpy.void]:
    result = numpy.zeros(len(batch.views), TENSOR)
    result["rows"], result["row_length"] = batch.extents.T
    result["dtype"], result["grad_dtype"] = DTYPES[batch.dtype], DTYPES[batch.grad_dtype]
    result["state_bits"] = 8 if batch.coded else 32
    result["group"] = group
    result["number"] = batch.numbers
    result["first"] = batch.firsts
    result["positions"] = batch.positions
    return result
