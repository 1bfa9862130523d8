"""How states are stored, against its definition; every backend against every other."""

import functools
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from opt8bit.backends import available
from opt8bit.quant import block_view, decode_state, dynamic_map, encode_state, state_map

ZERO = {True: 127, False: 0}  # the code of 0 in the ascending map, by whether it is signed
LEAST = torch.finfo(torch.float32).smallest_normal
SCALES = (1.0, 0.7, 1.0000001, 3e-5, 1.5e38, 3.4e38, 2.0**-100, 2.0**100, 1e-37, LEAST, 1e-44, 2.0**-149)
BLOCK_SIZES = (16, 17, 64, 100, 256, 1024, 1025, 4096)


def test_byte_0_is_the_value_0_and_no_other_is() -> None:
    for signed in (True, False):
        assert (state_map(signed) == 0).nonzero().tolist() == [[0]]


@pytest.mark.parametrize("signed", [True, False])
def test_the_map_is_the_dynamic_map_in_another_order(signed: bool) -> None:
    values = state_map(signed)
    assert values.shape == (256,) and values.dtype == torch.float32 and values.device.type == "cpu"
    assert torch.equal(values.sort().values, dynamic_map(signed))
    order = [(byte + ZERO[signed]) % 256 for byte in range(256)]
    assert torch.equal(values, dynamic_map(signed)[order])


def test_signed_bytes_count_from_zero_and_mirror() -> None:
    """Read as an int8: -127 to 127 ascend, and negative bytes are negative values. 128 is +1, as there is no -1."""
    values = state_map(True)
    by_int8 = values[torch.arange(-127, 128) % 256]
    assert (by_int8.diff() > 0).all() and torch.equal(by_int8, -by_int8.flip(0))
    assert values[128] == 1 and values.min() > -1


