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

ADDRESS = 0  # the first column of a description; then dtype, device type, device index, dim; sizes; strides
FIXED_COLUMNS = 5
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
    """(n, 5 + 2 * max_dim): address, dtype, device type and index, dim, sizes and strides, each as a number.

    Two descriptions are equal only if the tensors are alike in all of that. A row is -1 throughout where the
    tensor is not strided or has more than ``max_dim`` dimensions.
    """
    functions = _torch_functions()
    if functions is None:
        return describe_in_python(tensors, max_dim)
    # The tensor in C++ that a tensor in Python stands for: torch.utils.swap_tensors changes it.
    handles = numpy.fromiter(map(attrgetter("_cdata"), tensors), numpy.int64, len(tensors))
    return _describe(functions, handles, max_dim)


def describe_in_python(tensors: Sequence[Tensor], max_dim: int) -> Rows:
    """What :func:`describe` returns where torch or the kernels cannot be asked."""
    rows = numpy.zeros((len(tensors), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    for row, tensor in zip(rows, tensors, strict=True):
        if tensor.layout != torch.strided or tensor.dim() > max_dim:
            row[:] = -1
            continue
        device = tensor.device
        index = -1 if device.index is None else device.index
        row[:FIXED_COLUMNS] = tensor.data_ptr(), id(tensor.dtype), hash(device.type), index, tensor.dim()
        row[FIXED_COLUMNS : FIXED_COLUMNS + tensor.dim()] = tensor.shape
        row[FIXED_COLUMNS + max_dim : FIXED_COLUMNS + max_dim + tensor.dim()] = tensor.stride()
    return rows


def _describe(functions: Rows, handles: Rows, max_dim: int) -> Rows:
    lib = native.library()
    assert lib is not None
    rows = numpy.empty((len(handles), FIXED_COLUMNS + 2 * max_dim), numpy.int64)
    addresses = functions.ctypes.data, handles.ctypes.data
    lib.opt8bit_describe(*addresses, len(handles), max_dim, rows.ctypes.data, torch.get_num_threads())
    return rows


@functools.cache
def _torch_functions() -> Rows | None:
    """The addresses of ``TORCH_FUNCTIONS``; None without kernels, or where this torch answers otherwise than Python."""
    found = native.torch_symbols(*TORCH_FUNCTIONS) if native.library() else None
    if found is None:
        return None
    functions = numpy.array(found, numpy.int64)
    probes = [torch.zeros(2, 3, 5).permute(2, 0, 1)[1:], torch.zeros((), dtype=torch.uint8), torch.zeros(7)[::2]]
    handles = numpy.array([probe._cdata for probe in probes], numpy.int64)
    is_same = _describe(functions, handles, 3)[:, [ADDRESS, *range(4, 11)]]
    expected = describe_in_python(probes, 3)[:, [ADDRESS, *range(4, 11)]]
    return functions if numpy.array_equal(is_same, expected) else None
