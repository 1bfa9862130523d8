"""Where tensors lie and how, read of thousands at once.

A model of a thousand small parameters has seven thousand tensors to look at in a step. Their objects are spread over
the memory, so that asking each of them through Python takes longer than updating all of them.
"""

from __future__ import annotations

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

FIXED_COLUMNS = 4  # of a description: dtype, device type, device index, dim; then sizes and strides
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
    """How tensors lie: dtype, device type and index, dim, sizes and strides, each as a number.

    Args:
        tensors: that are described.

    Attributes:
        rows: (n, 4 + 2 * largest dim). Two are equal only if the tensors are alike in all of that. -1 throughout where
            a tensor is not strided.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        # A tensor that gets more dimensions than there are now is noticed as a change.
        max_dim = max((tensor.dim() for tensor in tensors), default=0)
        self._functions = _torch_functions()
        self._found = numpy.zeros(len(tensors) + 1, numpy.int64)
        if self._functions is None:
            self.rows = describe_in_python(tensors, max_dim)
        else:
            self.rows = _describe(self._functions, tensors, max_dim)
            # What takes longer to ask for than a small parameter does to step.
            self._handles = numpy.zeros(len(tensors), numpy.int64)
            functions, handles, rows, found = (
                array.ctypes.data for array in (self._functions, self._handles, self.rows, self._found)
            )
            self._read = partial(_library().opt8bit_addresses, functions, handles, len(tensors), max_dim, rows, found)

    def addresses(self, tensors: Sequence[Tensor]) -> Rows | None:
        """(n + 1,): where the data of as many tensors lie, then a zero; None if they are not as those described.

        The array is the same every time.
        """
        if len(tensors) != len(self.rows):
            return None
        if self._functions is None:
            found = addresses_in_python(tensors, self.rows)
            if found is None:
                return None
            self._found[:-1] = found
            return self._found
        self._handles[:] = _handles(tensors)
        return self._found if self._read(torch.get_num_threads()) else None


def describe_in_python(tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """(n, 4 + 2 * max_dim). A row is -1 throughout where the tensor is not strided or has more dimensions."""
    rows = numpy.zeros((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor.layout != torch.strided or tensor.dim() > max_dim:
            row[:] = -1
            continue
        device = tensor.device
        index = -1 if device.index is None else device.index
        row[:FIXED_COLUMNS] = id(tensor.dtype), hash(device.type), index, tensor.dim()
        row[FIXED_COLUMNS : FIXED_COLUMNS + tensor.dim()] = tensor.shape
        row[FIXED_COLUMNS + max_dim : FIXED_COLUMNS + max_dim + tensor.dim()] = tensor.stride()
    return rows


def addresses_in_python(tensors: Sequence[Tensor], described: Rows) -> Rows | None:
    """(n,): where the data of each tensor lie; None if they are not as described."""
    rows = describe_in_python(tensors, _max_dim(described))
    if (rows[:, 0] == -1).any() or not numpy.array_equal(rows, described):
        return None
    return data_ptrs(tensors)


def data_ptrs(tensors: Sequence[Tensor]) -> Rows:
    """(n,): where the data of each tensor lie, asked of it through Python."""
    return numpy.fromiter(map(Tensor.data_ptr, tensors), numpy.int64, len(tensors))


def _max_dim(described: Rows) -> int:
    return (described.shape[1] - FIXED_COLUMNS) // 2


def _handles(tensors: Sequence[Tensor]) -> Rows:
    """The tensors in C++ that those in Python stand for; torch.utils.swap_tensors changes them."""
    return numpy.fromiter(map(HANDLE, tensors), numpy.int64, len(tensors))


def _describe(functions: Rows, tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """What :func:`describe_in_python` returns, but for the numbers of dtypes and kinds of device."""
    handles = _handles(tensors)
    rows = numpy.empty((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    _library().opt8bit_describe(functions.ctypes.data, handles.ctypes.data, len(tensors), max_dim, rows.ctypes.data)
    return rows


def _library() -> Any:
    lib = native.library()
    assert lib is not None
    return lib


@cache
def _torch_functions() -> Rows | None:
    """The addresses of ``TORCH_FUNCTIONS``; None without kernels, or where this torch answers otherwise than Python."""
    found = native.torch_symbols(*TORCH_FUNCTIONS) if native.library() else None
    if found is None:
        return None
    functions = numpy.array(found, numpy.int64)
    zeros = partial(torch.zeros, dtype=torch.float32, device="cpu")
    probes = [zeros(2, 3, 5).permute(2, 0, 1)[1:], zeros((), dtype=torch.uint8), zeros(7)[::2]]
    is_same = numpy.array_equal(_describe(functions, probes, 3)[:, 3:], describe_in_python(probes, 3)[:, 3:])
    return functions if is_same else None