def definition(x: Tensor, signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows, block after block. In float64 a midpoint times a scale is exact."""
    midpoints = (dynamic_map(signed)[1:].double() + dynamic_map(signed)[:-1].double()) / 2
    codes, scales = torch.zeros(x.shape, dtype=torch.uint8), []
    for row, row_codes in zip(x, codes, strict=True):
        for block, block_codes in zip(row.split(block_size), row_codes.split(block_size), strict=True):
            values = block if signed else block.clamp(min=0)
            magnitudes = torch.where(values.isfinite(), values.abs(), 0)
            first = int((magnitudes == magnitudes.max()).nonzero()[0])
            scale = values[first] if magnitudes[first] > 0 else torch.zeros(())
            scales.append(scale)
            if scale == 0:
                continue
            mirrored = values.double() * (-1 if scale < 0 else 1)
            ranks = torch.bucketize(mirrored, midpoints * scale.abs().double())
            ranks = torch.where(values.isnan(), ZERO[signed], ranks)
            block_codes.copy_((ranks - ZERO[signed]) % 256)
            if not signed:
                block_codes[(block_codes == 0) & (values > 0)] = 1
    return codes, torch.stack(scales).reshape(len(x), -1)


def edges(signed: bool, scale: float) -> Tensor:
    """The midpoints of the map times a scale, the two float32 numbers on either side, and the magnitudes of both."""
    values = dynamic_map(signed).double()
    midpoints = ((values[1:] + values[:-1]) / 2 * scale).float()
    infinity = torch.tensor(torch.inf)
    above, below = midpoints.nextafter(infinity), midpoints.nextafter(-infinity)
    near = [midpoints, above, above.nextafter(infinity), below, below.nextafter(-infinity)]
    near = [*near, (values * scale).float(), torch.tensor([0.0, -0.0, 2.0**-149])]
    found = torch.cat(near)
    if signed:
        found = torch.cat([found, -found])
    return found[found.abs() <= scale]


@functools.cache
def adversarial(signed: bool, block_size: int) -> Tensor:
    """(rows, n): each row has the edges of a scale, in blocks whose largest is the scale, of which the last is short.

    In the signed rows the largest is negative in every third block, and in every third there is one of either sign.
    """
    rows = []
    for number, size in enumerate(SCALES):
        scale = float(torch.tensor(size))
        generator = torch.Generator().manual_seed(number)
        found = edges(signed, scale)
        found = found[torch.randperm(len(found), generator=generator)]
        blocks = []
        for i, part in enumerate(found.split(block_size - 2)):
            block = torch.cat([part, torch.tensor([scale, scale if i % 3 == 0 or not signed else -scale])])
            if i % 3 == 1 and signed:
                block[-2] = 0
            blocks.append(block[torch.randperm(len(block), generator=generator)])
        rows.append(torch.cat(blocks))
    length = min(map(len, rows))
    return torch.stack([row[:length] for row in rows])


@functools.cache
def expected_of_adversarial(signed: bool, block_size: int) -> tuple[Tensor, Tensor]:
    return definition(adversarial(signed, block_size), signed, block_size)


def assert_same_bits(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1].view(torch.int32), expected[1].view(torch.int32))


@pytest.mark.sampled(7)
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("signed", [True, False])
def test_codes_and_scales_are_those_of_the_definition(backend: str, signed: bool, block_size: int) -> None:
    """At every midpoint, in blocks of every scale, with ties between the largest of either sign."""
    x = adversarial(signed, block_size)
    assert x.shape[1] % block_size, "the last block is short"
    found = encode_state(x, signed, block_size, backend=backend)
    assert_same_bits(found, expected_of_adversarial(signed, block_size))


@pytest.mark.parametrize("signed", [True, False])
def test_the_definition_is_the_nearest_value(signed: bool) -> None:
    """By fractions, on x / scale; a tie goes to the lower value."""
    values = [Fraction(value) for value in dynamic_map(signed).tolist()]
    x = adversarial(signed, 64)[:, :64]
    codes, scales = definition(x, signed, 64)
    for row, row_codes, scale in zip(x.tolist(), codes.tolist(), scales[:, 0].tolist(), strict=True):
        for element, code in zip(row[:40], row_codes[:40], strict=True):
            distances = [abs(Fraction(element) / Fraction(scale) - value) for value in values]
            expected = (distances.index(min(distances)) - ZERO[signed]) % 256
            assert code == (1 if not signed and element > 0 == expected else expected)


@pytest.mark.slow_interpreted
@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_the_negative_has_the_same_codes_and_negative_scales(backend: str, block_size: int) -> None:
    x = adversarial(True, block_size).clone()
    x[:, 3], x[:, 5], x[:, 7], x[1] = torch.nan, torch.inf, -torch.inf, 0
    codes, scale = encode_state(x, True, block_size, backend=backend)
    negated_codes, negated_scale = encode_state(-x, True, block_size, backend=backend)
    assert torch.equal(negated_codes, codes) and torch.equal(negated_scale, -scale)
    decoded = decode_state(codes, scale, True, block_size, backend=backend)
    assert torch.equal(decode_state(negated_codes, negated_scale, True, block_size, backend=backend), -decoded)


@pytest.mark.parametrize("block_size", [16, 64, 100, 256, 4096])
def test_of_the_largest_the_first_gives_the_sign(backend: str, block_size: int) -> None:
    """Wherever the two of them are, and whichever comes first."""
    generator = torch.Generator().manual_seed(block_size)
    count = 24 if backend == "triton" else 200  # whose interpreter is slow
    x = torch.randn(count, block_size, generator=generator).clamp(-2, 2)
    places = torch.stack([torch.randperm(block_size, generator=generator)[:2] for _ in range(count)])
    places[:4] = torch.tensor([[0, 1], [1, 0], [0, block_size - 1], [block_size - 1, 0]])
    x.scatter_(1, places, torch.tensor([3.0, -3.0]).expand(count, 2))
    codes, scale = encode_state(x, True, block_size, backend=backend)
    expected = torch.where(places[:, 0] < places[:, 1], 3.0, -3.0)
    assert torch.equal(scale[:, 0], expected)
    first, second = codes.gather(1, places.min(1, keepdim=True).values), codes.gather(1, places.amax(1, keepdim=True))
    assert (first == 128).all() and (second == 129).all()  # 1 and -0.993 of the scale


@pytest.mark.parametrize("signed", [True, False])
def test_the_largest_is_exact_and_others_are_near(backend: str, signed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    for exponent in (1, 3, 7):
        x = torch.randn(33, 515, generator=generator).pow(exponent)
        x = x if signed else x.abs()
        codes, scale = encode_state(x, signed, 100, backend=backend)
        decoded = decode_state(codes, scale, signed, 100, backend=backend)
        of_each = scale.abs().repeat_interleave(100, 1)[:, :515]
        is_largest = x.abs() == of_each
        assert is_largest.sum() == scale.numel() and torch.equal(decoded[is_largest], x[is_largest])
        bound = (0.0071 if signed else 0.0036) * of_each
        assert ((decoded - x).abs() <= bound).all()


def test_what_is_positive_stays_so_in_an_unsigned_state(backend: str) -> None:
    x = torch.tensor([[1.0, 1e-20, 2.0**-149, 0.0, -0.0, 1e-7, -1e-20, -0.5, torch.nan, torch.inf, -torch.inf] * 2])
    codes, scale = encode_state(x, False, 256, backend=backend)
    assert scale.tolist() == [[1.0]]
    least = int(codes[0, 5])
    assert codes[0, :11].tolist() == [255, 1, 1, 0, 0, least, 0, 0, 0, 255, 0] and least >= 1
    assert torch.equal(codes[:, :11], codes[:, 11:])


def test_negative_numbers_do_not_weigh_on_an_unsigned_state(backend: str) -> None:
    x = torch.tensor([[0.25, -4.0, 0.5, torch.inf, -0.0, 0.125, -1.0], [-1.0, -torch.inf, torch.nan, 0, -2, -3, -0.5]])
    clean = torch.tensor([[0.25, 0, 0.5, torch.inf, 0, 0.125, 0], [0] * 7])
    found = encode_state(x, False, 16, backend=backend)
    assert_same_bits(found, encode_state(clean, False, 16, backend=backend))
    assert found[1].tolist() == [[0.5], [0.0]]


@pytest.mark.parametrize("signed", [True, False])
def test_a_block_without_finite_numbers_is_zero(backend: str, signed: bool) -> None:
    """Codes, too: a scale that someone writes later does not bring them back."""
    x = torch.tensor([[torch.nan, torch.inf, -torch.inf, 0.0, -0.0], [0.0] * 5, [-torch.inf] * 5, [torch.inf] * 5])
    codes, scale = encode_state(x, signed, 16, backend=backend)
    assert not codes.any() and not scale.any()


@pytest.mark.parametrize("signed", [True, False])
def test_what_is_not_finite_leaves_its_neighbours_alone(backend: str, signed: bool) -> None:
    clean = torch.randn(3, 300, generator=torch.Generator().manual_seed(0))
    clean = clean if signed else clean.abs()
    clean[:, :8] = 0
    dirty = clean.clone()
    dirty[:, 0], dirty[:, 2], dirty[:, 4] = torch.inf, -torch.inf, torch.nan
    dirty[:, 5:8] = torch.tensor([0x7F800001, 0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)  # other NaNs
    expected, expected_scale = encode_state(clean, signed, 128, backend=backend)
    codes, scale = encode_state(dirty, signed, 128, backend=backend)
    assert torch.equal(scale, expected_scale)
    others = [1, 3, *range(8, 300)]
    assert torch.equal(codes[:, others], expected[:, others])
    for row, row_scale in zip(codes.tolist(), scale[:, 0].tolist(), strict=True):
        of_infinities = [255, 0] if not signed else [128, 129] if row_scale > 0 else [129, 128]
        assert [row[i] for i in (0, 2, 4, 5, 6, 7)] == [*of_infinities, 0, 0, 0, 0]


shapes = st.lists(st.integers(0, 12), min_size=0, max_size=4)
numbers = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0**-149, -(2.0**-149), 3.4e38, -3.4e38, torch.nan, torch.inf, -torch.inf]),
)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    shape=shapes,
    block_size=st.integers(1, 300),
    signed=st.booleans(),
    few=st.lists(numbers, min_size=1, max_size=8),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
    seed=st.integers(0, 2**31),
)
def test_any_shape_and_strides(shape, block_size, signed, few, layout, seed) -> None:
    """Of few different numbers, so that many are equal: the backends and the definition agree bit for bit."""
    sizes = [2 * size for size in shape]
    generator = torch.Generator().manual_seed(seed)
    few = torch.tensor(few)
    x = few[torch.randint(len(few), sizes, generator=generator)]
    x = torch.where(torch.rand(sizes, generator=generator) < 0.5, x, -x)
    if layout == "transposed" and x.dim() > 1:
        x = x.transpose(0, -1)
    elif layout == "strided":
        x = x[tuple(slice(None, None, 2) for _ in shape)]
    elif layout == "expanded" and x.dim():
        x = x[:1].expand_as(x)
    view = block_view(x.shape, block_size)
    results = [encode_state(x, signed, block_size, backend=name) for name in available("cpu")]
    for codes, scale in results:
        assert codes.shape == x.shape and codes.dtype == torch.uint8
        assert scale.shape == view.absmax_shape and scale.dtype == torch.float32
        assert_same_bits((codes, scale), results[0])
    decoded = [decode_state(*results[0], signed, block_size, backend=name) for name in available("cpu")]
    assert all(torch.equal(each, decoded[0]) for each in decoded)
    if x.numel():
        codes, scale = definition(x.reshape(view.rows, view.row_length), signed, block_size)
        assert_same_bits(results[0], (codes.reshape(x.shape), scale))


@pytest.mark.parametrize("signed", [True, False])
def test_decoding_is_the_map_times_the_scale(backend: str, signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 2)
    scale = torch.tensor([[1.0, -1.0], [0.3, -0.7], [0.0, 2.0**-149], [-3e38, 1e-30]])
    decoded = decode_state(codes, scale, signed, 256, backend=backend)
    expected = state_map(signed)[codes.long()] * scale.repeat_interleave(256, 1)
    assert decoded.dtype == torch.float32 and torch.equal(decoded, expected)
    strided = decode_state(codes.t().contiguous().t(), scale.t().contiguous().t(), signed, 256, backend=backend)
    assert torch.equal(strided, expected)


@pytest.mark.parametrize("signed", [True, False])
def test_what_was_decoded_has_its_codes_again(backend: str, signed: bool) -> None:
    """So that a state may go through floats and come back: each block of it has an element that is its scale."""
    x = torch.randn(16, 300, generator=torch.Generator().manual_seed(0))
    codes, scale = encode_state(x if signed else x.abs(), signed, 64, backend=backend)
    decoded = decode_state(codes, scale, signed, 64, backend=backend)
    assert_same_bits(encode_state(decoded, signed, 64, backend=backend), (codes, scale))


def test_a_gradient_is_not_recorded() -> None:
    codes, scale = encode_state(torch.randn(4, 64, requires_grad=True), True, 64)
    assert not codes.requires_grad and not scale.requires_grad


GOOD, BYTES, GOOD_SCALE = torch.zeros(4, 8), torch.zeros(4, 8, dtype=torch.uint8), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: encode_state(GOOD.double(), True, 4), TypeError, "x must be torch.float32, got torch.float64"),
        (lambda: encode_state(GOOD.bfloat16(), True, 4), TypeError, "x must be torch.float32, got torch.bfloat16"),
        (lambda: encode_state(GOOD, True, 0), ValueError, "positive integer, got 0"),
        (lambda: encode_state(GOOD, True, 2.0), ValueError, "positive integer, got 2.0"),  # type: ignore[arg-type]
        (lambda: encode_state(GOOD, True, 4, backend="abacus"), ValueError, "got 'abacus'"),
        (lambda: decode_state(GOOD, GOOD_SCALE, True, 4), TypeError, "codes must be uint8"),
        (lambda: decode_state(BYTES, GOOD_SCALE.double(), True, 4), TypeError, "scale float32, got .* torch.float64"),
        (lambda: decode_state(BYTES, GOOD_SCALE[:, :1], True, 4), ValueError, r"scale .*\(4, 2\).*got \(4, 1\)"),
        (lambda: decode_state(BYTES, GOOD_SCALE.to("meta"), True, 4), ValueError, "scale .*meta"),
        (lambda: decode_state(BYTES, GOOD_SCALE, True, 4, backend="abacus"), ValueError, "got 'abacus'"),
    ],
)
def test_bad_input_is_refused(call, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()
