"""One step of many tensors at once: the kernels, each of which a rule and a storage make another one of.

Whatever the number of tensors, a step is one launch that counts the step and computes each tensor's constants, and one
launch for all tensors that are cut alike. What the kernels know of the tensors is in one table, a row for each, behind
a head that all share; the programs go through ``tiles``, which names the tensor of each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from opt8bit.backends.triton import rounding
from opt8bit.backends.triton.access import (
    loaded_constants,
    loaded_grad,
    loaded_param,
    loaded_states,
    store_param,
    store_state,
    tile_of,
)
from opt8bit.backends.triton.layout import FIRST_TILE, HEAD, MAX_CONSTANTS, NUMBER, ROW, SEED, STEP, TILES


@triton.jit
def constants_kernel(
    table,  # int64: the head and the rows
    constants,  # (tensors, MAX_CONSTANTS), float32
    keys,  # (tensors,), int64: of random bits
    squares,  # (tiles, 2), float64: what each tile contributes to the squares of the norms
    lr,  # one element, in the place of the first hyper-parameter; or None
    found_inf,  # one element, not zero if the step is to be skipped; or None
    CONSTANTS: tl.constexpr,
    HYPER: tl.constexpr,
    AFTER_MEASURE: tl.constexpr,
):
    """Counts the step of a tensor, one for each program, and computes what its rule needs to know of it."""
    tensor = tl.program_id(0)
    row = table + HEAD + tensor * ROW
    hyper = ()
    for i in tl.static_range(HYPER):
        if i == 0 and lr is not None:
            hyper = hyper + (tl.load(lr).to(tl.float64),)
        else:
            hyper = hyper + (tl.load(table + i).to(tl.float64, bitcast=True),)
    steps = tl.load(row + STEP).to(tl.pointer_type(tl.float32))
    step = tl.load(steps)
    norms = (tl.zeros((), tl.float64), tl.zeros((), tl.float64))
    if AFTER_MEASURE:
        norms = norms_of(row, squares)
        step = tl.maximum(step, 1.0)  # where none is counted, as the step is skipped
    else:
        step += 1
        is_taken = True
        if found_inf is not None:
            is_taken = tl.load(found_inf) == 0
        tl.store(steps, step, mask=is_taken)
        key = rounding.stream_key(tl.load(table + SEED), step.to(tl.int64), tl.load(row + NUMBER))
        tl.store(keys + tensor, key.to(tl.int64, bitcast=True))
    values = CONSTANTS(*hyper, step.to(tl.float64), norms)
    for i in tl.static_range(len(values)):
        tl.store(constants + tensor * MAX_CONSTANTS + i, values[i].to(tl.float32))


@triton.jit
def norms_of(row, squares):
    """Returns two norms over a tensor, float64, from its tiles' contributions, in an order that is always the same."""
    first, count = tl.load(row + FIRST_TILE), tl.load(row + TILES)
    lanes = tl.arange(0, 1024)
    sums = (tl.zeros((1024,), tl.float64), tl.zeros((1024,), tl.float64))
    for start in range(0, count, 1024):
        tile = first + start + lanes
        mask = start + lanes < count
        sums = (
            sums[0] + tl.load(squares + 2 * tile, mask=mask, other=0.0),
            sums[1] + tl.load(squares + 2 * tile + 1, mask=mask, other=0.0),
        )
    return tl.sqrt(tl.sum(sums[0])), tl.sqrt(tl.sum(sums[1]))


@triton.jit(do_not_specialize=["first_tile"])
def step_kernel(
    table,
    tiles,  # (tiles,), int32: the tensor of each
    first_tile,  # of this launch
    constants,
    keys,
    maps,  # (states, codebook.TABLES), float32: of the map of each state
    midpoints,  # (states, codebook.MIDPOINTS), float64
    grad_scale,  # one element: gradients are this many times too large; or None
    found_inf,  # as above
    UPDATE: tl.constexpr,
    COUNT: tl.constexpr,  # of constants
    SIGNED: tl.constexpr,  # of each state, whether it can be negative
    CODED: tl.constexpr,
    ROUNDING: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,  # the power of two that a block has room in
    ALIGNED: tl.constexpr,
):
    """Decodes the states of a tile, one for each program, applies the rule, and codes them again."""
    tile = first_tile + tl.program_id(0)
    tensor = tl.load(tiles + tile)
    row = table + HEAD + tensor * ROW
    block, start, length = tile_of(row, tile, BLOCKS_PER_TILE, ALIGNED)
    if found_inf is not None:
        length = tl.where(tl.load(found_inf) == 0, length, 0)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < length[:, None]
    param = loaded_param(row, start, columns, mask, DTYPE, ROUNDING, ALIGNED)
    grad = loaded_grad(row, start, columns, mask, grad_scale, DTYPE, ALIGNED)
    states = loaded_states(row, block, start, length, columns, mask, maps, SIGNED, CODED, ALIGNED)
    param, states = UPDATE(param, grad, states, loaded_constants(constants, tensor, COUNT))
    key = tl.load(keys + tensor).to(tl.uint64, bitcast=True)
    store_param(row, start, columns, mask, param, key, DTYPE, ROUNDING, ALIGNED)
    # An infinity, as the largest of its block, would weigh on the others from then on.
    is_lost = columns < 0
    for s in tl.static_range(len(SIGNED)):
        is_lost = is_lost | (tl.abs(states[s]) == float("inf"))
    for s in tl.static_range(len(SIGNED)):
        state = states[s]
        store_state(
            row, s, block, start, length, columns, mask, state, is_lost, maps, midpoints, SIGNED[s], CODED, ALIGNED
        )


@triton.jit(do_not_specialize=["first_tile"])
def measure_kernel(
    table,
    tiles,
    first_tile,
    constants,
    squares,
    maps,
    grad_scale,
    MEASURE: tl.constexpr,
    COUNT: tl.constexpr,
    SIGNED: tl.constexpr,
    CODED: tl.constexpr,
    ROUNDING: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCKS_PER_TILE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Computes what a tile, one for each program, contributes to the squares of the norms."""
    tile = first_tile + tl.program_id(0)
    tensor = tl.load(tiles + tile)
    row = table + HEAD + tensor * ROW
    block, start, length = tile_of(row, tile, BLOCKS_PER_TILE, ALIGNED)
    columns = tl.arange(0, BLOCK)[None, :]
    mask = columns < length[:, None]
    param = loaded_param(row, start, columns, mask, DTYPE, ROUNDING, ALIGNED)
    grad = loaded_grad(row, start, columns, mask, grad_scale, DTYPE, ALIGNED)
    states = loaded_states(row, block, start, length, columns, mask, maps, SIGNED, CODED, ALIGNED)
    measured = MEASURE(param, grad, states, loaded_constants(constants, tensor, COUNT))
    for i in tl.static_range(2):
        wide = tl.where(mask, measured[i], 0.0).to(tl.float64)
        tl.store(squares + 2 * tile.to(tl.int64) + i, tl.sum(wide * wide))
