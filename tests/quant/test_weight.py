import pytest
import torch

from opt8bit.quant import CodebookGrid, UniformGrid, normal_float
from opt8bit.quant.grid import at
from opt8bit.quant.weight import Outliers, Part, QuantizedWeight, WeightScheme

ROWS, COLUMNS, GROUP = 6, 16, 4


def weight() -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0))


def of_two_grids(whole_columns: bool = False) -> QuantizedWeight:
    """Even columns on one grid, odd ones on another, and two outliers."""
    parts = []
    for start, grid in enumerate((UniformGrid(3), CodebookGrid(normal_float(4)))):
        columns = torch.arange(start, COLUMNS, 2)
        own = weight()[:, columns]
        params = at(grid.fit(own.unflatten(1, (-1, GROUP))), (..., 0))
        made = Part.of(grid, own, params)
        parts.append(Part(grid, made.codes, params, columns))
    outliers = Outliers(torch.tensor([1, 4]), torch.tensor([3, 3]), torch.tensor([5.0, -7.0]), whole_columns)
    return QuantizedWeight((ROWS, COLUMNS), tuple(parts), outliers)


def test_a_weight_is_the_sum_of_its_parts_and_outliers() -> None:
    quantized = of_two_grids()
    found = quantized.on_grid()
    for one in quantized.parts:
        assert torch.equal(found[:, one.columns], one.dequantize())
        assert (one.dequantize() - weight()[:, one.columns]).abs().max() < 0.5
    assert torch.equal((quantized.dequantize() - found).nonzero(), torch.tensor([[1, 3], [4, 3]]))


def test_parts_of_the_same_columns_are_added() -> None:
    both = QuantizedWeight((ROWS, COLUMNS), of_two_grids().parts * 2)
    torch.testing.assert_close(both.dequantize(), 2 * of_two_grids().on_grid())


@pytest.mark.parametrize("whole_columns", [False, True])
def test_tensors_bring_it_back(whole_columns: bool) -> None:
    quantized = of_two_grids(whole_columns)
    again = QuantizedWeight.from_tensors(quantized.tensors(), [one.grid for one in quantized.parts])
    assert torch.equal(again.dequantize(), quantized.dequantize())
    assert again.stored_bits == quantized.stored_bits and again.shape == quantized.shape


def test_rows_are_a_weight_of_their_own() -> None:
    quantized = of_two_grids()
    rows = quantized.rows_from(1, 5)
    assert rows.shape == (4, COLUMNS) and torch.equal(rows.dequantize(), quantized.dequantize()[1:5])


def test_everything_stored_is_counted() -> None:
    half, groups = ROWS * COLUMNS // 2, ROWS * COLUMNS // 2 // GROUP
    codes = 3 * half + (32 + 3) * groups + 4 * half + 32 * groups
    columns = 32 * COLUMNS
    assert of_two_grids().stored_bits == codes + columns + 2 * 16 + 2 * 32
    assert of_two_grids(whole_columns=True).stored_bits == codes + columns + 2 * 16 + 32
    assert of_two_grids().bits_per_weight == pytest.approx(of_two_grids().stored_bits / (ROWS * COLUMNS))


def test_group_sizes_divide() -> None:
    assert WeightScheme(UniformGrid(4), 8).groups_of(weight()) == 8
    assert WeightScheme(UniformGrid(4)).groups_of(weight()) == COLUMNS
    with pytest.raises(ValueError, match="group_size must be a positive divisor of the 16 inputs, got 5"):
        WeightScheme(UniformGrid(4), 5).groups_of(weight())
