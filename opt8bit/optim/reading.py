"""The values of a state dict, checked as they are read: whatever a file may hold, here it is a tensor or an error."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opt8bit.backends import as_real
from opt8bit.backends.reference import to_blocks
from opt8bit.optim.old_layout import renewed_codes
from opt8bit.quant import BlockView, block_view, decode_state

REAL_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
COMPLEX_DTYPES = (torch.complex64, torch.complex128)
STEP_DTYPES = (*REAL_DTYPES, torch.int64, torch.int32)
MAX_STEP = 2**63  # more steps than anyone takes, and still finite as float32


class Coded(NamedTuple):
    """A state as :class:`opt8bit.optim.base.Optimizer8bit` stores it in 8 bits."""

    codes: Tensor  # of the parameter's shape, uint8
    scale: Tensor  # (rows, blocks per row), float32
    view: BlockView
    signed: bool

    def decoded(self) -> Tensor:
        """Returns the values, float32 of the parameter's shape."""
        return decode_state(self.codes, self.scale, self.signed, self.view.block_size)


Read = dict[str, "Tensor | Coded"]  # of a parameter, by the names of its rule; never copied yet


def check_tensor(where: str, name: str, value: Any, shape: torch.Size, dtypes: Collection[torch.dtype]) -> Tensor:
    """Returns the tensor that a state dict has for a state.

    Args:
        where: the parameter, in words.
        dtypes: those it may have.

    Raises:
        ValueError: it is not a dense tensor with values, of this shape and of one of these dtypes.
    """
    label = f"{where}: state {name!r}"
    if not isinstance(value, Tensor):
        raise ValueError(f"{label} must be a tensor, got {type(value).__name__}")
    found = flaw(value)
    if found:
        raise ValueError(f"{label} must be a dense tensor, got {found}")
    if value.shape != shape or value.dtype not in dtypes:
        raise ValueError(
            f"{label} must have shape {tuple(shape)} and be {' or '.join(map(str, dtypes))}, "
            f"got {tuple(value.shape)} and {value.dtype}"
        )
    return value.detach()


def described(value: object) -> str:
    """Returns a value in words, whatever it is. Printing a tensor whose memory was freed ends the process."""
    if isinstance(value, (tuple, list)):
        inner = ", ".join(map(described, value[:4])) + (", ..." if len(value) > 4 else "")
        return f"({inner})" if isinstance(value, tuple) else f"[{inner}]"
    if value is None or isinstance(value, (bool, int, float, str)):
        return reprlib.repr(value)
    return f"a {type(value).__name__}"


