"""Writes bfloat16 parameters where rounding them to nearest would lose small updates.

The same bits as :mod:`opt8bit.backends.rounding`, which says why.
"""

import triton
import triton.language as tl

from opt8bit.backends.interface import is_interpreting

INTERPRETING = tl.constexpr(is_interpreting())


@triton.jit
def mix64(x):
    """Applies the finalizer of splitmix64, on uint64."""
    x += 0x9E3779B97F4A7C15
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def stream_key(seed, step, number):
    """Returns the key of a parameter's random bits in one step, uint64."""
    return mix64(mix64(mix64(seed.to(tl.uint64)) ^ step.to(tl.uint64)) ^ number.to(tl.uint64))


@triton.jit
def random_bits(key, index):
    """Returns 32 random bits for each element, uint32: a hash of the key and of the element's index, uint32."""
    x = index ^ key.to(tl.uint32)
    x = (x ^ (x >> 16)) * 0x21F0AAAD
    x = (x ^ (x >> 15)) + (key >> 32).to(tl.uint32)
    x = x * 0x735A2D97
    return x ^ (x >> 15)


@triton.jit
def float32_bits(x):
    """Returns the bits of float32 numbers, uint32; those of the one quiet NaN where x is any NaN."""
    return tl.where(x != x, 0x7FC00000, x.to(tl.uint32, bitcast=True)).to(tl.uint32)


@triton.jit
def from_high_half(bits):
    return (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


@triton.jit
def nearest(x, DTYPE: tl.constexpr):
    """Returns float32 ``x`` in another dtype; a tie goes to the even one."""
    if INTERPRETING and DTYPE == tl.bfloat16:  # where the interpreter truncates
        bits = float32_bits(x)
        return from_high_half(bits + 0x7FFF + ((bits >> 16) & 1))
    return x.to(DTYPE)


@triton.jit
def stochastically_rounded(x, key, index):
    """Returns float32 ``x`` in bfloat16: one of its two neighbours, the nearer with the larger probability."""
    return from_high_half(float32_bits(x) + (random_bits(key, index) >> 16))


@triton.jit
def compensated(param, low):
    """Returns the float32 whose bits are those of the bfloat16 ``param``, moved up by 16, plus the int16 ``low``."""
    high = param.to(tl.int16, bitcast=True).to(tl.int32) << 16
    return (high + low.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def split(x):
    """Returns float32 ``x`` as the nearest bfloat16, and what is missing as int16; a tie goes away from zero."""
    bits = float32_bits(x)
    high = (bits + 0x8000) & 0xFFFF0000
    return from_high_half(high), (bits - high).to(tl.int16)
