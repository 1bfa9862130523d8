"""Codes in words: against bits written out one by one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opt8bit.quant.packing import pack, unpack


def streamed(codes: list[int], bits: int) -> list[int]:
    """The words of one row, by way of one large number."""
    stream = sum(code << (i * bits) for i, code in enumerate(codes))
    words = -(-len(codes) * bits // 32)
    unsigned = [stream >> (32 * i) & 0xFFFFFFFF for i in range(words)]
    return [word - 2**32 if word >= 2**31 else word for word in unsigned]


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 70), st.integers(0, 2**31))
def test_a_row_is_one_stream_of_bits(bits: int, rows: int, count: int, seed: int) -> None:
    codes = torch.randint(2**bits, (rows, count), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.tolist() == [streamed(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack(words, bits, count), codes)


def test_what_cannot_be_packed_is_refused() -> None:
    codes = torch.tensor([[0, 4]], dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"codes must be \(rows, n\) and from 0 to 3"):
        pack(codes, 2)
    with pytest.raises(ValueError, match=r"codes must be \(rows, n\)"):
        pack(codes[0], 3)
    for bits in (0, 9, True):
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            pack(codes, bits)
        with pytest.raises(ValueError, match="bits must be 1 to 8"):
            unpack(codes.int(), bits, 2)
    with pytest.raises(ValueError, match=r"words must be int32 \(rows, 1\)"):
        unpack(codes, 3, 2)
    with pytest.raises(ValueError, match=r"words must be int32 \(rows, 1\), got torch.int32 of shape \(1, 2\)"):
        unpack(codes.int(), 3, 2)
