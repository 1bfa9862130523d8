"""Reads where thousands of tensors lie, and how, at once.

A model of a thousand small parameters has seven thousand tensors to look at in a step. Their objects are spread over
the memory, so that asking each of them through Python takes longer than updating all of them.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends import native

Rows = NDArray[numpy.int64]
HANDLE = attrgetter("_cdata")

WORD = 8  # bytes
ITEMS = list.__basicsize__ - 2 * WORD  # from a list in CPython to the address of its items
TYPE = object.__basicsize__ - WORD  # from an object in CPython to its type
FIXED_COLUMNS = 5  # of a description: type, dtype, device type, device index, dim; then sizes and strides
TORCH_FUNCTIONS = (  # in the order of TorchFunctions in kernels/torch_tensors.h
    "aoti_torch_get_layout",
    "aoti_torch_get_data_ptr",
    "aoti_torch_get_dtype",
    "aoti_torch_get_device_type",
    "aoti_torch_get_device_index",
    "aoti_torch_get_dim",
    "aoti_torch_get_sizes",
    "aoti_torch_get_strides",
    "aoti_torch_layout_strided",
)


class Description:
    """Describes how tensors lie: type, dtype, device type and index, dim, sizes and strides, each as a number.

    Args:
        tensors: that are described.

    Attributes:
        rows: (n, 5 + 2 * largest dim). Two are equal only if the tensors are alike in all of that. -1 throughout where
            a tensor is not strided.
    """

    def __init__(self, tensors: list[Tensor]) -> None:
        # A tensor that gets more dimensions than there are now is noticed as a change.
        max_dim = max((tensor.dim() for tensor in tensors), default=0)
        self._functions = _torch_functions()
        self._found = numpy.zeros(len(tensors) + 1, numpy.int64)
        if self._functions is None:
            self.rows = describe_in_python(tensors, max_dim)
        else:
            self._objects = _Objects(len(tensors))
            self.rows = _describe(self._functions, self._objects, tensors, max_dim)
            # What takes longer to ask for than a small parameter does to step.
            functions, objects, rows, found = (
                array.ctypes.data for array in (self._functions, self._objects.words, self.rows, self._found)
            )
            self._read = partial(_library().opt8bit_addresses, functions, objects, len(tensors), max_dim, rows, found)

    def addresses(self, tensors: list[Tensor], alike: Sequence[tuple[int, int]] = ()) -> Rows | None:
        """Returns where the data of as many tensors lie, then a zero, (n + 1,), or None if they lie otherwise.

        The array is the same every time.

        Args:
            tensors: as many as are described.
            alike: of a tensor that stands in for another one, its place, and the place whose description it has.
        """
        if len(tensors) != len(self.rows):
            return None
        if alike:
            there, here = map(list, zip(*alike, strict=True))
            described = self.rows[there]
            self.rows[there] = self.rows[here]
            try:
                return self.addresses(tensors)
            finally:
                self.rows[there] = described
        if self._functions is None:
            found = addresses_in_python(tensors, self.rows)
            if found is None:
                return None
            self._found[:-1] = found
            return self._found
        self._objects.hold(tensors)
        return self._found if self._read(torch.get_num_threads()) else None


def describe_in_python(tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """Returns rows of numbers, (n, 5 + 2 * max_dim): -1 for a tensor that is not strided or has more dimensions."""
    rows = numpy.zeros((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor.layout != torch.strided or tensor.dim() > max_dim:
            row[:] = -1
            continue
        device = tensor.device
        index = -1 if device.index is None else device.index
        row[:FIXED_COLUMNS] = id(type(tensor)), id(tensor.dtype), hash(device.type), index, tensor.dim()
        row[FIXED_COLUMNS : FIXED_COLUMNS + tensor.dim()] = tensor.shape
        row[FIXED_COLUMNS + max_dim : FIXED_COLUMNS + max_dim + tensor.dim()] = tensor.stride()
    return rows


def addresses_in_python(tensors: Sequence[Tensor], described: Rows) -> Rows | None:
    """Returns where the data of each tensor lie, (n,), or None if they are not as described."""
    rows = describe_in_python(tensors, _max_dim(described))
    if (rows[:, 0] == -1).any() or not numpy.array_equal(rows, described):
        return None
    return data_ptrs(tensors)


def data_ptrs(tensors: Sequence[Tensor]) -> Rows:
    """Returns where the data of each tensor lie, (n,), asked of it through Python."""
    return numpy.fromiter(map(Tensor.data_ptr, tensors), numpy.int64, len(tensors))


def _max_dim(described: Rows) -> int:
    return (described.shape[1] - FIXED_COLUMNS) // 2


class _Objects:
    """Mirrors ``Objects`` of kernels/torch_tensors.h: a list of tensors as the kernels read it.

    The kernels look into the list and its objects, where that is possible: asking each object for its tensor in C++,
    which torch.utils.swap_tensors can change, takes a fifth of a step of small parameters.

    Args:
        count: of tensors.

    Attributes:
        words: (3,), the structure.
    """

    def __init__(self, count: int) -> None:
        pointer = _offset_of_pointer()
        self._handles = None if pointer else numpy.zeros(count, numpy.int64)
        if self._handles is None:
            self.words = numpy.array([0, pointer, TYPE], numpy.int64)
        else:
            self._places = self._handles.ctypes.data + WORD * numpy.arange(count, dtype=numpy.int64)
            self.words = numpy.array([self._places.ctypes.data, 0, -1], numpy.int64)

    def hold(self, tensors: list[Tensor]) -> None:
        """Points to the tensors of a list, for as long as the list is not changed."""
        if self._handles is None:
            self.words[0] = _word(id(tensors) + ITEMS)
        else:
            self._handles[:] = numpy.fromiter(map(HANDLE, tensors), numpy.int64, len(tensors))


@cache
def _offset_of_pointer() -> int | None:
    """Returns the bytes from a tensor's object to the pointer to its tensor in C++, or None where there is none."""
    if sys.implementation.name != "cpython":
        return None
    probes = [torch.zeros(2, device="cpu"), torch.nn.Parameter(torch.zeros((), device="cpu"))]
    items = _word(id(probes) + ITEMS)
    is_known = all(
        _word(items + WORD * i) == id(probe) and _word(id(probe) + TYPE) == id(type(probe))
        for i, probe in enumerate(probes)
    )
    offsets = range(object.__basicsize__, Tensor.__basicsize__, WORD) if is_known else ()
    found = [offset for offset in offsets if all(_word(id(probe) + offset) == HANDLE(probe) for probe in probes)]
    return found[0] if found else None


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _describe(functions: Rows, objects: _Objects, tensors: list[Tensor], max_dim: int) -> Rows:
    """Returns what :func:`describe_in_python` returns, except the numbers of types, dtypes and kinds of device."""
    objects.hold(tensors)
    rows = numpy.empty((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    _library().opt8bit_describe(
        functions.ctypes.data, objects.words.ctypes.data, len(tensors), max_dim, rows.ctypes.data
    )
    return rows


def _library() -> Any:
    lib = native.library()
    assert lib is not None
    return lib


@cache
def _torch_functions() -> Rows | None:
    """Returns the addresses of ``TORCH_FUNCTIONS``, or None without kernels or where torch and Python disagree."""
    found = native.torch_symbols(*TORCH_FUNCTIONS) if native.library() else None
    if found is None:
        return None
    functions = numpy.array(found, numpy.int64)
    zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
    probes = [zeros(2, 3, 5).permute(2, 0, 1)[1:], zeros((), dtype=torch.uint8), zeros(7)[::2]]
    found, expected = _describe(functions, _Objects(len(probes)), probes, 3), describe_in_python(probes, 3)
    is_same = numpy.array_equal(found[:, FIXED_COLUMNS - 1 :], expected[:, FIXED_COLUMNS - 1 :])
    return functions if is_same else None
