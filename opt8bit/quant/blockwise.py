"""Block-wise quantization: the block view of a tensor, and the only quantizer in the package."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from opt8bit.backends import backend_for
from opt8bit.quant.codebook import check_codebook

QUANTIZABLE = (torch.float32, torch.bfloat16, torch.float16)


class BlockView(NamedTuple):
    """Says how a tensor is cut into blocks: ``rows`` rows of ``row_length`` elements each, every row cut by itself.

    A tensor of shape (d0, d1, ..., dk) is d0 rows of d1 * ... * dk elements in row-major order; a tensor of
    one dimension (or none) is one row. The last block of a row may be short. A shard along dimension 0
    therefore never cuts a block.
    """

    rows: int
    row_length: int
    block_size: int
    blocks_per_row: int

    @property
    def absmax_shape(self) -> tuple[int, int]:
        return self.rows, self.blocks_per_row


@functools.lru_cache(maxsize=4096)
def block_view(shape: torch.Size | tuple[int, ...], block_size: int) -> BlockView:
    """Returns the block view of a tensor of ``shape``; ``block_size`` is the largest number of elements of a block.

    Raises:
        ValueError: ``block_size`` is not a positive integer.
    """
    if isinstance(block_size, bool) or not isinstance(block_size, int) or block_size < 1:
        raise ValueError(f"block_size must be a positive integer, got {block_size!r}")
    rows = shape[0] if len(shape) > 1 else 1
    row_length = math.prod(shape[1:] if len(shape) > 1 else shape)
    block_size = min(block_size, max(row_length, 1))  # a longer block is the row
    return BlockView(rows, row_length, block_size, -(-row_length // block_size))


def quantize_blockwise(
    x: Tensor, codebook: Tensor, block_size: int, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Codes each element as the codebook value nearest to it, in units of the largest magnitude of its block.

    ``codes[k] = argmin_j |x[k] - codebook[j] * absmax|``, decided in exact arithmetic (a tie goes to the lower
    code), with ``absmax = max |x|`` over the finite elements of the block. So an exact 0 stays 0 wherever the
    codebook holds one, and a block of zeros has ``absmax`` 0. An element that is not finite never changes its
    neighbours: +Inf is coded as the largest value, -Inf as the smallest, NaN as the one nearest to 0.

    Args:
        x: any shape and strides; float32, bfloat16 or float16.
        codebook: (n,) float32, 2 to 256 values in ascending order, as from :func:`dynamic_map`.
        block_size: elements per block, at least 1; see :class:`BlockView`.
        backend: a name of :func:`opt8bit.backends.available`, or None for the fastest on ``x.device``.

    Returns:
        ``codes``, uint8 of the shape of ``x``, and ``absmax``, float32 of shape (rows, blocks per row), both on
        ``x.device``. The error of an element is at most ``absmax`` times half the gap between the two values
        around it: 0.0071 * absmax with the signed dynamic map, 0.0036 * absmax with the unsigned one.

    Raises:
        TypeError: ``x`` or ``codebook`` is of another dtype, or ``x`` a DTensor or its like.
        ValueError: ``codebook``, ``block_size`` or ``backend`` is not one.

    Source: 8-bit Optimizers via Block-wise Quantization, section 2.1.
    """
    check_plain(x=x)
    if x.dtype not in QUANTIZABLE:
        raise TypeError(f"x must be one of {', '.join(map(str, QUANTIZABLE))}, got {x.dtype}")
    check_codebook(codebook)
    view = block_view(x.shape, block_size)
    server = backend_for(x.device, backend)
    codes = torch.empty(x.shape, dtype=torch.uint8, device=x.device)
    absmax = torch.empty(view.absmax_shape, dtype=torch.float32, device=x.device)
    server.quantize_blockwise(x.detach().contiguous(), codebook.to(x.device).contiguous(), view, codes, absmax)
    return codes, absmax


def dequantize_blockwise(
    codes: Tensor,
    absmax: Tensor,
    codebook: Tensor,
    block_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    backend: str | None = None,
) -> Tensor:
    """Returns the values of codes: ``codebook[codes] * absmax``, computed in float32, rounded once to ``dtype``.

    Args:
        codes: uint8 of any shape and strides.
        absmax: float32, (rows, blocks per row), as :func:`quantize_blockwise` returned it.
        codebook: (n,) float32, the one that coded.
        block_size: elements per block, the one that coded.
        dtype: of the result: float32, bfloat16 or float16.
        backend: as for :func:`quantize_blockwise`.

    Returns:
        A contiguous tensor of the shape of ``codes``.

    Raises:
        TypeError: a dtype is another one; a DTensor or its like.
        ValueError: ``absmax`` has not the shape that ``codes`` and ``block_size`` ask for, or lies on another
            device; a code is beyond the codebook; ``codebook``, ``block_size`` or ``backend`` is not one.
    """
    if dtype not in QUANTIZABLE:
        raise TypeError(f"dtype must be one of {', '.join(map(str, QUANTIZABLE))}, got {dtype}")
    check_codebook(codebook)
    view = check_blocks(codes, "absmax", absmax, block_size)
    if codebook.numel() < 256 and codes.numel() and int(codes.max()) >= codebook.numel():
        raise ValueError(f"codes must be below the codebook's {codebook.numel()}, got {int(codes.max())}")
    server = backend_for(codes.device, backend)
    x = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    server.dequantize_blockwise(
        codes.contiguous(), absmax.contiguous(), codebook.to(codes.device).contiguous(), view, x
    )
    return x


def check_blocks(codes: Tensor, name: str, scales: Tensor, block_size: int) -> BlockView:
    """Returns the block view of codes whose blocks have these scales.

    Args:
        name: of the scales, for messages.

    Raises:
        TypeError: a dtype is another one than uint8 and float32; a DTensor or its like.
        ValueError: the scales have another shape than codes and block size ask for, or lie on another device.
    """
    check_plain(**{"codes": codes, name: scales})
    if codes.dtype != torch.uint8 or scales.dtype != torch.float32:
        raise TypeError(f"codes must be uint8 and {name} float32, got {codes.dtype} and {scales.dtype}")
    view = block_view(codes.shape, block_size)
    if scales.shape != view.absmax_shape or scales.device != codes.device:
        raise ValueError(
            f"{name} must have shape {view.absmax_shape} on {codes.device} for codes of shape "
            f"{tuple(codes.shape)} in blocks of {block_size}, got {tuple(scales.shape)} on {scales.device}"
        )
    return view


def check_plain(**tensors: Tensor) -> None:
    """Refuses what has no memory of its own to be read, such as a DTensor."""
    for name, tensor in tensors.items():
        if is_traceable_wrapper_subclass(tensor):
            raise TypeError(f"{name} must be a plain tensor, got a {type(tensor).__name__}")
