"""The block view of a tensor, and the kernels behind the functions of :mod:`opt8bit.quant` that code blocks."""

from __future__ import annotations

import triton
import triton.language as tl

from opt8bit.backends.triton import codebook, rounding


@triton.jit
def blocks_of(
    tile,  # int64, of the tensor
    row_length,
    block_size,
    blocks_per_row,
    blocks,
    BLOCKS_PER_TILE: tl.constexpr,
    ALIGNED: tl.constexpr = False,  # rows and blocks are multiples of 16, which the compiler may know
):
    """Returns the numbers of a tile's blocks, where they begin, and their lengths, 0 behind the tensor's last."""
    block = tile * BLOCKS_PER_TILE + tl.arange(0, BLOCKS_PER_TILE)
    in_row = block % blocks_per_row
    start = block // blocks_per_row * row_length + in_row * block_size
    length = tl.minimum(block_size, row_length - in_row * block_size)
    length = tl.where(block < blocks, length, 0)
    if ALIGNED:
        start, length = tl.multiple_of(start, 16), tl.multiple_of(length, 16)
    return block, start, length


@triton.jit
def quantize_kernel(
    x,
    codes,
    absmax,
    midpoints,  # (values + 1,), float64
    size,  # of the codebook
    row_length,
    block_size,
    blocks_per_row,
    blocks,
    BLOCKS_PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    block, start, length = blocks_of(tile, row_length, block_size, blocks_per_row, blocks, BLOCKS_PER_TILE)
    largest = tl.zeros((BLOCKS_PER_TILE,), tl.float32)
    columns = tl.arange(0, BLOCK)[None, :]
    for begin in range(0, block_size, BLOCK):
        mask = begin + columns < length[:, None]
        part = tl.load(x + start[:, None] + begin + columns, mask=mask, other=0.0).to(tl.float32)
        magnitude = tl.where(tl.abs(part) < float("inf"), tl.abs(part), 0.0)
        largest = tl.maximum(largest, tl.max(magnitude, 1))
    tl.store(absmax + block, largest, mask=length > 0)
    for begin in range(0, block_size, BLOCK):
        mask = begin + columns < length[:, None]
        part = tl.load(x + start[:, None] + begin + columns, mask=mask, other=0.0).to(tl.float32)
        is_zero = (part != part) | (largest == 0)[:, None]
        found = codebook.search(tl.where(is_zero, 0.0, part), largest, midpoints, size)
        tl.store(codes + start[:, None] + begin + columns, found.to(tl.uint8), mask=mask)


@triton.jit
def encode_state_kernel(
    x,  # float32
    codes,
    scales,
    midpoints,  # (257,), float64, of the map in ascending order
    row_length,
    block_size,
    blocks_per_row,
    blocks,
    BLOCKS_PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    SIGNED: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    block, start, length = blocks_of(tile, row_length, block_size, blocks_per_row, blocks, BLOCKS_PER_TILE)
    scale = tl.zeros((BLOCKS_PER_TILE,), tl.float32)  # the first of the largest so far
    columns = tl.arange(0, BLOCK)[None, :]
    for begin in range(0, block_size, BLOCK):
        mask = begin + columns < length[:, None]
        part = tl.load(x + start[:, None] + begin + columns, mask=mask, other=0.0)
        part = tl.where(tl.abs(part) < float("inf"), part, 0.0)
        largest = codebook.first_largest(part if SIGNED else tl.maximum(part, 0.0), columns)
        scale = tl.where(tl.abs(largest) > tl.abs(scale), largest, scale)
    tl.store(scales + block, scale, mask=length > 0)
    for begin in range(0, block_size, BLOCK):
        mask = begin + columns < length[:, None]
        part = tl.load(x + start[:, None] + begin + columns, mask=mask, other=0.0)
        is_zero = (part != part) | (scale == 0)[:, None]
        mirrored = tl.where(is_zero, 0.0, tl.where(scale[:, None] < 0, -part, part))
        found = codebook.search(mirrored, tl.abs(scale), midpoints, 256)
        found = codebook.from_zero(found, SIGNED)
        if not SIGNED:
            found = codebook.kept_positive(found, part)
        tl.store(codes + start[:, None] + begin + columns, found.to(tl.uint8), mask=mask)


@triton.jit
def dequantize_kernel(
    codes,
    absmax,
    values,  # of the codebook
    x,
    row_length,
    block_size,
    blocks_per_row,
    blocks,
    BLOCKS_PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    block, start, length = blocks_of(tile, row_length, block_size, blocks_per_row, blocks, BLOCKS_PER_TILE)
    scale = tl.load(absmax + block, mask=length > 0, other=0.0)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    for begin in range(0, block_size, BLOCK):
        mask = begin + columns < length[:, None]
        part = tl.load(codes + start[:, None] + begin + columns, mask=mask, other=0).to(tl.int32)
        value = tl.load(values + part, mask=mask, other=0.0) * scale
        tl.store(x + start[:, None] + begin + columns, rounding.nearest(value, x.dtype.element_ty), mask=mask)
