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

from opt8bit.backends.interface import ADDRESSES, DTYPES, ROUNDINGS, Batch, Rule, Step, View
from opt8bit.backends.reference import step_group

Words = numpy.typing.NDArray[numpy.int64]

MAX_HYPER = 12  # kMaxHyper of kernels/optimizer_step.h
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
        "opt8bit_encode_state": (None, [pointer, pointer, *[integer] * 4, pointer, pointer, integer]),
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

    def encode_state(self, x: Tensor, table: Tensor, signed: bool, view: View, codes: Tensor, scale: Tensor) -> None:
        self._lib.opt8bit_encode_state(
            self._kernels,
            x.data_ptr(),
            view.rows,
            view.row_length,
            view.block_size,
            signed,
            codes.data_ptr(),
            scale.data_ptr(),
            torch.get_num_threads(),
        )

    def can_step(self, param: Tensor) -> bool:
        return param.dtype in DTYPES

    def takes_channels_last(self, rule: Rule) -> bool:
        return self._number(rule) >= 0 and not rule.whole

    def prepare(self, batches: Sequence[Batch]) -> Tables | None:
        numbers = [self._number(batch.rule) for batch in batches]
        return Tables(batches, numbers) if min(numbers) >= 0 else None

    def step(self, step: Step) -> None:
        if step.is_skipped():
            return
        grad_scale = step.grad_scale_on_host()
        if step.prepared is None:  # a rule that works on matrices: torch multiplies them, the kernels code the states
            for update in step.updates():
                step_group(update, self, grad_scale)
            return
        tensors, groups = step.prepared.filled(step, grad_scale)
        threads = torch.get_num_threads()
        self._lib.opt8bit_step(self._kernels, tensors.ctypes.data, len(tensors), groups.ctypes.data, threads)

    def _number(self, rule: Rule) -> int:
        """Returns a rule's number among the kernels, -1 if there is none for it."""
        return self._lib.opt8bit_rule(rule.name.encode())

    def fit_grids(self, layer: WeightRounding) -> None:
        self._lib.opt8bit_fit_grids(self._kernels, ctypes.byref(layer), torch.get_num_threads())

    def gptq(self, layer: WeightRounding, *, fits: bool) -> None:
        self._lib.opt8bit_gptq(self._kernels, ctypes.byref(layer), fits, torch.get_num_threads())

    def coordinate_descent(self, layer: WeightRounding, sweeps: int) -> None:
        self._lib.opt8bit_coordinate_descent(self._kernels, ctypes.byref(layer), sweeps, torch.get_num_threads())


class Tables:
    """The tensors and groups of a step as the kernels read them: ``Tensor`` and ``Group`` of kernels/optimizer_step.h.

    Args:
        batches: a group of the kernels each.
        numbers: of their rules.
    """

    def __init__(self, batches: Sequence[Batch], numbers: Sequence[int]) -> None:
        self._tensors = numpy.concatenate([_tensor_rows(batch, group) for group, batch in enumerate(batches)])
        self._groups = numpy.stack([_group_row(*pair) for pair in zip(batches, numbers, strict=True)])
        self._hyper: list[object] = [None] * len(batches)  # what the groups hold now

    def filled(self, step: Step, grad_scale: float) -> tuple[Words, Words]:
        """Returns both with what is new in a step: (n, words of Tensor) and (batches, words of Group)."""
        self._tensors[:, :ADDRESSES] = step.addresses
        for group, hyper in enumerate(step.hyper):
            if hyper is not self._hyper[group]:
                values = [value.item() if isinstance(value, Tensor) else value for value in hyper.values()]
                self._groups[group, HYPER : HYPER + len(values)] = numpy.array(values, numpy.float64).view(numpy.int64)
                self._hyper[group] = hyper
        self._groups[:, GRAD_SCALE] = numpy.float64(grad_scale).view(numpy.int64)
        return self._tensors, self._groups


HYPER = 2  # the word of Group where they begin
GRAD_SCALE = HYPER + MAX_HYPER


def _group_row(batch: Batch, number: int) -> Words:
    rounding = ROUNDINGS.index(batch.rounding)
    return numpy.array([number, batch.block_size, *[0] * (MAX_HYPER + 1), rounding, batch.seed], numpy.int64)


def _tensor_rows(batch: Batch, group: int) -> Words:
    count = len(batch.views)
    columns = (
        numpy.zeros((ADDRESSES, count), numpy.int64),
        batch.extents.T,
        numpy.full(count, DTYPES[batch.dtype]),
        numpy.full(count, 8 if batch.coded else 32),
        numpy.full(count, group),
        batch.numbers,
        batch.firsts,
        batch.positions,
        numpy.zeros((2, count), numpy.int64),  # param and grad are no copies
    )
    return numpy.ascontiguousarray(numpy.vstack(columns).T, numpy.int64)
