"""What every rounding method owes: each enters by its row, and by the grids it is tried on."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding import GPTQ, METHODS, RTN, OutlierQuantEase, QuantEase, Rounder, objective
from opt8bit.ptq.rounding.linear_algebra import inverse_factor
from opt8bit.ptq.rounding.scales import refit_scales
from opt8bit.quant import CodebookGrid, UniformGrid, dynamic_map, normal_float
from opt8bit.quant.float4 import MXFP4Grid, NVFP4Grid
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme

METHODS_UNDER_TEST: dict[str, Rounder] = {
    "rtn": RTN(),
    "gptq": GPTQ(act_order=False),
    "gptq-act_order": GPTQ(),
    "quantease": QuantEase(),
    "gptq-quantease": QuantEase(start=GPTQ()),
    "gptq-quantease-refits": QuantEase(5, GPTQ(), refits=2),
    "outliers": OutlierQuantEase(0.02),
    "outlier-columns": OutlierQuantEase(0.1, "column"),
    "outliers-quantease": QuantEase(start=OutlierQuantEase(0.02)),
}
LOOKS_AT_INPUTS = [name for name in METHODS_UNDER_TEST if name != "rtn"]
GRIDS = {
    "asymmetric2": UniformGrid(2),
    "asymmetric3-mse": UniformGrid(3, range="mse"),
    "symmetric4": UniformGrid(4, symmetric=True),
    "asymmetric8": UniformGrid(8),
    "normal4": CodebookGrid(normal_float(4)),
    "dynamic8-mse": CodebookGrid(dynamic_map(), range="mse"),
    "nvfp4": NVFP4Grid(),
    "mxfp4": MXFP4Grid(),
}
OUTPUTS, INPUTS, GROUP = 6, 48, 16

every_method = pytest.mark.parametrize("name", METHODS_UNDER_TEST)
every_grid = pytest.mark.parametrize("grid", GRIDS)


def layer(
    outputs: int = OUTPUTS, inputs: int = INPUTS, dtype: torch.dtype = torch.float64, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and the second moments of correlated inputs with a few of large scale."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator, dtype=torch.float64)
    mixing = torch.randn(inputs, inputs, generator=generator, dtype=torch.float64) / inputs**0.5
    x = torch.randn(400, inputs, generator=generator, dtype=torch.float64) @ (mixing + 0.5 * torch.eye(inputs))
    x[:, ::7] *= 5
    return weight.to(dtype), (x.T @ x / len(x)).to(dtype)


def assert_on_grid(rounded: QuantizedWeight) -> None:
    """Codes are below the number of values, and coding the decoded weight gives them back."""
    assert rounded.parts[0].codes.dtype == torch.uint8
    assert int(rounded.parts[0].codes.max()) < 2 ** rounded.parts[0].grid.bits
    (part,) = rounded.parts
    assert torch.equal(Part.of(part.grid, rounded.on_grid(), part.params).codes, part.codes)


def test_the_table_is_under_test() -> None:
    assert {type(method) for method in METHODS_UNDER_TEST.values()} == set(METHODS.values())


@pytest.mark.sampled(7)
@every_method
@every_grid
@pytest.mark.parametrize("group_size", [GROUP, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_result_lies_on_its_grid(name: str, grid: str, group_size: int | None, dtype: torch.dtype) -> None:
    weight, hessian = layer(dtype=dtype)
    given = weight.clone(), hessian.clone()
    rounded = METHODS_UNDER_TEST[name].round(weight, InputStatistics(hessian), WeightScheme(GRIDS[grid], group_size))
    assert torch.equal(weight, given[0]) and torch.equal(hessian, given[1])
    assert rounded.parts[0].codes.shape == weight.shape
    assert rounded.parts[0].params.scale.shape == (OUTPUTS, 1 if group_size is None else INPUTS // GROUP)
    assert rounded.dequantize().dtype == dtype
    assert_on_grid(rounded)


@pytest.mark.parametrize("name", LOOKS_AT_INPUTS)
@every_grid
def test_looking_at_inputs_pays(name: str, grid: str) -> None:
    weight, hessian = layer(outputs=32)
    scheme = WeightScheme(GRIDS[grid], GROUP)
    found = objective(
        weight, METHODS_UNDER_TEST[name].round(weight, InputStatistics(hessian), scheme).dequantize(), hessian
    )
    assert found < 0.95 * objective(weight, RTN().round(weight, InputStatistics(hessian), scheme).dequantize(), hessian)


@every_method
def test_rows_do_not_depend_on_each_other(name: str) -> None:
    method = METHODS_UNDER_TEST[name]
    weight, hessian = layer(outputs=70, dtype=torch.float32)
    scheme = WeightScheme(UniformGrid(3, range="mse"), GROUP)
    whole, alone = (
        method.round(weight, InputStatistics(hessian), scheme),
        method.round(weight[65:68], InputStatistics(hessian), scheme),
    )
    assert not method.rowwise or torch.equal(whole.parts[0].codes[65:68], alone.parts[0].codes)
    assert method.rowwise == ("outlier" not in name)
    part = whole.rows_from(65, 68)
    assert torch.equal(part.dequantize(), whole.dequantize()[65:68])


@every_method
def test_groups_are_independent_where_inputs_are(name: str) -> None:
    """With uncorrelated groups of inputs, a change in one group changes nothing in another."""
    weight, hessian = layer(dtype=torch.float32)
    blocks = torch.block_diag(*(hessian[i : i + GROUP, i : i + GROUP] for i in range(0, INPUTS, GROUP)))
    scheme = WeightScheme(UniformGrid(3, range="mse"), GROUP)
    method = METHODS_UNDER_TEST[name]
    if not method.rowwise:
        pytest.skip("which weights are the largest depends on all of them")
    changed = weight.clone()
    changed[:, :GROUP] *= -1.7
    codes, after = (method.round(w, InputStatistics(blocks), scheme).parts[0].codes for w in (weight, changed))
    assert torch.equal(codes[:, GROUP:], after[:, GROUP:])
    assert not torch.equal(codes[:, :GROUP], after[:, :GROUP])


@every_method
def test_dead_inputs_take_the_nearest_and_disturb_nobody(name: str) -> None:
    weight, hessian = layer(dtype=torch.float32)
    alive = torch.arange(INPUTS) != 5
    hessian[5] = hessian[:, 5] = 0
    rounded = METHODS_UNDER_TEST[name].round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(8), None))
    assert torch.isfinite(rounded.dequantize()).all()
    error = (rounded.dequantize() - weight).abs()
    assert (error[:, 5] <= rounded.parts[0].params.scale[:, 0]).all()
    assert (error[:, alive].mean(1) <= 2 * rounded.parts[0].params.scale[:, 0]).all()


@every_method
def test_a_hessian_of_zeros_is_rounding_to_nearest(name: str) -> None:
    weight, _ = layer()
    rounded = METHODS_UNDER_TEST[name].round(
        weight, InputStatistics(torch.zeros(INPUTS, INPUTS).double()), WeightScheme(UniformGrid(8), None)
    )
    assert (rounded.dequantize() - weight).abs().max() <= 0.51 * rounded.parts[0].params.scale.max()


@every_method
def test_a_singular_hessian_is_recovered_from(name: str) -> None:
    weight, _ = layer(dtype=torch.float32)
    x = torch.randn(3, INPUTS, generator=torch.Generator().manual_seed(2))
    hessian = (x.T @ x).double()
    hessian[0, 0] -= 1e-3 * hessian.diagonal().mean()  # what rounding in long sums can do
    rounded = METHODS_UNDER_TEST[name].round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(4), GROUP))
    assert torch.isfinite(rounded.dequantize()).all()
    assert_on_grid(rounded)


@every_method
def test_the_group_size_must_divide(name: str) -> None:
    weight, hessian = layer()
    for size in (5, 0, -16, 96, True, 16.0):
        with pytest.raises(ValueError, match=rf"group_size must be a positive divisor of the 48 inputs, got {size}"):
            METHODS_UNDER_TEST[name].round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(4), size))  # type: ignore[arg-type]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [GROUP, None])
def test_gptq_error_identity(act_order: bool, group_size: int | None) -> None:
    """Σ e² = tr((W - Ŵ)(H + λI)(W - Ŵ)ᵀ), where the e are told from the result alone."""
    weight, hessian = layer()
    method = GPTQ(act_order=act_order)
    rounded = method.round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), group_size)).dequantize()
    order = hessian.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(INPUTS)
    factor = inverse_factor(hessian, method.damping, order)
    damped = hessian[order][:, order] + method.damping * hessian.diagonal().mean() * torch.eye(INPUTS)
    free, errors = weight[:, order].clone(), []
    for j in range(INPUTS):
        errors.append((free[:, j] - rounded[:, order[j]]) / factor[j, j])
        free -= errors[-1][:, None] * factor[j]
    torch.testing.assert_close(
        torch.stack(errors).square().sum(), objective(weight[:, order], rounded[:, order], damped)
    )


def test_gptq_fits_each_group_to_weights_that_are_up_to_date() -> None:
    weight, hessian = layer()
    rounded = GPTQ(act_order=False).round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), GROUP))
    factor = inverse_factor(hessian, GPTQ().damping)
    dense, free = rounded.dequantize(), weight.clone()
    for j in range(INPUTS):
        if j % GROUP == 0:
            fitted = UniformGrid(3).fit(free[:, j : j + GROUP])
            torch.testing.assert_close(fitted.scale[:, 0], rounded.parts[0].params.scale[:, j // GROUP])
        free -= ((free[:, j] - dense[:, j]) / factor[j, j])[:, None] * factor[j]


def test_act_order_fits_groups_of_neighbours_beforehand() -> None:
    weight, hessian = layer()
    scheme = WeightScheme(UniformGrid(3), GROUP)
    static = GPTQ(act_order=True).round(weight, InputStatistics(hessian), scheme).parts[0].params
    assert torch.equal(static.scale, RTN().round(weight, InputStatistics(hessian), scheme).parts[0].params.scale)


@pytest.mark.parametrize("grid", ["asymmetric3-mse", "normal4"])
@pytest.mark.parametrize("start", [RTN(), GPTQ(), GPTQ(act_order=False)])
def test_coordinate_descent_never_raises_the_objective(start: Rounder, grid: str) -> None:
    weight, hessian = layer()
    scheme = WeightScheme(GRIDS[grid], GROUP)
    found = [objective(weight, start.round(weight, InputStatistics(hessian), scheme).dequantize(), hessian)]
    for sweeps in (1, 2, 3, 25):
        found.append(
            objective(
                weight, QuantEase(sweeps, start).round(weight, InputStatistics(hessian), scheme).dequantize(), hessian
            )
        )
    assert all(after <= before * (1 + 1e-12) for before, after in itertools.pairwise(found))
    assert found[-1] < found[0]


@pytest.mark.parametrize("grid", ["asymmetric2", "symmetric4", "normal4"])
def test_coordinate_descent_ends_where_no_single_change_helps(grid: str) -> None:
    weight, hessian = layer(outputs=3)
    rounded = QuantEase(200).round(weight, InputStatistics(hessian), WeightScheme(GRIDS[grid], GROUP))
    dense = rounded.dequantize()
    least = objective(weight, dense, hessian)
    for i, j in itertools.product(range(3), range(INPUTS)):
        for code in range(2 ** rounded.parts[0].grid.bits):
            other = rounded.by_row(torch.clone)
            other.parts[0].codes[i, j] = code
            assert objective(weight, other.dequantize(), hessian) >= least * (1 - 1e-12)


def test_gptq_then_quantease_is_better_than_either_start() -> None:
    """Measured over several layers, as one layer proves nothing; and never worse than its own GPTQ on any."""
    scheme = WeightScheme(UniformGrid(3, range="mse"), GROUP)
    for seed in range(5):
        weight, hessian = layer(outputs=32, seed=seed)
        gptq, both = (
            objective(weight, method.round(weight, InputStatistics(hessian), scheme).dequantize(), hessian)
            for method in (GPTQ(), QuantEase(start=GPTQ()))
        )
        assert both < 0.98 * gptq


@pytest.mark.parametrize("grid", ["asymmetric2", "symmetric4", "normal4"])
def test_refitted_scales_are_those_of_least_squares(grid: str) -> None:
    weight, hessian = layer()
    rounded = GPTQ().round(weight, InputStatistics(hessian), WeightScheme(GRIDS[grid], GROUP))
    refitted = refit_scales(weight @ hessian, rounded.parts[0], hessian)
    assert torch.equal(refitted.codes, rounded.parts[0].codes)
    root = torch.linalg.cholesky(hessian).T
    for i in range(OUTPUTS):
        ratio = rounded.on_grid()[i].view(-1, GROUP) / rounded.parts[0].params.scale[i, :, None]
        columns = torch.block_diag(*(part[:, None] for part in ratio))  # (in, groups): one group's values in each
        best = torch.linalg.lstsq(root @ columns, (root @ weight[i])[:, None]).solution[:, 0]
        torch.testing.assert_close(refitted.params.scale[i], best, rtol=1e-9, atol=0)


@pytest.mark.parametrize("start", [RTN(), GPTQ(), OutlierQuantEase(0.02)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_refits_never_raise_the_objective(start: Rounder, dtype: torch.dtype) -> None:
    weight, hessian = layer(dtype=dtype)
    scheme = WeightScheme(UniformGrid(2, range="mse"), GROUP)
    found = [
        objective(
            weight,
            QuantEase(50, start, refits).round(weight, InputStatistics(hessian), scheme).dequantize(),
            hessian.double(),
        )
        for refits in (0, 1, 2, 8)
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(found))
    assert found[-1] < 0.97 * found[0]


def test_scales_stay_positive_and_those_of_groups_without_signal_stay() -> None:
    weight, hessian = layer()
    rounded = RTN().round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), GROUP))
    assert torch.equal(
        refit_scales(-weight @ hessian, rounded.parts[0], hessian).params.scale, rounded.parts[0].params.scale
    )
    hessian[:GROUP] = hessian[:, :GROUP] = 0
    refitted = refit_scales(weight @ hessian, rounded.parts[0], hessian).params.scale
    assert torch.equal(refitted[:, 0], rounded.parts[0].params.scale[:, 0])
    assert not torch.equal(refitted[:, 1:], rounded.parts[0].params.scale[:, 1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refitted_scales_are_storable_and_still_no_worse(dtype: torch.dtype) -> None:
    weight, hessian = layer()
    rounded = RTN().round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3, scale_dtype=dtype), GROUP))
    refitted = refit_scales(weight @ hessian, rounded.parts[0], hessian)
    scale = refitted.params.scale
    assert torch.equal(scale.to(dtype).to(scale.dtype), scale) and not torch.equal(scale, rounded.parts[0].params.scale)
    assert objective(weight, refitted.dequantize(), hessian) < objective(weight, rounded.dequantize(), hessian)


def all_codes(columns: int, values: int) -> Iterator[torch.Tensor]:
    for codes in itertools.product(range(values), repeat=columns):
        yield torch.tensor([codes], dtype=torch.uint8)


@pytest.mark.parametrize("seed", range(4))
def test_tiny_layers_against_exhaustive_search(seed: int) -> None:
    """No method beats the best of all 4^5 weights on its own grid, and coordinate descent comes close to it."""
    weight, hessian = layer(outputs=1, inputs=5, seed=seed)
    scheme = WeightScheme(UniformGrid(2))
    for method in (RTN(), GPTQ(), QuantEase(), QuantEase(start=GPTQ())):
        rounded = method.round(weight, InputStatistics(hessian), scheme)
        best = min(
            objective(weight, replace(rounded.parts[0], codes=codes).dequantize(), hessian) for codes in all_codes(5, 4)
        )
        found = objective(weight, rounded.dequantize(), hessian)
        assert found >= best * (1 - 1e-12)
        if isinstance(method, QuantEase):
            assert found <= 2 * best


@pytest.mark.parametrize("structure", ["unstructured", "column"])
@pytest.mark.parametrize("fraction", [0.0, 0.02, 0.1, 1.0])
def test_exactly_the_outliers_asked_for(structure: str, fraction: float) -> None:
    weight, hessian = layer()
    rounded = OutlierQuantEase(fraction, structure).round(
        weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), GROUP)
    )
    outliers = rounded.outliers
    assert outliers is not None
    places = set(zip(outliers.rows.tolist(), outliers.columns.tolist(), strict=True))
    if structure == "column":
        columns = set(outliers.columns.tolist())
        assert len(columns) == round(fraction * INPUTS)
        assert places == set(itertools.product(range(OUTPUTS), columns))
    else:
        assert len(places) == outliers.values.numel() == round(fraction * weight.numel())
    changed = (rounded.dequantize() != rounded.on_grid()).nonzero().tolist()
    assert {tuple(place) for place in changed} <= places


@pytest.mark.parametrize("structure", ["unstructured", "column"])
def test_outliers_pay_and_more_of_them_pay_more(structure: str) -> None:
    weight, hessian = layer(outputs=32)
    weight[:, ::9] *= 8
    found = [
        objective(
            weight,
            OutlierQuantEase(fraction, structure)
            .round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), GROUP))
            .dequantize(),
            hessian,
        )
        for fraction in (0.0, 0.05, 0.2)
    ]
    assert found[2] < found[1] < 0.9 * found[0]


def test_everything_kept_is_exact() -> None:
    weight, hessian = layer()
    rounded = OutlierQuantEase(1.0, rounds=200).round(
        weight, InputStatistics(hessian), WeightScheme(UniformGrid(2), GROUP)
    )
    assert objective(weight, rounded.dequantize(), hessian) < 1e-2 * objective(weight, rounded.on_grid(), hessian)


def test_bits_per_weight_counts_everything() -> None:
    weight, hessian = layer()
    assert RTN().round(
        weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), 16)
    ).bits_per_weight == pytest.approx(3 + (32 + 3) / 16)
    assert RTN().round(
        weight, InputStatistics(hessian), WeightScheme(UniformGrid(4, symmetric=True))
    ).bits_per_weight == pytest.approx(4 + 32 / 48)
    rounded = OutlierQuantEase(1 / 48).round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), 16))
    assert rounded.bits_per_weight == pytest.approx(3 + 35 / 16 + 48 / 48)
    rounded = OutlierQuantEase(1 / 48, "column").round(
        weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), 16)
    )
    assert rounded.bits_per_weight == pytest.approx(3 + 35 / 16 + 16 / 48 + 32 / (48 * OUTPUTS))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GPTQ(damping=0), "damping must be a positive number, got 0"),
        (lambda: GPTQ(damping=float("nan")), "damping must be a positive number, got nan"),
        (lambda: QuantEase(sweeps=0), "sweeps must be an integer of at least 1, got 0"),
        (lambda: QuantEase(sweeps=1.5), "sweeps must be an integer of at least 1, got 1.5"),  # type: ignore[arg-type]
        (lambda: QuantEase(refits=-1), "refits must be an integer of at least 0, got -1"),
        (lambda: OutlierQuantEase(1.1), "fraction must be from 0 to 1, got 1.1"),
        (lambda: OutlierQuantEase(0.1, "row"), "structure must be one of unstructured, column, got 'row'"),
        (lambda: OutlierQuantEase(rounds=0), "rounds must be an integer of at least 1, got 0"),
        (lambda: OutlierQuantEase(start=OutlierQuantEase()), "start must be a method without outliers of its own"),
        (lambda: GPTQ(damping="1%"), "damping must be a positive number, got '1%'"),  # type: ignore[arg-type]
        (lambda: GPTQ(damping=True), "damping must be a positive number, got True"),
        (lambda: GPTQ(act_order="no"), "act_order must be True or False, got 'no'"),  # type: ignore[arg-type]
        (lambda: OutlierQuantEase("1%"), "fraction must be from 0 to 1, got '1%'"),  # type: ignore[arg-type]
    ],
)
def test_arguments_are_checked(make: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()  # type: ignore[operator]


@pytest.mark.parametrize("kind", [QuantEase, OutlierQuantEase])
def test_the_method_to_start_with_is_one(kind: type[Rounder]) -> None:
    with pytest.raises(TypeError, match=r"start must be one of opt8bit.ptq, such as GPTQ\(\), got 'gptq'"):
        kind(start="gptq")  # type: ignore[call-arg]


def test_a_hessian_that_is_none_is_refused() -> None:
    weight, hessian = layer()
    hessian[3, 3] = float("nan")
    with pytest.raises(ValueError, match="second moments of the inputs are not finite"):
        GPTQ().round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(4)))
