"""The quantizer against its definition, and every backend against every other."""

import bisect
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opt8bit.backends import available
from opt8bit.quant import (
    block_view,
    dequantize_blockwise,
    dynamic_map,
    linear_map,
    normal_float,
    quantize_blockwise,
)

CODEBOOKS = {
    "dynamic signed": dynamic_map(True),
    "dynamic unsigned": dynamic_map(False),
    "linear signed": linear_map(True),
    "linear unsigned 3 bits": linear_map(False, 3),
    "normal float 4 bits": normal_float(4),
}


def nearest(x: float, absmax: float, codebook: Tensor) -> int:
    """The definition: argmin |x - value * absmax| in exact arithmetic, a tie to the lower code."""
    values = codebook.tolist()
    # Exact arithmetic is slow: it only looks at the five values around x.
    about = bisect.bisect(values, x / absmax if absmax else 0.0)
    candidates = range(max(about - 2, 0), min(about + 3, len(values)))
    distances = [abs(Fraction(x) - Fraction(values[code]) * Fraction(absmax)) for code in candidates]
    return candidates[distances.index(min(distances))]


def edge_values(codebook: Tensor, absmax: float) -> Tensor:
    """The midpoints of a codebook times ``absmax``, and the two float32 numbers on either side of each."""
    midpoints = (codebook[1:].double() + codebook[:-1].double()) / 2
    values = (midpoints * absmax).float()
    infinity = torch.tensor(torch.inf)
    above, below = values.nextafter(infinity), values.nextafter(-infinity)
    values = torch.cat([values, above, above.nextafter(infinity), below, below.nextafter(-infinity)])
    return values[values.abs() <= absmax]


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.parametrize("absmax", [1.0, 0.7, 3e-5, 1.5e38, 1e-37, 1e-44, 1.0000001])
def test_midpoints_and_their_neighbours(backend: str, name: str, absmax: float) -> None:
    codebook = CODEBOOKS[name]
    absmax = torch.tensor(absmax).item()
    x = torch.cat([torch.tensor([absmax]), edge_values(codebook, absmax)])
    codes, scale = quantize_blockwise(x, codebook, x.numel(), backend=backend)
    assert scale.tolist() == [[absmax]]
    assert codes.tolist() == [nearest(value, absmax, codebook) for value in x.tolist()]


@pytest.mark.parametrize("signed", [True, False])
def test_midpoints_beside_infinities(backend: str, signed: bool) -> None:
    """An infinity does not hide that the element next to it wants an exact search."""
    codebook = dynamic_map(signed)
    x = torch.cat([torch.tensor([1.0]), edge_values(codebook, 1.0)])
    spoilt = torch.stack([x, torch.full_like(x, torch.inf), x, torch.full_like(x, -torch.inf)], 1).flatten()
    codes, _ = quantize_blockwise(spoilt, codebook, spoilt.numel(), backend=backend)
    expected, _ = quantize_blockwise(x, codebook, x.numel(), backend=backend)
    assert torch.equal(codes[0::4], expected) and torch.equal(codes[2::4], expected)
    assert (codes[1::4] == 255).all() and (codes[3::4] == 0).all()


