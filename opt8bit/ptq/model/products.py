"""Products of float32 matrices on CPUs by oneDNN, which torch brings along but uses for other dtypes only.

MKL, torch's choice for float32, leaves half of the width of AVX-512 idle on processors that are not Intel's (AMD's Zen
5, for one). On Intel's, and where there is no AVX-512, it is the faster one, and has all products. They are those of
float32 either way, summed in another order.
"""

from __future__ import annotations

import functools
import platform
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

LEAST = 2**20  # multiplications; below, the way to oneDNN takes longer than the product
CPUINFO = Path("/proc/cpuinfo")  # of Linux, where platform does not tell the processor's maker


class Products(TorchFunctionMode):
    """Sends ``nn.functional.linear``, and so ``nn.Linear``, to oneDNN where that serves; without gradients."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is linear and not kwargs and len(args) in (2, 3) and not torch.compiler.is_compiling():
            operands: tuple[Any, ...] = (*args, None)[:3]
            if _serves(*operands):
                return _product(*operands)
        return func(*args, **(kwargs or {}))


@contextmanager
def fast_products() -> Iterator[None]:
    """Turns :class:`Products` on where oneDNN serves. Elsewhere a mode would only make every call of torch take longer.

    Torch's fused transformer layers, which call no layer inside, are off in both cases, as any mode turns them off.
    """
    if _operator() is not None:
        with Products():
            yield
        return
    was_enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(was_enabled)


def _serves(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether oneDNN can multiply them, and fast: parts of rows or columns go to its reference code."""
    operands = [x, weight] if bias is None else [x, weight, bias]
    return (
        _operator() is not None
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and all(_is_plain(operand) for operand in operands)
        and _fit(x, weight, bias)
        and x.shape[:-1].numel() * weight.numel() >= LEAST
    )


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Tells whether their shapes are a layer's; torch knows what to do, or to say, where they are not."""
    is_layer = x.dim() > 0 and weight.dim() == 2 and x.shape[-1] == weight.shape[1]
    return is_layer and (bias is None or bias.shape == weight.shape[:1])


def _is_plain(operand: Tensor) -> bool:
    return (
        type(operand) in (Tensor, nn.Parameter)
        and operand.dtype == torch.float32
        and operand.device.type == "cpu"
        and operand.layout == torch.strided
        and (operand.is_contiguous() or (operand.dim() == 2 and operand.T.is_contiguous()))
    )


def _operator() -> Any:
    if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return None
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or _is_intels():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@functools.cache
def _is_intels() -> bool:
    """Tells whether Intel made the processor."""
    return "GenuineIntel" in (CPUINFO.read_text() if CPUINFO.is_file() else platform.processor())


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _operator()(x, weight, bias, "none", [], "")
