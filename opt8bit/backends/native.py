"""CPU: the thin binding to kernels/, a shared library without torch that is called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy
import numpy.typing
import torch
from torch import Tensor

from opt8bit.backends.interface import DTYPES, ROUNDINGS, Batch, GroupUpdate, View
from opt8bit.backends.reference import step_group

Words = numpy.typing.NDArray[numpy.int64]

MAX_STATES = 3  # kMaxStates of kernels/optimizer_step.h
MAX_HYPER = 12  # kMaxHyper
FOLDER = Path(__file__).parents[1] / "lib"
LIBRARY = {"win32": "opt8bit_kernels.dll", "darwin": "libopt8bit_kernels.dylib"}.get(
    sys.platform, "libopt8bit_kernels.so"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The shared library, or None where the package was installed without it."""
    path = FOLDER / LIBRARY
    if not path.exists():
        return None
    lib = ctypes.CDLL(str(path))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int64, ctypes.c_char_p
    signatures = {
        "opt8bit_instruction_sets": (text, []),
        "opt8bit_kernels": (pointer, [text]),
        "opt8bit_use_torch_threads": (None, [pointer]),
        "opt8bit_describe": (None, [pointer, pointer, integer, integer, pointer]),
        "opt8bit_addresses": (integer, [pointer, pointer, integer, integer, pointer, pointer, integer]),
        "opt8bit_rule": (integer, [text]),
        "opt8bit_dynamic_map": (None, [integer, pointer]),
        "opt8bit_quantize_blockwise": (
            None,
            [pointer, pointer, *[integer] * 4, pointer, integer, pointer, pointer, integer],
        ),
        "opt8bit_dequantize_blockwise": (
            None,
            [pointer, pointer, pointer, *[integer] * 3, pointer, integer, pointer, integer, integer],
        ),
        "opt8bit_step": (None, [pointer, pointer, integer, pointer, integer]),
        "opt8bit_fit_grids": (None, [pointer, pointer, integer]),
        "opt8bit_gptq": (None, [pointer, pointer, integer, integer]),
        "opt8bit_coordinate_descent": (None, [pointer, pointer, integer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.opt8bit_use_torch_threads(torch_parallel_for())
    return lib


def torch_symbols(*names: str) -> list[int] | None:
    """Addresses of functions of torch's stable C interface; None where this torch lacks one."""
    directory = Path(torch.__file__).parent / "lib"
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (directory / file).exists():
            lib = ctypes.CDLL(str(directory / file))
            if all(hasattr(lib, name) for name in names):
                return [ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0 for name in names]
    return None


def torch_parallel_for() -> int | None:
    """The address of torch's own parallel loop, which torch 2.10 and later export to C; else None."""
    found = torch_symbols("torch_parallel_for")
    return found[0] if found else None


def instruction_sets() -> list[str]:
    """Those with kernels that this processor can run, fastest first; none without the library."""
    lib = library()
    return lib.opt8bit_instruction_sets().decode().split() if lib else []


class WeightRounding(ctypes.Structure):
    """``WeightRounding`` of kernels/weight_rounding.h, which says what the fields are."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_of", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("largest", ctypes.c_float),
        ("is_symmetric", ctypes.c_int64),
        ("scale_dtype", ctypes.c_int64),
        ("fractions", ctypes.c_void_p),
        ("fraction_count", ctypes.c_int64),
        ("importance", ctypes.c_void_p),
        ("matrix", ctypes.c_void_p),
        ("rounded", ctypes.c_void_p),
    )


class Native:
    """The kernels of one instruction set, as a backend of the set's name."""

    def __init__(self, instruction_set: str) -> None:
        lib = library()
        assert lib is not None
        self.name = instruction_set
        self._lib = lib
        self._kernels = lib.opt8bit_kernels(instruction_set.encode())

    def quantize_blockwise(self, x: Tensor, codebook: Tensor, view: View, codes: Tensor, absmax: Tensor) -> None:
        self._lib.opt8bit_quantize_blockwise(
            self._kernels,
            x.data_ptr(),
            DTYPES[x.dtype],
            view.rows,
            view.row_length,
            view.block_size,
            codebook.data_ptr(),
            codebook.numel(),
            codes.data_ptr(),
            absmax.data_ptr(),
            torch.get_num_threads(),
        )

    def dequantize_blockwise(self, codes: Tensor, absmax: Tensor, codebook: Tensor, view: View, x: Tensor) -> None:
        self._lib.opt8bit_dequantize_blockwise(
            self._kernels,
            codes.data_ptr(),
            absmax.data_ptr(),
            view.rows,
            view.row_length,
            view.block_size,
            codebook.data_ptr(),
            codebook.numel(),
            x.data_ptr(),
            DTYPES[x.dtype],
            torch.get_num_threads(),
        )

    def can_step(self, param: Tensor) -> bool:
        return param.dtype in DTYPES

    def prepare(self, batch: Batch, device: torch.device) -> None:
        return None

    def step(self, groups: Sequence[GroupUpdate]) -> None:
        groups = [group for group in groups if not group.is_skipped()]
        numbers = [self._lib.opt8bit_rule(group.batch.rule.name.encode()) for group in groups]
        fused = [(group, number) for group, number in zip(groups, numbers, strict=True) if number >= 0]
        if fused:
            rows = numpy.concatenate([tensor_rows(group, index) for index, (group, _) in enumerate(fused)])
            table = numpy.concatenate([group_row(group, number) for group, number in fused])
            threads = torch.get_num_threads()
            self._lib.opt8bit_step(self._kernels, rows.ctypes.data, len(rows), table.ctypes.data, threads)
        for group, number in zip(groups, numbers, strict=True):
            if number < 0:  # a rule that works on matrices: torch multiplies them, the kernels code the states
                step_group(group, self)

    def fit_grids(self, layer: WeightRounding) -> None:
        self._lib.opt8bit_fit_grids(self._kernels, ctypes.byref(layer), torch.get_num_threads())

    def gptq(self, layer: WeightRounding, *, fits: bool) -> None:
        self._lib.opt8bit_gptq(self._kernels, ctypes.byref(layer), fits, torch.get_num_threads())

    def coordinate_descent(self, layer: WeightRounding, sweeps: int) -> None:
        self._lib.opt8bit_coordinate_descent(self._kernels, ctypes.byref(layer), sweeps, torch.get_num_threads())


def group_row(group: GroupUpdate, number: int) -> Words:
    """The fields of ``Group`` in kernels/optimizer_step.h."""
    batch = group.batch
    hyper = numpy.zeros(MAX_HYPER)
    values = group.hyper_on_host()
    hyper[: len(batch.rule.hyper)] = [values[name] for name in batch.rule.hyper]
    scale = numpy.array([group.grad_scale_on_host()]).view(numpy.int64)
    rounding = ROUNDINGS.index(batch.rounding)
    return numpy.concatenate(
        [[number, batch.block_size], hyper.view(numpy.int64), scale, [rounding, batch.seed]], dtype=numpy.int64
    )


def tensor_rows(group: GroupUpdate, index: int) -> Words:
    """(n, fields) of ``Tensor`` in kernels/optimizer_step.h."""
    batch = group.batch
    states, absmaxes = len(batch.codebooks), len(batch.codebooks) if batch.coded else 0
    rows = numpy.zeros((len(group.params), 3 + 2 * MAX_STATES + 8), numpy.int64)
    rows[:, : 3 + states] = group.addresses[:, : 3 + states]
    rows[:, 3 + MAX_STATES : 3 + MAX_STATES + absmaxes] = group.addresses[:, 3 + states : 3 + states + absmaxes]
    if batch.rounding == "compensated":
        rows[:, -8] = group.addresses[:, -1]
    rows[:, -7:-5] = batch.extents
    rows[:, -5] = DTYPES[batch.dtype]
    rows[:, -4] = 8 if batch.coded else 32
    rows[:, -3] = index
    rows[:, -2] = batch.numbers
    rows[:, -1] = batch.firsts
    return rows
