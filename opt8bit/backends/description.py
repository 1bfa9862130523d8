"""Where tensors lie and how, read of thousands at once.

A model of a thousand small parameters has seven thousand tensors to look at in a step. Their objects are spread over
the memory, so that asking each of them through Python takes longer than updating all of them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter

import numpy
import torch
from numpy.typing import NDArray
from torch import Tensor

from opt8bit.backends import native

Rows = NDArray[numpy.int64]

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


def describe(tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """(n, 4 + 2 * max_dim): dtype, device type and index, dim, sizes and strides, each as a number.

    Two descriptions are equal only if the tensors are alike in all of that. A row is -1 throughout where the
    tensor is not strided or has more than ``max_dim`` dimensions.
    """
    functions = _torch_functions()
    if functions is None:
        return describe_in_python(tensors, max_dim)
    return _describe(functions, tensors, max_dim)


def addresses(tensors: Sequence[Tensor], described: Rows) -> Rows | None:
    """(n,): where the data of each tensor lie; None if they are not as :func:`describe` found them once."""
    functions = _torch_functions()
    if len(tensors) != len(described):
        return None
    if functions is None:
        return addresses_in_python(tensors, described)
    lib = native.library()
    assert lib is not None
    handles, result = _handles(tensors), numpy.empty(len(tensors), numpy.int64)
    inputs = functions.ctypes.data, handles.ctypes.data, len(handles), _max_dim(described), described.ctypes.data
    is_alike = lib.opt8bit_addresses(*inputs, result.ctypes.data, torch.get_num_threads())
    return result if is_alike else None


def describe_in_python(tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """What :func:`describe` returns where torch or the kernels cannot be asked."""
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
    """What :func:`addresses` returns where torch or the kernels cannot be asked."""
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
    return numpy.fromiter(map(attrgetter("_cdata"), tensors), numpy.int64, len(tensors))


def _describe(functions: Rows, tensors: Sequence[Tensor], max_dim: int) -> Rows:
    lib = native.library()
    assert lib is not None
    handles = _handles(tensors)
    rows = numpy.empty((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    lib.opt8bit_describe(functions.ctypes.data, handles.ctypes.data, len(tensors), max_dim, rows.ctypes.data)
    return rows


@functools.cache
def _torch_functions() -> Rows | None:
    """The addresses of ``TORCH_FUNCTIONS``; None without kernels, or where this torch answers otherwise than Python."""
    found = native.torch_symbols(*TORCH_FUNCTIONS) if native.library() else None
    if found is None:
        return None
    functions = numpy.array(found, numpy.int64)
    zeros = functools.partial(torch.zeros, dtype=torch.float32, device="cpu")
    probes = [zeros(2, 3, 5).permute(2, 0, 1)[1:], zeros((), dtype=torch.uint8), zeros(7)[::2]]
    is_same = numpy.array_equal(_describe(functions, probes, 3)[:, 3:], describe_in_python(probes, 3)[:, 3:])
    return functions if is_same else None