@pytest.mark.parametrize("signed", [True, False])
def test_every_float32_exponent(backend: str, signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    mantissas = torch.cat([torch.tensor([0, 1, 2**22, 2**23 - 1]), torch.randint(2**23, (12,), generator=generator)])
    bits = (torch.arange(255)[:, None] << 23 | mantissas).flatten()
    x = bits.int().view(torch.float32)
    x = torch.cat([x, -x])
    codebook = dynamic_map(signed)
    codes, absmax = quantize_blockwise(x, codebook, x.numel(), backend=backend)
    expected = [nearest(value, absmax.item(), codebook) for value in x.tolist()]
    assert codes.tolist() == expected


@pytest.mark.sampled(5)
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backends_give_the_same_bits(kernels: str, signed: bool, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    for exponent in (1, 2, 5):  # normal, and ever heavier tails
        for shape in ((64, 1024), (33, 515), (7, 3, 100), (5000,), (3, 1), (1, 70001)):
            x = torch.randn(shape, generator=generator).pow(exponent).to(dtype)
            x = x if signed else x.abs()
            ours = quantize_blockwise(x, dynamic_map(signed), 256, backend=kernels)
            reference = quantize_blockwise(x, dynamic_map(signed), 256, backend="reference")
            assert torch.equal(ours[0], reference[0]) and torch.equal(ours[1], reference[1])
            for result in (torch.float32, torch.bfloat16, torch.float16):
                values = [
                    dequantize_blockwise(*ours, dynamic_map(signed), 256, dtype=result, backend=name)
                    for name in (kernels, "reference")
                ]
                assert torch.equal(*values)


shapes = st.lists(st.integers(0, 12), min_size=0, max_size=4)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    block_size=st.integers(1, 300),
    name=st.sampled_from(sorted(CODEBOOKS)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_dtype_and_strides(shape, block_size, name, dtype, layout, seed) -> None:
    codebook = CODEBOOKS[name]
    x = torch.randn([2 * size for size in shape], generator=torch.Generator().manual_seed(seed)).to(dtype)
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1)
    elif layout == "strided":
        x = x[tuple(slice(None, None, 2) for _ in shape)]
    elif layout == "expanded" and x.dim():
        x = x[:1].expand_as(x)
    view = block_view(x.shape, block_size)
    results = [quantize_blockwise(x, codebook, block_size, backend=name) for name in available("cpu")]
    for codes, absmax in results:
        assert codes.shape == x.shape and codes.dtype == torch.uint8
        assert absmax.shape == view.absmax_shape and absmax.dtype == torch.float32
        assert torch.equal(codes, results[-1][0]) and torch.equal(absmax, results[-1][1])
    codes, absmax = results[0]
    decoded = dequantize_blockwise(codes, absmax, codebook, block_size)
    rows = x.float().reshape(view.rows, view.row_length)
    half_gap = max(codebook.diff().max().item() / 2, codebook[0].item() + 1 if codebook[0] < 0 else 1.0)
    for start in range(0, view.row_length, block_size):
        block = rows[:, start : start + block_size]
        largest = block.abs().amax(1)
        assert torch.equal(absmax[:, start // block_size], largest)
        error = (decoded.reshape_as(rows)[:, start : start + block_size] - block).abs()
        rounding = 2**-23  # of the midpoint and of the product that decodes, in units of absmax
        assert (error <= (half_gap + rounding) * largest[:, None]).all()


def test_blocks_are_cut_row_by_row(backend: str) -> None:
    x = torch.tensor([[1.0, 2.0, 3.0, -4.0, 5.0], [0.0, 0.0, 0.0, 0.0, -6.0]])
    codes, absmax = quantize_blockwise(x, linear_map(True), 2, backend=backend)
    assert absmax.tolist() == [[2, 4, 5], [0, 0, 6]]
    assert torch.equal(codes[:1], quantize_blockwise(x[:1], linear_map(True), 2, backend=backend)[0])
    assert block_view((4, 2, 3), 4).absmax_shape == (4, 2)
    assert block_view((9,), 4).absmax_shape == (1, 3)
    assert block_view((), 4).absmax_shape == (1, 1)


@pytest.mark.parametrize("signed", [True, False])
def test_zero_stays_zero(backend: str, signed: bool) -> None:
    x = torch.randn(16, 256).abs()
    x[:, ::3] = 0.0
    x[:, 1::3] = -0.0
    x[4] = 0
    decoded = dequantize_blockwise(
        *quantize_blockwise(x, dynamic_map(signed), 256, backend=backend),
        dynamic_map(signed),
        256,
        backend=backend,
    )
    assert (decoded[x == 0] == 0).all() and (decoded[x != 0] != 0).any()


@pytest.mark.parametrize("name", CODEBOOKS)
def test_what_is_not_finite_leaves_its_neighbours_alone(backend: str, name: str) -> None:
    codebook = CODEBOOKS[name]
    clean = torch.randn(3, 300).abs()
    clean[:, :8] = 0
    dirty = clean.clone()
    dirty[:, 0], dirty[:, 2], dirty[:, 4] = torch.inf, -torch.inf, torch.nan
    dirty[:, 5:8] = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # other NaNs
    expected, absmax = quantize_blockwise(clean, codebook, 128, backend=backend)
    codes, dirty_absmax = quantize_blockwise(dirty, codebook, 128, backend=backend)
    assert torch.equal(absmax, dirty_absmax)
    assert torch.equal(codes[:, [1, 3, *range(8, 300)]], expected[:, [1, 3, *range(8, 300)]])
    zero = nearest(0.0, 1.0, codebook)
    assert codes[:, [0, 2, *range(4, 8)]].tolist() == [[len(codebook) - 1, 0, *[zero] * 4]] * 3


def test_a_block_without_finite_values_decodes_to_zero(backend: str) -> None:
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, torch.nan]])
    codes, absmax = quantize_blockwise(x, dynamic_map(True), 4, backend=backend)
    assert absmax.item() == 0
    assert dequantize_blockwise(codes, absmax, dynamic_map(True), 4, backend=backend).tolist() == [[0] * 4]


def test_a_codebook_may_be_strided(backend: str) -> None:
    codebook = dynamic_map(True)[::2]
    x = torch.randn(8, 100)
    expected = quantize_blockwise(x, codebook.clone(), 64, backend=backend)
    result = quantize_blockwise(x, codebook, 64, backend=backend)
    assert torch.equal(result[0], expected[0])
    values = [dequantize_blockwise(*result, book, 64, backend=backend) for book in (codebook, codebook.clone())]
    assert torch.equal(*values)


def test_a_block_may_be_longer_than_the_row(backend: str) -> None:
    x = torch.randn(3, 100)
    expected = quantize_blockwise(x, dynamic_map(), 100, backend=backend)
    for size in (101, 2**63, 2**64):
        codes, absmax = quantize_blockwise(x, dynamic_map(), size, backend=backend)
        assert torch.equal(codes, expected[0]) and torch.equal(absmax, expected[1])


def test_a_gradient_is_not_recorded() -> None:
    codes, absmax = quantize_blockwise(torch.randn(4, 64, requires_grad=True), dynamic_map(True), 64)
    assert not codes.requires_grad and not absmax.requires_grad


GOOD = torch.zeros(4, 8)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_blockwise(GOOD.double(), dynamic_map(), 4), TypeError, "got torch.float64"),
        (lambda: quantize_blockwise(GOOD, dynamic_map(), 0), ValueError, "positive integer, got 0"),
        (
            lambda: quantize_blockwise(GOOD, dynamic_map(), 2.0),  # type: ignore[arg-type]
            ValueError,
            "positive integer, got 2.0",
        ),
        (lambda: quantize_blockwise(GOOD, dynamic_map().flip(0), 4), ValueError, "ascending"),
        (lambda: quantize_blockwise(GOOD, dynamic_map(), 4, backend="abacus"), ValueError, "got 'abacus'"),
        (
            lambda: dequantize_blockwise(GOOD, torch.zeros(4, 2), dynamic_map(), 4),
            TypeError,
            "codes must be uint8",
        ),
        (
            lambda: dequantize_blockwise(GOOD.byte(), torch.zeros(4, 1), dynamic_map(), 4),
            ValueError,
            r"shape \(4, 2\).*got \(4, 1\)",
        ),
        (
            lambda: dequantize_blockwise(GOOD.byte() + 3, torch.zeros(4, 2), linear_map(True, 2), 4),
            ValueError,
            "below the codebook's 3, got 3",
        ),
        (
            lambda: dequantize_blockwise(GOOD.byte(), torch.zeros(4, 2), dynamic_map(), 4, dtype=torch.int8),
            TypeError,
            "got torch.int8",
        ),
    ],
)
def test_bad_input_is_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
