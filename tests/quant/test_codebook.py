import pytest
import torch

from opt8bit.quant import dynamic_map, linear_map, normal_float
from opt8bit.quant.codebook import check_codebook


def paper_map(signed: bool) -> list[float]:
    """The definition, cell by cell, in Python's float64."""
    values = [0.0, 1.0]
    for i in range(7):
        cells = 2**i if signed else 2 ** (i + 1)
        for cell in range(cells):
            value = (0.1 + 0.9 * (cell + 0.5) / cells) * 10.0 ** (i - 6)
            values += [value, -value] if signed else [value]
    return sorted(values)


@pytest.mark.parametrize("signed", [True, False])
def test_dynamic_map_is_the_papers(signed: bool) -> None:
    values = dynamic_map(signed)
    assert values.dtype == torch.float32 and values.shape == (256,)
    assert (values.diff() > 0).all()
    expected = torch.tensor(paper_map(signed), dtype=torch.float64)
    torch.testing.assert_close(values.double(), expected, rtol=7e-7, atol=0)


def test_dynamic_map_landmarks() -> None:
    signed, unsigned = dynamic_map(True), dynamic_map(False)
    assert signed[127] == 0 and unsigned[0] == 0
    assert signed[-1] == 1 and unsigned[-1] == 1 and signed[0] == -signed[254]
    assert signed[128].item() == pytest.approx(5.5e-7) and unsigned[1].item() == pytest.approx(3.25e-7)


def test_dynamic_map_is_a_fresh_tensor() -> None:
    dynamic_map(True).zero_()
    assert dynamic_map(True)[0] < 0


def test_linear_map() -> None:
    assert linear_map(True).tolist()[0] == -1 and linear_map(True).numel() == 255
    assert linear_map(True)[127] == 0
    assert linear_map(False, 2).tolist() == pytest.approx([0, 1 / 3, 2 / 3, 1])


def test_normal_float_is_nf4() -> None:
    nf4 = [  # as published with QLoRA
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ]  # fmt: skip
    torch.testing.assert_close(normal_float(4), torch.tensor(nf4), rtol=0, atol=2e-7)


@pytest.mark.parametrize("make", [linear_map, normal_float])
@pytest.mark.parametrize("bits", [1, 9])
def test_bits_out_of_range(make, bits: int) -> None:
    with pytest.raises(ValueError, match=f"2 to 8, got {bits}"):
        make(bits=bits)


@pytest.mark.parametrize(
    ("codebook", "error", "message"),
    [
        ([0.0, 1.0], TypeError, "float32 tensor, got list"),
        (torch.arange(4), TypeError, "got torch.int64"),
        (torch.zeros(2, 2), ValueError, r"1-D with 2 to 256 values, got shape \(2, 2\)"),
        (torch.zeros(1), ValueError, "2 to 256"),
        (torch.arange(257.0), ValueError, "2 to 256"),
        (torch.tensor([0.0, 0.0]), ValueError, "strictly ascending"),
        (torch.tensor([1.0, 0.0]), ValueError, "strictly ascending"),
        (torch.tensor([0.0, float("nan")]), ValueError, "finite"),
        (torch.tensor([0.0, float("inf")]), ValueError, "finite"),
    ],
)
def test_what_is_no_codebook_is_refused(codebook, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_codebook(codebook)