def is_number(value: Any) -> bool:
    """Tells whether it is a real number that is finite as a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def read_step(where: str, value: Any) -> Tensor:
    """Steps taken so far, () float32 on the CPU.

    Raises:
        ValueError: it is not a whole number of steps, as a number or a tensor of one element.
    """
    if isinstance(value, Tensor):
        shape = value.shape if value.layout == torch.strided and value.numel() == 1 else torch.Size()
        value = check_tensor(where, "step", value, shape, STEP_DTYPES).item()
    if not is_number(value) or not 0 <= value < MAX_STEP or value != int(value):
        raise ValueError(f"{where}: state 'step' must be a whole number of steps, got {described(value)}")
    return torch.tensor(float(value), dtype=torch.float32, device="cpu")


def read_full(where: str, name: str, value: Any, param: Tensor, signed: bool) -> Tensor:
    """Returns a state in full, of the parameter's shape and device: float32, or the parameter's dtype if larger.

    Numbers that are not finite are taken as they are: they never change their neighbours.

    Raises:
        ValueError: it is not of the parameter's shape, or negative though its rule never makes it so.
    """
    dtypes = COMPLEX_DTYPES if param.is_complex() else REAL_DTYPES
    tensor = check_tensor(where, name, value, param.shape, dtypes)
    tensor = tensor.to(param.device, torch.promote_types(param.dtype, torch.float32))
    if not signed:
        check_not_negative(where, name, tensor)
    return tensor


def read_coded(
    where: str,
    names: tuple[str, str],
    values: tuple[Any, Any],
    param: Tensor,
    signed: bool,
    block_size: int,
    *,
    is_old: bool = False,
) -> Coded:
    """Returns a state of 8 bits, on the parameter's device.

    Codes may have been cast to a float dtype, which holds them exactly; scales to one of 16 bits, unless one of them
    became 0 or infinite by it.

    Args:
        names: of codes and scales.
        values: codes and scales themselves.
        is_old: whether they are of the old layout: codes of the ascending map, and no scale is negative.

    Raises:
        ValueError: codes or scales are not of the parameter's shape in blocks of ``block_size``, or a scale is
            not finite, negative where it cannot be, or 0 though its block holds numbers.
    """
    (codes_name, scale_name), (codes, scale) = names, values
    if param.is_complex():
        raise ValueError(f"{where}: states must be complex as the parameter is, got codes of {codes_name!r}")
    codes = _read_bytes(where, codes_name, codes, param.shape)
    codes = (renewed_codes(codes, signed) if is_old else codes).to(param.device)
    view = block_view(param.shape, block_size)
    scale = check_tensor(where, scale_name, scale, torch.Size(view.absmax_shape), REAL_DTYPES).to(param.device)
    if is_old or not signed:
        check_absmax(where, scale_name, scale)
    elif not bool(scale.isfinite().all()):
        raise ValueError(f"{where}: state {scale_name!r} must be finite")
    if scale.dtype != torch.float32 and codes.numel():
        is_lost = (scale == 0) & (to_blocks(codes, view) != 0).any(-1)
        if bool(is_lost.any()):
            raise ValueError(
                f"{where}: state {scale_name!r} was cast to {scale.dtype}, and became 0 for {int(is_lost.sum())} "
                "blocks that hold numbers; keep it in torch.float32"
            )
    return Coded(codes, scale.to(torch.float32), view, signed)


def _read_bytes(where: str, name: str, value: Any, shape: torch.Size) -> Tensor:
    """Returns codes, which someone may have cast to a float dtype."""
    tensor = check_tensor(where, name, value, shape, (torch.uint8, *REAL_DTYPES))
    if tensor.dtype == torch.uint8:
        return tensor
    wide = tensor.float()
    if not bool(((wide >= 0) & (wide <= 255) & (wide == wide.floor())).all()):
        raise ValueError(f"{where}: state {name!r} must hold whole numbers from 0 to 255, got others in {tensor.dtype}")
    return wide.to(torch.uint8)


def check_absmax(where: str, name: str, absmax: Tensor) -> None:
    """Raises ValueError where a largest magnitude is negative or not finite."""
    if not bool((absmax.isfinite() & (absmax >= 0)).all()):
        raise ValueError(f"{where}: state {name!r} must be finite and not negative")


def check_not_negative(where: str, name: str, tensor: Tensor) -> None:
    """Raises ValueError where a number is negative, in either part of a complex one."""
    parts = as_real(tensor)
    if bool((parts < 0).any()):
        raise ValueError(f"{where}: state {name!r} must not be negative, got {parts.min().item()}")


def flaw(tensor: Tensor) -> str | None:
    """Returns what keeps a tensor from being read as numbers in memory, in words, or None."""
    if type(tensor) not in (Tensor, torch.nn.Parameter):
        return f"one of type {type(tensor).__name__}"
    if tensor.is_nested:
        return "a nested one"
    if tensor.layout != torch.strided:
        return f"one of layout {tensor.layout}"
    if tensor.is_meta:
        return "one on the meta device"
    return "one whose memory was freed" if _bytes_reached(tensor) > tensor.untyped_storage().nbytes() else None


def _bytes_reached(tensor: Tensor) -> int:
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in steps)
    return (last + 1) * tensor.element_size()
