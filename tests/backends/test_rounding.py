import math

import pytest
import torch

from opt8bit.backends.rounding import compensated, random_bits, set_compensated, stochastically_rounded

SPECIAL = [0.0, -0.0, 1.0, -1.0, 2.0**-133, 2.0**-149, 3.3e38, 3.4028e38, math.inf, -math.inf, math.nan, 1 + 2.0**-8]


def values(count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (count,), generator=generator).to(torch.int32)
    return torch.cat([torch.tensor(SPECIAL), bits.view(torch.float32)])


def test_random_bits_are_uniform_and_unrelated() -> None:
    n = 2**16
    streams = [random_bits(n, *key) for key in ((0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1))]
    for stream in streams:
        assert stream.min() >= 0 and stream.max() < 2**32
        for bit in range(32):  # each within 5 standard deviations of a half
            assert abs((stream >> bit & 1).double().mean() - 0.5) <= 5 * 0.5 / math.sqrt(n)
        counts = torch.bincount(stream >> 24, minlength=256).double()
        chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
        assert abs(chi_square - 255) <= 5 * math.sqrt(2 * 255)
    for i, stream in enumerate(streams):
        for other in (*streams[:i], stream.roll(1), stream.roll(16)):
            flips = sum((((stream ^ other) >> bit) & 1).double().mean() for bit in range(32)) / 32
            assert abs(flips - 0.5) <= 5 * 0.5 / math.sqrt(32 * n)


def test_stochastic_rounding_takes_a_neighbour() -> None:
    x = values(100_000)
    rounded = stochastically_rounded(x, 0, 1, 0)
    exact = x == x.bfloat16().float()
    assert torch.equal(rounded[exact].float(), x[exact])
    assert torch.equal(rounded.isnan(), x.isnan())
    finite = x.isfinite() & ~exact
    down = (x.view(torch.int32) >> 16 << 16).view(torch.float32)  # towards zero
    up = ((x.view(torch.int32) >> 16) + 1 << 16).view(torch.float32)
    assert ((rounded.float() == down) | (rounded.float() == up))[finite].all()


@pytest.mark.parametrize("part", [1 / 256, 0.25, 0.5, 0.9])
def test_stochastic_rounding_is_unbiased(part: float) -> None:
    """The mean of n roundings of 1 + part * ulp lies within 5 standard deviations of it."""
    n, ulp = 2**18, 2.0**-7
    rounded = stochastically_rounded(torch.full((n,), 1 + part * ulp), 0, 1, 0).double()
    deviation = ulp * math.sqrt(part * (1 - part) / n)
    assert abs(rounded.mean() - (1 + part * ulp)) <= 5 * deviation


def test_compensation_keeps_every_bit() -> None:
    x = values(100_000)
    param, low = torch.zeros(len(x), dtype=torch.bfloat16), torch.zeros(len(x), dtype=torch.int16)
    set_compensated(param, low, x)
    assert torch.equal(compensated(param, low)[~x.isnan()].view(torch.int32), x[~x.isnan()].view(torch.int32))
    assert compensated(param, low)[x.isnan()].isnan().all()
    finite = x.isfinite()
    nearest = x.bfloat16().float()
    tie = (x.view(torch.int32) & 0xFFFF) == 0x8000
    assert torch.equal(param.float()[finite & ~tie], nearest[finite & ~tie])
