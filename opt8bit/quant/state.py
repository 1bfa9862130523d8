"""Defines how a state of an optimizer is stored: codes counted from that of zero, and a scale that carries a sign."""

from __future__ import annotations

import torch
from torch import Tensor

from opt8bit.backends import backend_for
from opt8bit.quant.blockwise import block_view, check_blocks, check_plain
from opt8bit.quant.codebook import dynamic_map


def state_map(signed: bool = True) -> Tensor:
    """Returns the values of :func:`dynamic_map` by the bytes of a state: (256,) float32 on the CPU.

    Byte 0 is the value 0, so that ``zero_()``, masks, padding and ``zeros_like`` mean what they say. In the signed
    map byte ``b`` is the value of code ``(b + 127) % 256``: read as an int8 it counts the codes from zero, with the
    one exception of 128, which is +1. In the unsigned map bytes are codes.

    Args:
        signed: whether there are values below zero. Adam's second moment needs none.
    """
    values = dynamic_map(signed)
    zero_code = int((values == 0).nonzero())
    return values.roll(-zero_code)


STATE_MAPS = {signed: state_map(signed) for signed in (False, True)}


def encode_state(x: Tensor, signed: bool, block_size: int, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Stores a tensor as the optimizers store their states.

    The scale of a block is its largest element with its sign (of +a and -a, the first). Elements are coded as the
    value of :func:`state_map` nearest to ``x / scale``, decided in exact arithmetic. So the largest element is
    exact, and ``-x`` has the codes of ``x`` and the negative of its scales: no direction is favoured. Elements of the
    other sign than the largest end at -0.993 of it. In an unsigned state nothing that is positive becomes zero, as
    steps divide by its root.

    Args:
        x: any shape and strides, float32. What is not finite never changes its neighbours: infinities become the
            block's largest finite magnitude, NaN becomes 0.
        signed: whether the state can be negative. What is negative in an unsigned one becomes 0.
        block_size: elements per block, at least 1; see :class:`opt8bit.quant.BlockView`.
        backend: a name of :func:`opt8bit.backends.available`, or None for the fastest on ``x.device``.

    Returns:
        ``codes``, uint8 of the shape of ``x``, and ``scale``, float32 of shape (rows, blocks per row), both on
        ``x.device``. The error of an element is at most ``abs(scale)`` times 0.0071 (signed) or 0.0036 (unsigned).

    Raises:
        TypeError: ``x`` is of another dtype, or a DTensor or its like.
        ValueError: ``block_size`` or ``backend`` is not one.

    Source: 8-bit Optimizers via Block-wise Quantization, sections 1.3 and 2.1.
    """
    check_plain(x=x)
    if x.dtype != torch.float32:
        raise TypeError(f"x must be torch.float32, got {x.dtype}")
    view = block_view(x.shape, block_size)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    scale = torch.empty(view.absmax_shape, dtype=torch.float32, device=x.device)
    server = backend_for(x.device, backend)
    server.encode_state(x.detach().contiguous(), STATE_MAPS[signed].to(x.device), signed, view, codes, scale)
    return codes, scale


def decode_state(codes: Tensor, scale: Tensor, signed: bool, block_size: int, *, backend: str | None = None) -> Tensor:
    """Returns the values of a stored state: ``state_map(signed)[codes] * scale``, float32 of the shape of ``codes``.

    Args:
        codes, scale: as :func:`encode_state` returns them, or as ``optimizer.state[p]`` holds them.
        signed: whether the state can be negative.
        block_size: elements per block, the one that coded.
        backend: as for :func:`encode_state`.

    Raises:
        TypeError: a dtype is another one; a DTensor or its like.
        ValueError: ``scale`` has another shape than ``codes`` and ``block_size`` ask for, or lies on another device;
            ``block_size`` or ``backend`` is not one.
    """
    view = check_blocks(codes, "scale", scale, block_size)
    server = backend_for(codes.device, backend)
    x = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    table = STATE_MAPS[signed].to(codes.device)
    server.dequantize_blockwise(codes.contiguous(), scale.contiguous(), table, view, x)
    return x
