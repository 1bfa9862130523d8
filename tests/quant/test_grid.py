from typing import Any

import pytest
import torch

from opt8bit.quant import CodebookGrid, UniformGrid, dynamic_map, normal_float
from opt8bit.quant.float4 import MXFP4Grid, NVFP4Grid
from opt8bit.quant.grid import FRACTIONS, Grid
from opt8bit.quant.uniform import UniformParams, signed

GRIDS = {
    **{f"uniform{bits}": UniformGrid(bits) for bits in range(2, 9)},
    **{f"symmetric{bits}": UniformGrid(bits, symmetric=True) for bits in range(2, 9)},
    **{f"restricted{bits}": UniformGrid(bits, symmetric="restricted") for bits in range(2, 9)},
    "uniform3-mse": UniformGrid(3, range="mse"),
    "symmetric2-mse": UniformGrid(2, symmetric=True, range="mse"),
    "restricted2-mse": UniformGrid(2, symmetric="restricted", range="mse"),
    "normal4": CodebookGrid(normal_float(4)),
    "normal3-mse": CodebookGrid(normal_float(3), range="mse"),
    "dynamic8": CodebookGrid(dynamic_map()),
    "nvfp4": NVFP4Grid(),
    "nvfp4-minmax": NVFP4Grid(range="minmax"),
    "mxfp4": MXFP4Grid(),
    "mxfp4-minmax": MXFP4Grid(range="minmax"),
}


