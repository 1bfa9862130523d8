"""Loads and stores what the kernels of a step need of a tile.

Where ALIGNED, addresses and lengths are multiples of 16, and loads 16 bytes wide. The compiler keeps what it is told
so only of values that the function at hand has computed itself.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opt8bit.backends.triton import blockwise, codebook, rounding
from opt8bit.backends.triton.layout import (
    BLOCK_SIZE,
    BLOCKS,
    BLOCKS_PER_ROW,
    COMPENSATION,
    FIRST_ELEMENT,
    FIRST_TILE,
    GRAD,
    MAX_CONSTANTS,
    PARAM,
    ROW_LENGTH,
    SCALES,
    STATES,
)


@triton.jit
def elements(row, field, start, columns, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns where a tile's elements are, of the tensor whose address a row has as that field."""
    pointer = tl.load(row + field).to(tl.pointer_type(DTYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer + start[:, None] + columns


@triton.jit
def scales(row, s, block):
    """Returns where the scales of a state's blocks are."""
    return tl.load(row + SCALES + s).to(tl.pointer_type(tl.float32)) + block


@triton.jit
def tile_of(row, tile, BLOCKS_PER_TILE: tl.constexpr, ALIGNED: tl.constexpr):
    """Returns the blocks of a tile, by its number among all."""
    return blockwise.blocks_of(
        tile - tl.load(row + FIRST_TILE),
        tl.load(row + ROW_LENGTH),
        tl.load(row + BLOCK_SIZE),
        tl.load(row + BLOCKS_PER_ROW),
        tl.load(row + BLOCKS),
        BLOCKS_PER_TILE,
        ALIGNED,
    )


@triton.jit
def loaded_grad(row, start, columns, mask, grad_scale, DTYPE: tl.constexpr, ALIGNED: tl.constexpr):
    grads = elements(row, GRAD, start, columns, DTYPE, ALIGNED)
    grad = tl.load(grads, mask=mask, other=0.0).to(tl.float32)
    if grad_scale is not None:
        grad *= tl.div_rn(tl.full((), 1.0, tl.float32), tl.load(grad_scale).to(tl.float32))
    return grad


@triton.jit
def loaded_states(
    row, block, start, length, columns, mask, maps, SIGNED: tl.constexpr, CODED: tl.constexpr, ALIGNED: tl.constexpr
):
    """Returns the states of the rule, in float32."""
    states = ()
    for s in tl.static_range(len(SIGNED)):
        if CODED:
            codes = elements(row, STATES + s, start, columns, tl.uint8, ALIGNED)
            tables = maps + s * codebook.TABLES
            scale = tl.load(scales(row, s, block), mask=length > 0, other=0.0)
            state = codebook.decode(tl.load(codes, mask=mask, other=0), tables) * scale[:, None]
        else:
            values = elements(row, STATES + s, start, columns, tl.float32, ALIGNED)
            state = tl.load(values, mask=mask, other=0.0)
        states = states + (state,)
    return states


@triton.jit
def loaded_constants(constants, tensor, COUNT: tl.constexpr):
    values = ()
    for i in tl.static_range(COUNT):
        values = values + (tl.load(constants + tensor * MAX_CONSTANTS + i),)
    return values


@triton.jit
def loaded_param(row, start, columns, mask, DTYPE: tl.constexpr, ROUNDING: tl.constexpr, ALIGNED: tl.constexpr):
    params = elements(row, PARAM, start, columns, DTYPE, ALIGNED)
    param = tl.load(params, mask=mask, other=0.0)
    if ROUNDING == "compensated":
        lows = elements(row, COMPENSATION, start, columns, tl.int16, ALIGNED)
        return rounding.compensated(param, tl.load(lows, mask=mask, other=0))
    return param.to(tl.float32)


@triton.jit
def store_param(
    row,
    start,
    columns,
    mask,
    param,
    key,
    DTYPE: tl.constexpr,
    ROUNDING: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    params = elements(row, PARAM, start, columns, DTYPE, ALIGNED)
    if ROUNDING == "compensated":
        lows = elements(row, COMPENSATION, start, columns, tl.int16, ALIGNED)
        high, low = rounding.split(param)
        tl.store(params, high, mask=mask)
        tl.store(lows, low, mask=mask)
    elif ROUNDING == "stochastic":
        index = (tl.load(row + FIRST_ELEMENT) + start[:, None] + columns).to(tl.uint32)
        tl.store(params, rounding.stochastically_rounded(param, key, index), mask=mask)
    else:
        tl.store(params, rounding.nearest(param, DTYPE), mask=mask)


@triton.jit
def store_state(
    row,
    s,
    block,
    start,
    length,
    columns,
    mask,
    state,
    is_lost,  # where it begins anew
    maps,
    midpoints,
    SIGNED: tl.constexpr,
    CODED: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    if CODED:
        state = tl.where(is_lost | (state != state), 0.0, state)
        scale = codebook.first_largest(state, columns) if SIGNED else tl.max(state, 1)
        tables, between = maps + s * codebook.TABLES, midpoints + s * codebook.MIDPOINTS
        new_codes = codebook.encode(state, scale, tables, between, SIGNED)
        if not SIGNED:
            new_codes = codebook.kept_positive(new_codes, state)
        codes = elements(row, STATES + s, start, columns, tl.uint8, ALIGNED)
        tl.store(codes, new_codes.to(tl.uint8), mask=mask)
        tl.store(scales(row, s, block), scale, mask=length > 0)
    else:
        values = elements(row, STATES + s, start, columns, tl.float32, ALIGNED)
        tl.store(values, state, mask=mask)
