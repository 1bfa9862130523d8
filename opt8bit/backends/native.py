"""CPU: the thin binding to kernels/, a shared library without torch that is called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy
import numpy.typing
import torch
from torch import Tensor

from opt8bit.backends.interface import DTYPES, Batch, Step, View
from opt8bit.backends.reference import step_batch
from opt8bit.backends.rule import Rule, check_alike
from opt8bit.backends.step_tables import GROUP, TENSOR, Tables

FOLDER = Path(__file__).parents[1] / "lib"
LIBRARY = {"win32": "opt8bit_kernels.dll", "darwin": "libopt8bit_kernels.dylib"}.get(
    sys.platform, "libopt8bit_kernels.so"
)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Returns the shared library, or None where the package was installed without it.

    Raises:
        ImportError: it is of another version of the package.
    """
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
        "opt8bit_sizes": (None, [pointer]),
        "opt8bit_rules": (text, [pointer]),
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
    sizes = numpy.zeros(2, numpy.int64)
    lib.opt8bit_sizes(sizes.ctypes.data)
    if sizes.tolist() != [TENSOR.itemsize, GROUP.itemsize]:
        raise ImportError(f"{path} is of another version of opt8bit: install it again")
    lib.opt8bit_use_torch_threads(torch_parallel_for())
    return lib


def torch_symbols(*names: str) -> list[int] | None:
    """Returns addresses of functions of torch's stable C interface, or None where this torch lacks one."""
    directory = Path(torch.__file__).parent / "lib"
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib", "torch_cpu.dll"):
        if (directory / file).exists():
            lib = ctypes.CDLL(str(directory / file))
            if all(hasattr(lib, name) for name in names):
                return [ctypes.cast(getattr(lib, name), ctypes.c_void_p).value or 0 for name in names]
    return None


def torch_parallel_for() -> int | None:
    """Returns the address of torch's own parallel loop, which torch 2.10 and later export to C; else None."""
    found = torch_symbols("torch_parallel_for")
    return found[0] if found else None


def instruction_sets() -> list[str]:
    """Returns the instruction sets with kernels that this processor runs, fastest first; none without the library."""
    lib = library()
    return lib.opt8bit_instruction_sets().decode().split() if lib else []


class RuleFacts(NamedTuple):
    """Holds what a functor says of itself."""

    number: int
    hyper: tuple[str, ...]
    signs: tuple[bool, ...]  # of each state, whether it can be negative
    whole: bool


@functools.cache
def rules() -> dict[str, RuleFacts]:
    """Returns the rules that have functors, by name; none without the library."""
    lib = library()
    if lib is None:
        return {}
    lines = lib.opt8bit_rules(lib.opt8bit_kernels(b"scalar")).decode().splitlines()
    result = {}
    for number, line in enumerate(lines):
        name, hyper, signs, whole = (part.strip() for part in line.split(";"))
        names = tuple(part.strip() for part in hyper.split(","))
        result[name] = RuleFacts(number, names, tuple(sign == "signed" for sign in signs.split()), whole == "whole")
    return result


@functools.cache
def check_rule(rule: Rule) -> None:
    """Checks a rule against its functor, if it has one.

    Raises:
        TypeError: they differ.
    """
    found = rules().get(rule.name)
    for what in ("hyper", "signs", "whole") if found else ():
        check_alike(rule, what, getattr(found, what), "the functor")


class WeightRounding(ctypes.Structure):
    """Mirrors ``WeightRounding`` of kernels/weight_rounding.h, which says what the fields are."""

    _fields_ = (
        ("weight", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("group_of", ctypes.c_void_p),
        ("groups", ctypes.c_int64),
        ("scale", ctypes.c_void_p),
        ("zero_point", ctypes.c_void_p),
        ("largest", ctypes.c_float),
        ("zero_points", ctypes.c_int64),
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

    def can_step(self, param: Tensor, grad: Tensor) -> bool:
        return param.dtype in DTYPES and grad.dtype in DTYPES

    def can_skip(self) -> bool:
        return True

    def has_kernel(self, rule: Rule) -> bool:
        return rule.name in rules()

    def takes_channels_last(self, rule: Rule) -> bool:
        return self.has_kernel(rule) and not rule.whole

    def prepare(self, batches: Sequence[Batch]) -> Tables | None:
        found = [rules().get(batch.rule.name) for batch in batches]
        return Tables(batches, [facts.number for facts in found if facts]) if all(found) else None

    def step(self, step: Step) -> None:
        if step.is_skipped():
            return
        grad_scale = step.grad_scale_on_host()
        if step.prepared is None:  # a rule has no kernel: torch computes the step, and kernels code the states
            for each in step.of_batches():
                step_batch(each, self, grad_scale)
            return
        tensors, count, groups = step.prepared.filled(step, grad_scale)
        self._lib.opt8bit_step(self._kernels, tensors, count, groups, torch.get_num_threads())

    def fit_grids(self, layer: WeightRounding) -> None:
        self._lib.opt8bit_fit_grids(self._kernels, ctypes.byref(layer), torch.get_num_threads())

    def gptq(self, layer: WeightRounding, *, fits: bool) -> None:
        self._lib.opt8bit_gptq(self._kernels, ctypes.byref(layer), fits, torch.get_num_threads())

    def coordinate_descent(self, layer: WeightRounding, sweeps: int) -> None:
        self._lib.opt8bit_coordinate_descent(self._kernels, ctypes.byref(layer), sweeps, torch.get_num_threads())
