"""Machines: which backend serves a device.

``OPT8BIT_BACKEND`` in the environment names the backend for everything: ``reference``, or an instruction set
of this processor (``opt8bit info`` lists them).
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import torch
from torch import Tensor

from opt8bit.backends import native
from opt8bit.backends.description import Description, data_ptrs
from opt8bit.backends.interface import (
    ADDRESSES,
    COMPENSATION,
    DTYPES,
    Backend,
    Batch,
    Step,
    is_interpreting,
    note_writes,
    stored_as,
)
from opt8bit.backends.reference import Reference, as_real
from opt8bit.backends.rule import Rule
from opt8bit.warning import first_of, warn

__all__ = [
    "ADDRESSES",
    "COMPENSATION",
    "Backend",
    "Batch",
    "Description",
    "Rule",
    "Step",
    "as_real",
    "available",
    "backend_for",
    "can_capture",
    "check_kernels",
    "counts_on_device",
    "data_ptrs",
    "first_of",
    "get",
    "note_writes",
    "rounding_kernels",
    "stored_as",
    "wanted_backend",
    "warn",
    "why",
]

REFERENCE = "reference"
TRITON = "triton"
TRITON_DEVICES = ("cuda", "xpu")  # torch's names; ROCm's devices are "cuda", too
ENVIRONMENT = "OPT8BIT_BACKEND"
MIN_TRITON = (3, 4)
NO_TRITON = (
    "Triton, which comes with torch's builds for GPUs on Linux, cannot be imported or is older than 3.4 (torch 2.8), "
    "so a slower reference serves {device}: pip install triton, or a newer torch"
)
NO_KERNELS = (
    f"opt8bit has no compiled kernels in {native.FOLDER}, so a slower reference serves the CPU. If "
    "that is a clone's source, run Python elsewhere; else install it again, with a C++17 compiler (g++ or clang++) at "
    "hand and pip's --force-reinstall --no-cache-dir"
)


def available(device: torch.device | str = "cpu") -> list[str]:
    """Returns the names of the backends that can serve a device, fastest first."""
    kind = torch.device(device).type
    if kind == "cpu":  # where Triton's interpreter serves, too, if it is asked to
        return [*native.instruction_sets(), REFERENCE, *([TRITON] if is_interpreting() and _triton() else [])]
    return [TRITON, REFERENCE] if kind in TRITON_DEVICES and _triton() else [REFERENCE]


@functools.cache
def get(name: str) -> Backend:
    """Returns the backend of a name."""
    if name == TRITON:
        return _triton().Triton()
    return Reference() if name == REFERENCE else native.Native(name)


@functools.cache
def _triton() -> Any:
    """Returns the module of the kernels in Triton, or None where Triton is missing or too old to compile them."""
    try:
        found: Any = importlib.import_module("triton")
    except ImportError:
        return None
    if tuple(map(int, found.__version__.split(".")[:2])) < MIN_TRITON:
        return None
    return importlib.import_module("opt8bit.backends.triton")


def check_kernels(rule: Rule) -> None:
    """Checks a rule against its compiled kernel, if it has one; against one in Triton it is checked when that is used.

    Raises:
        TypeError: they differ.
    """
    native.check_rule(rule)


def counts_on_device(param: Tensor, rule: Rule) -> bool:
    """Tells whether the backend of a parameter keeps its count of steps on its device, never to wait for it."""
    names = available(param.device)
    is_triton = (wanted_backend() or names[0]) == TRITON and TRITON in names
    return is_triton and _triton().functions_of(rule) is not None and param.dtype in DTYPES


def can_capture(param: Tensor, rule: Rule) -> bool:
    """Tells whether a step of a parameter can be a part of a CUDA graph."""
    return counts_on_device(param, rule) and param.device.type != "xpu"


@functools.cache
def _warn_once(message: str) -> None:
    warn(message, RuntimeWarning)


def wanted_backend() -> str | None:
    """Returns the backend that the environment names."""
    return os.environ.get(ENVIRONMENT)


def backend_for(device: torch.device | str, name: str | None = None) -> Backend:
    """Returns the backend that serves a device: ``name``, else that of the environment, else the fastest.

    Raises:
        ValueError: the backend asked for cannot serve this device here.
    """
    wanted = name or wanted_backend()
    names = available(device)
    if wanted and wanted not in names:
        which = "backend" if name else f"the environment's {ENVIRONMENT}"
        raise ValueError(f"{which} must be one of {', '.join(names)} on {torch.device(device)}, got {wanted!r}")
    kind = torch.device(device).type
    if not wanted and kind == "cpu" and native.library() is None:
        _warn_once(NO_KERNELS)
    if not wanted and kind in TRITON_DEVICES and _triton() is None:
        _warn_once(NO_TRITON.format(device=kind))
    return get(wanted or names[0])


def rounding_kernels(device: torch.device | str) -> native.Native | None:
    """Returns the compiled kernels that round weights on a device, or None where plain torch does."""
    backend = backend_for(device)
    return backend if isinstance(backend, native.Native) else None


def why(device: str) -> str:
    """Returns one line on why :func:`backend_for` chooses as it does."""
    if os.environ.get(ENVIRONMENT):
        return f"named by {ENVIRONMENT}"
    if device in TRITON_DEVICES:
        return "kernels in Triton" if _triton() else NO_TRITON.format(device=device)
    if device != "cpu":
        return "no kernels for this device: plain torch"
    if native.library() is None:
        return NO_KERNELS
    return "fastest compiled kernels this processor can run, of " + ", ".join(native.instruction_sets())