def blocks(dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(5, 7, 32, generator=torch.Generator().manual_seed(0), dtype=dtype)


def all_values(grid: Grid, scales: Any) -> torch.Tensor:
    """Every value of the grid of each block, (..., codes)."""
    count = 2**grid.bits if isinstance(grid, UniformGrid) else grid.codebook.numel()  # type: ignore[attr-defined]
    codes = torch.arange(count, dtype=torch.uint8).expand(*scales.scale.shape[:-1], count)
    return grid.decode(codes, scales)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_takes_the_nearest_of_its_values(name: str, dtype: torch.dtype) -> None:
    grid, x = GRIDS[name], blocks(dtype)
    scales = grid.fit(x)
    values = all_values(grid, scales)
    best = (x[..., None] - values[..., None, :]).abs().amin(-1)
    rounded = grid.nearest(x, scales)
    assert rounded.dtype == dtype
    torch.testing.assert_close((x - rounded).abs(), best, rtol=1e-5, atol=1e-6)
    assert (rounded[..., None] == values[..., None, :]).any(-1).all()


@pytest.mark.parametrize("name", GRIDS)
def test_codes_are_the_values(name: str) -> None:
    grid, x = GRIDS[name], blocks()
    scales = grid.fit(x)
    codes = grid.encode(x, scales)
    assert codes.dtype == torch.uint8 and int(codes.max()) < 2**grid.bits
    rounded = grid.decode(codes, scales)
    assert torch.equal(rounded, grid.nearest(x, scales))
    assert torch.equal(grid.encode(rounded, scales), codes)


@pytest.mark.parametrize("name", GRIDS)
def test_zeros_stay_zero(name: str) -> None:
    grid = GRIDS[name]
    zeros = torch.zeros(2, 8)
    assert torch.equal(grid.nearest(zeros, grid.fit(zeros)), zeros)
    x = blocks()
    x[..., ::2] = 0
    assert (grid.nearest(x, grid.fit(x))[..., ::2] == 0).all()


@pytest.mark.parametrize("bits", range(2, 9))
def test_minmax_spans_the_block(bits: int) -> None:
    x = blocks()
    scales = UniformGrid(bits).fit(x)
    assert (UniformGrid(bits).nearest(x, scales) - x).abs().max() <= scales.scale.max() * 1.001


@pytest.mark.parametrize("symmetric", [False, "restricted"])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_what_trying_all_fractions_finds(bits: int, symmetric: bool | str) -> None:
    x, importance = blocks(torch.float64), torch.rand(32, dtype=torch.float64)
    full, searched = (UniformGrid(bits, symmetric=symmetric, range=name) for name in ("minmax", "mse"))

    def error(scales: UniformParams) -> torch.Tensor:
        return ((full.nearest(x, scales) - x).square() * importance).sum(-1)

    found = error(searched.fit(x, importance))
    assert (found <= error(full.fit(x))).all()
    assert found.sum() < 0.95 * error(full.fit(x)).sum()
    # What clips at any single fraction of the range is never better.
    for fraction in torch.linspace(0.2, 1, 41, dtype=torch.float64):
        clipped = torch.minimum(torch.maximum(x, fraction * x.amin(-1, True)), fraction * x.amax(-1, True))
        if symmetric:
            clipped = x.clamp(-fraction * x.abs().amax(-1, True), fraction * x.abs().amax(-1, True))
        assert (found <= error(full.fit(clipped)) * (1 + 1e-9)).all()


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_search_finds_what_trying_all_fractions_of_both_signs_finds(bits: int) -> None:
    x, importance = blocks(torch.float64), torch.rand(32, dtype=torch.float64)
    grid = UniformGrid(bits, symmetric=True, range="mse")
    magnitude, half = x.abs().amax(-1, True), 2 ** (bits - 1)
    codes = torch.arange(2**bits, dtype=torch.float64)

    def error(values: torch.Tensor) -> torch.Tensor:  # of the nearest of these values, (..., codes)
        return ((x[..., None] - values[..., None, :]).square().amin(-1) * importance).sum(-1)

    params = grid.fit(x, importance)
    assert torch.isin(params.zero_point, torch.tensor([half - 1.0, half], dtype=torch.float64)).all()
    assert 0.2 < (params.zero_point == half).double().mean() < 0.8
    found = error(all_values(grid, params))
    tried = [error(sign * (codes - half) * magnitude * part / half) for part in grid.fractions for sign in (1, -1)]
    torch.testing.assert_close(found, torch.stack(tried).amin(0), rtol=1e-9, atol=0)
    for other in (UniformGrid(bits, symmetric=True), UniformGrid(bits, symmetric="restricted", range="mse")):
        assert found.sum() < 0.95 * error(all_values(other, other.fit(x, importance))).sum()


@pytest.mark.parametrize("bits", range(2, 9))
def test_both_ends_of_a_symmetric_grid_may_reach_the_largest_magnitude(bits: int) -> None:
    fractions, half = UniformGrid(bits, symmetric=True).fractions, 2 ** (bits - 1)
    assert fractions[: len(FRACTIONS)] == FRACTIONS and fractions[-1] == half / (half - 1)
    assert torch.tensor(sorted(fractions), dtype=torch.float64).diff().max() < 0.0200001
    x = torch.tensor([-1.0, 1.0] * 8)
    params = UniformGrid(bits, symmetric=True, range="mse").fit(x)
    torch.testing.assert_close(UniformGrid(bits, symmetric=True).nearest(x, params), x)


@pytest.mark.parametrize("bits", range(2, 9))
def test_the_weight_of_largest_magnitude_is_on_a_symmetric_grid(bits: int) -> None:
    x, grid = blocks(), UniformGrid(bits, symmetric=True)
    params = grid.fit(x)
    largest = x.gather(-1, x.abs().argmax(-1, True))
    assert torch.equal(grid.nearest(largest, params), largest)
    assert torch.equal(params.zero_point == 2 ** (bits - 1), largest < 0)


@pytest.mark.parametrize("range", ["minmax", "mse"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_mirrored_weights_have_mirrored_codes(bits: int, range: str) -> None:
    x, grid = blocks(), UniformGrid(bits, symmetric=True, range=range)
    here, there = grid.fit(x), grid.fit(-x)
    codes = grid.encode(x, here)
    assert torch.equal(there.scale, here.scale) and torch.equal(there.zero_point, grid.largest - here.zero_point)
    assert torch.equal(grid.encode(-x, there), grid.largest - codes)
    assert torch.equal(grid.decode(grid.encode(-x, there), there), -grid.decode(codes, here))


@pytest.mark.parametrize("symmetric", [True, "restricted"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_scales_stand_for_mirrored_codes(bits: int, symmetric: bool | str) -> None:
    x, grid = blocks(), UniformGrid(bits, symmetric=symmetric, range="mse")
    params = grid.fit(x)
    codes = grid.encode(x, params)
    stored, with_signs = signed(grid, codes, params)
    assert stored.dtype == torch.uint8 and (with_signs.zero_point == 2 ** (bits - 1)).all()
    assert torch.equal(grid.decode(stored, with_signs), grid.decode(codes, params))
    assert torch.equal(with_signs.scale.abs(), params.scale)
    assert bool((with_signs.scale < 0).any()) == (symmetric is True)


def test_importance_moves_the_range() -> None:
    x = torch.cat([torch.randn(1, 31, generator=torch.Generator().manual_seed(1)), torch.tensor([[8.0]])], 1)
    grid = UniformGrid(3, range="mse")
    outlier_matters, others_matter = torch.ones(32), torch.ones(32)
    outlier_matters[-1], others_matter[-1] = 1e6, 1e-6
    assert grid.fit(x, outlier_matters).scale > 1.5 * grid.fit(x, others_matter).scale


@pytest.mark.parametrize("bits", [1, 9, 4.0, True, "4"])
def test_bits_are_checked(bits: object) -> None:
    with pytest.raises(ValueError, match=r"bits must be 2 to 8, got"):
        UniformGrid(bits)  # type: ignore[arg-type]


@pytest.mark.parametrize("symmetric", ["no", 0, 1, None])
def test_symmetry_is_checked(symmetric: object) -> None:
    with pytest.raises(ValueError, match="symmetric must be True, False or 'restricted', got"):
        UniformGrid(4, symmetric=symmetric)  # type: ignore[arg-type]


def test_ranges_are_checked() -> None:
    with pytest.raises(ValueError, match="range must be one of minmax, mse, got 'best'"):
        UniformGrid(4, range="best")
    with pytest.raises(ValueError, match="range must be one of minmax, mse, got 'best'"):
        CodebookGrid(normal_float(), range="best")


def test_stored_bits() -> None:
    def stored(grid: Grid) -> int:
        params = grid.fit(x)
        return grid.stored_bits(grid.encode(x, params), params)

    x = torch.ones(2, 5)
    assert stored(UniformGrid(3)) == 2 * (5 * 3 + 35) and stored(UniformGrid(3, symmetric=True)) == 2 * (5 * 3 + 32)
    assert stored(UniformGrid(3, scale_dtype=torch.bfloat16)) == 2 * (5 * 3 + 19)
    assert CodebookGrid(normal_float(4)).bits == 4
    assert stored(CodebookGrid(normal_float(4), scale_dtype=torch.float16)) == 2 * (5 * 4 + 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("range", ["minmax", "mse"])
def test_scales_are_what_their_dtype_holds(dtype: torch.dtype, range: str) -> None:
    x = torch.cat([blocks(), 1e-6 * blocks(), torch.zeros(1, 7, 32)])
    for grid in (
        UniformGrid(3, range=range, scale_dtype=dtype),
        UniformGrid(4, symmetric=True, range=range, scale_dtype=dtype),
        UniformGrid(4, symmetric="restricted", range=range, scale_dtype=dtype),
        CodebookGrid(normal_float(4), range=range, scale_dtype=dtype),
    ):
        scales: Any = grid.fit(x)
        assert torch.equal(scales.scale.to(dtype).to(x.dtype), scales.scale)
        assert (scales.scale > 0).all() and scales.scale.isfinite().all()
        assert (x - grid.nearest(x, scales)).abs().max() < 1.7 * scales.scale.max()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_zero_points_are_codes_where_no_weight_is_positive(bits: int) -> None:
    x = -torch.rand(4096, 16, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        grid = UniformGrid(bits, scale_dtype=dtype)
        scales = grid.fit(x)
        assert 0 <= scales.zero_point.min() and scales.zero_point.max() == grid.largest
        zeros = torch.zeros(1)
        assert (grid.nearest(zeros, scales) == 0).all()


def test_grids_of_other_values_have_other_names() -> None:
    grids = [
        CodebookGrid(normal_float(4)),
        CodebookGrid(torch.linspace(-1, 1, 16)),
        CodebookGrid(normal_float(4), scale_dtype=torch.float16),
        CodebookGrid(normal_float(4), range="mse"),
    ]
    assert len({repr(grid) for grid in grids}) == 4
    assert repr(grids[0]) == repr(CodebookGrid(normal_float(4)))


def test_scales_beyond_a_dtype_take_its_ends() -> None:
    grid = UniformGrid(4, scale_dtype=torch.float16)
    assert grid.storable(torch.tensor([1e-12, 1e9])).tolist() == [2**-24, 65504]
    assert UniformGrid(4, scale_dtype=torch.bfloat16).storable(torch.tensor([3.4e38])).isfinite().all()


def test_scale_dtypes_are_checked() -> None:
    with pytest.raises(ValueError, match=r"scale_dtype must be one of torch.float32, .*, got torch.float64"):
        UniformGrid(4, scale_dtype=torch.float64)
