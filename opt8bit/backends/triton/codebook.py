"""Codes of the dynamic maps on a GPU: decoded through a table, encoded by arithmetic, as in kernels/codebook.h.

The map is a line for each decade. Count its codes from zero: c = |code - 127| in the signed map, c = code + 1 in the
unsigned one. A decade has the counts from 2^j to 2^(j+1), and ``slope * x + intercept`` runs from one to the other, so
that truncating gives c. The exponent of x names the line, except where a line ends inside a binade. What lands near a
whole number is decided by the midpoint between the two codes, in float64, where it is exact: a slow path, which one in
several tiles takes.

The tables of one map that the fast path reads take a cache line each, or half of one, so that the threads of a warp
find theirs in one access.
"""

from __future__ import annotations

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor

DECADES = 7
MARGIN = 2.0**-21  # relative, above all that rounding takes away: the sum is never below the true one,
SLACK = tl.constexpr(2.0**-20)  # and less than this above it
SMALLEST = tl.constexpr(2.0**-31)  # of a magnitude: below every line's end, in a binade of its own

# Of the tables of one map, float32: where they begin, and their size. A line's end is found by the low 5 bits of x's
# exponent: the x above which the next line holds. Its low 4 bits are the line that holds below: 0 for that of zero,
# 1 to 7 for the decades, 8 for that of one.
VALUES = tl.constexpr(0)  # 256, by code
LINE_END = tl.constexpr(256)  # 32
SLOPE = tl.constexpr(288)  # 16, by line
TABLES = tl.constexpr(320)
MIDPOINTS = tl.constexpr(257)  # how many: -inf, the 255 between neighbouring codes, inf
# The intercepts are 8/9 of each line's least count, a power of two. These are the bits of the first one, of a line of
# count 1/2 or 1, with the margin; the others have larger exponents.
SIGNED_INTERCEPT = tl.constexpr(int(numpy.float32(4 / 9 * (1 + MARGIN)).view(numpy.int32)))
UNSIGNED_INTERCEPT = tl.constexpr(SIGNED_INTERCEPT.value + (1 << 23))


def midpoints(values: Tensor) -> Tensor:
    """Returns what lies between neighbours, exactly, with the infinities at both ends, (n + 1,) float64."""
    values = values.double().sort().values
    inner = (values[1:] + values[:-1]) / 2
    inf = inner.new_full((1,), torch.inf)
    return torch.cat([-inf, inner, inf])


def tables(values: Tensor, signed: bool) -> Tensor:
    """Returns the tables of a state map (256,) as (TABLES,) float32."""
    first = 0 if signed else 1  # the count of zero
    zero_code = 127 if signed else 0
    between = midpoints(values)[1:-1].tolist()
    least = [2.0 ** (line + first - 1) for line in range(DECADES + 2)]  # counts of the lines
    ends = [between[zero_code + int(2 * count) - 1 - first] for count in least[: DECADES + 1]]
    slopes = [10.0 ** (DECADES - line) / 0.9 * count for line, count in enumerate(least)]
    # The first line has one count, zero's, but it, too, comes to a whole number at its end. The last one comes to its
    # count at the end of the cell before, inside which it begins.
    slopes[0] = 2 * least[0] * (1 - 4 / 9) / ends[0]
    slopes[-1] = (1 - 8 / 9) * least[-1] / ends[-1]
    ends[-1] = float(values.sort().values[254])
    line_ends, line = [], 0
    for binade in range(32):  # from 2^(binade - 31) on
        ends_here = line < len(ends) and ends[line] < 2.0 ** (binade - 30)
        line_ends.append(_with_low_bits(ends[line] if ends_here else 2.0**100, line))
        line += ends_here
    result = values.new_zeros(TABLES.value)
    result[: LINE_END.value] = values
    result[LINE_END.value : SLOPE.value] = values.new_tensor(line_ends)
    result[SLOPE.value :][: len(slopes)] = values.new_tensor([slope * (1 + MARGIN) for slope in slopes])
    return result


def _with_low_bits(x: float, bits: int) -> float:
    """Returns the least float32 with these low 4 bits that is above x by more than rounding may move it."""
    found = int(numpy.float32(x).view(numpy.int32))
    return float(numpy.int32(((found + 4 + 15 - bits) & ~15) | bits).view(numpy.float32))


