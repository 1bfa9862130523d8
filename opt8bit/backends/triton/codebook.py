"""Codes of the dynamic maps on a GPU: decoded through a table, encoded by arithmetic, as in kernels/codebook.h.

The map is a line for each decade. Count its codes from zero: c = |code - 127| in the signed map, c = code + 1 in the
unsigned one. A decade has the counts from 2^j to 2^(j+1), and ``slope * x + intercept`` runs from one to the other, so
that truncating gives c. The exponent of x names the line, except where a line ends inside a binade. What lands near a
whole number is decided by the midpoint between the two codes, in float64, where it is exact.

The tables of one map take a cache line each, or half of one, so that the threads of a warp find theirs in one access.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

DECADES = 7
ERRORS = 2.0**-13  # bound of the rounding errors of a sum, which is therefore never below the true one
SLACK = tl.constexpr(2.0**-11)  # the sum is less than this above the true one
SMALLEST = tl.constexpr(2.0**-31)  # of a magnitude: below every line's end, in a binade of its own

# Of the tables of one map, float32: where they begin.
VALUES = tl.constexpr(0)  # 256, by code
LINE_END = tl.constexpr(256)  # 32, by the low 5 bits of an exponent: the x above which the next line holds
LINE = tl.constexpr(288)  # 32, likewise: the line at the binade's lower end
SLOPE = tl.constexpr(320)  # 16, by line: that of zero, of the seven decades, of one
INTERCEPT = tl.constexpr(336)  # 16
CAP = tl.constexpr(352)  # 16: in a line's last cell the sum passes the last count
TABLES = tl.constexpr(384)
MIDPOINTS = tl.constexpr(257)  # -inf, the 255 between neighbouring codes, inf


def midpoints(values: Tensor) -> Tensor:
    """(n + 1,) float64: between neighbours, exactly, with the infinities at both ends."""
    inner = (values[1:].double() + values[:-1].double()) / 2
    inf = inner.new_full((1,), torch.inf)
    return torch.cat([-inf, inner, inf])


def tables(values: Tensor, signed: bool) -> Tensor:
    """(TABLES,) float32: those of a dynamic map, (256,)."""
    first = 0 if signed else 1  # the count of zero
    zero_code = 127 if signed else 0
    between = midpoints(values)[1:-1].tolist()
    ends, slopes, intercepts, caps = [], [], [], []
    for line in range(DECADES + 2):
        scale = 2.0 ** (line + first - 1)  # the line's least count
        last_code = zero_code + int(2 * scale) - 1 - first
        slopes.append(10.0 ** (DECADES - line) / 0.9 * scale)
        intercepts.append(8 / 9 * scale + ERRORS)
        caps.append(2 * scale - 0.5)
        if line <= DECADES:
            ends.append(between[last_code])
    # The first line has one count, zero's. It is tilted, so that it, too, comes to a whole number at its end. The last
    # one comes to its count at the end of the cell before, inside which it begins.
    slopes[0], intercepts[0] = 1.5 / ends[0], caps[0] + ERRORS
    slopes[-1] = (1 - 8 / 9) * 2.0 ** (DECADES + first) / ends[-1]
    ends[-1] = float(values[254])
    line_ends, lines = [], []
    line = 0
    for binade in range(32):  # from 2^(binade - 31) on
        ends_here = line < len(ends) and ends[line] < 2.0 ** (binade - 30)
        lines.append(line)
        line_ends.append(ends[line] * (1 + 2.0**-21) if ends_here else torch.inf)  # above all that rounding may move
        line += ends_here
    result = torch.zeros(TABLES.value)
    result[: LINE_END.value] = values
    for start, table in ((LINE_END, line_ends), (LINE, lines), (SLOPE, slopes), (INTERCEPT, intercepts), (CAP, caps)):
        result[start.value : start.value + len(table)] = torch.tensor(table, dtype=torch.float64).float()
    return result


@triton.jit
def decode(codes, tables):
    """float32 values of uint8 codes, in units of their block's absmax."""
    return tl.load(tables + VALUES + codes.to(tl.int32))


@triton.jit
def encode(
    x,  # (blocks, length), float32, finite
    absmax,  # (blocks,), the largest magnitude of each
    tables,
    midpoints,
    SIGNED: tl.constexpr,
):
    """The codes nearest to x, int32."""
    # A power of two, which changes no digit, brings the reciprocal of a tiny or huge absmax back to where it is exact.
    factor = tl.where(absmax < 2.0**-100, 2.0**100, tl.where(absmax > 2.0**100, 2.0**-100, 1.0))
    scale = tl.where(absmax > 0, absmax, 1.0)
    reciprocal = tl.div_rn(tl.full(absmax.shape, 1.0, tl.float32), scale * factor)
    magnitude = tl.maximum(tl.abs(x) * factor[:, None] * reciprocal[:, None], SMALLEST)
    binade = (magnitude.to(tl.int32, bitcast=True) >> 23) & 31
    line = tl.load(tables + LINE + binade).to(tl.int32)
    line += (magnitude > tl.load(tables + LINE_END + binade)).to(tl.int32)
    place = magnitude * tl.load(tables + SLOPE + line) + tl.load(tables + INTERCEPT + line)
    count = tl.minimum(place, tl.load(tables + CAP + line)).to(tl.int32)
    if SIGNED:
        codes = tl.where(x < 0, tl.maximum(127 - count, 0), 127 + count)  # there is no -1
    else:
        codes = count - 1
    # Few are near a whole number; the others' midpoints are not fetched, and decide nothing.
    is_near = place - tl.floor(place) < SLACK
    below = tl.load(midpoints + codes, mask=is_near, other=float("-inf")) * scale[:, None]
    above = tl.load(midpoints + codes + 1, mask=is_near, other=float("inf")) * scale[:, None]
    codes += (x.to(tl.float64) > above).to(tl.int32) - (x.to(tl.float64) <= below).to(tl.int32)
    return tl.where(absmax[:, None] > 0, codes, 127 if SIGNED else 0)


@triton.jit
def search(x, absmax, midpoints, size):
    """The codes nearest to x in any codebook of ``size`` ascending values, int32; shapes as in :func:`encode`.

    An infinity is coded as the last or first value; x must not be NaN.
    """
    wide, scale = x.to(tl.float64), tl.where(absmax > 0, absmax, 1.0).to(tl.float64)[:, None]
    codes = tl.zeros(x.shape, tl.int32)
    for power in tl.static_range(8):
        next_codes = tl.minimum(codes + (128 >> power), size)
        codes = tl.where(wide > tl.load(midpoints + next_codes) * scale, next_codes, codes)
    return codes