@triton.jit
def decode(codes, tables):
    """Returns float32 values of a state's uint8 codes, in units of their block's scale."""
    return tl.load(tables + VALUES + codes.to(tl.int32))


@triton.jit
def from_zero(codes, SIGNED: tl.constexpr):
    """Returns codes of the ascending map as states hold them: counted from that of zero, modulo 256."""
    return (codes + 129) & 255 if SIGNED else codes


@triton.jit
def kept_positive(codes, x):
    """Returns codes of an unsigned state. Steps divide by its root: what is positive does not become zero."""
    return tl.where((codes == 0) & (x > 0) & (x < float("inf")), 1, codes)


@triton.jit
def first_largest(
    x,  # (blocks, length), float32, finite
    columns,  # (1, length)
):
    """Returns the element of each block with the largest magnitude, (blocks,); of several, the first."""
    magnitude = tl.abs(x)
    largest = tl.max(magnitude, 1)
    first = tl.min(tl.where(magnitude == largest[:, None], columns, 2147483647), 1)
    return tl.sum(tl.where(columns == first[:, None], x, 0.0), 1)


@triton.jit
def encode(
    x,  # (blocks, length), float32, finite
    scale,  # (blocks,), the element with the largest magnitude of each
    tables,
    midpoints,
    SIGNED: tl.constexpr,
):
    """Returns the codes nearest to x, int32, counted from that of zero."""
    if SIGNED:
        x = tl.where(scale[:, None] < 0, -x, x)
    absmax = tl.abs(scale)
    # A power of two, which changes no digit, brings the reciprocal of a tiny or huge absmax back to where it is exact.
    factor = tl.where(absmax < 2.0**-100, 2.0**100, tl.where(absmax > 2.0**100, 2.0**-100, 1.0))
    divisor = tl.where(absmax > 0, absmax, 1.0)
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), divisor * factor)
    magnitude = tl.maximum(tl.abs(x) * factor[:, None] * reciprocal[:, None], SMALLEST)
    line_end = tl.load(tables + LINE_END + ((magnitude.to(tl.int32, bitcast=True) >> 23) & 31))
    line = (line_end.to(tl.int32, bitcast=True) & 15) + (magnitude > line_end).to(tl.int32)
    intercept = (line << 23) + (SIGNED_INTERCEPT if SIGNED else UNSIGNED_INTERCEPT)
    place = magnitude * tl.load(tables + SLOPE + line) + intercept.to(tl.float32, bitcast=True)
    # In a line's last cell the sum passes the last count.
    count = tl.minimum(place.to(tl.int32), ((1 if SIGNED else 2) << line) - 1)
    if SIGNED:
        codes = tl.where(x < 0, tl.maximum(127 - count, 0), 127 + count)  # there is no -1
    else:
        codes = tl.maximum(count - 1, 0)
    is_near = place - tl.floor(place) < place * SLACK
    if tl.max(tl.max(is_near.to(tl.int32), 1), 0) > 0:
        codes = decided(x, divisor, codes, midpoints)
    return tl.where(absmax[:, None] > 0, from_zero(codes, SIGNED), 0)


@triton.jit
def decided(x, absmax, codes, midpoints):
    """Returns the nearest codes, from such that may be one off."""
    wide, scale = x.to(tl.float64), absmax.to(tl.float64)[:, None]
    is_above = wide > tl.load(midpoints + codes + 1) * scale
    is_below = wide <= tl.load(midpoints + codes) * scale
    return codes + is_above.to(tl.int32) - is_below.to(tl.int32)


@triton.jit
def search(x, absmax, midpoints, size):
    """Returns the codes nearest to x in any codebook of ``size`` ascending values, int32; shapes as in :func:`encode`.

    An infinity is coded as the last or first value; x must not be NaN.
    """
    wide, scale = x.to(tl.float64), tl.where(absmax > 0, absmax, 1.0).to(tl.float64)[:, None]
    codes = tl.zeros(x.shape, tl.int32)
    for power in tl.static_range(8):
        next_codes = tl.minimum(codes + (128 >> power), size)
        codes = tl.where(wide > tl.load(midpoints + next_codes) * scale, next_codes, codes)
    return codes
