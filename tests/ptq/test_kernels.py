"""The compiled kernels against the plain torch they stand for, on every instruction set of this machine."""

import itertools

import pytest
import torch
from test_methods import layer

from opt8bit import backends
from opt8bit.backends.native import Native
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding import GPTQ, RTN, QuantEase, Rounder, objective
from opt8bit.ptq.rounding.compiled import CompiledEngine
from opt8bit.ptq.rounding.engines import PlainEngine, engine_for
from opt8bit.ptq.rounding.linear_algebra import inverse_factor
from opt8bit.quant import CodebookGrid, UniformGrid, normal_float
from opt8bit.quant.uniform import UniformParams
from opt8bit.quant.weight import Part, QuantizedWeight, WeightScheme

# A sum in another order may round a number that lies in the middle of two codes to the other one; what follows in the
# row then differs, too. Both are as good.
SAME_OBJECTIVE = 2e-3
SHAPES = [(1, 16, 16), (5, 48, 16), (70, 96, None), (130, 160, 32), (64, 128, 128)]
GRIDS = [
    UniformGrid(2, range="mse"),
    UniformGrid(3),
    UniformGrid(4, symmetric=True),
    UniformGrid(2, symmetric=True, range="mse"),
    UniformGrid(4, symmetric=True, range="mse"),
    UniformGrid(4, symmetric="restricted"),
    UniformGrid(3, symmetric="restricted", range="mse"),
    UniformGrid(8),
    UniformGrid(4, symmetric=True, scale_dtype=torch.float16),
    UniformGrid(3, range="mse", scale_dtype=torch.bfloat16),
]


def both(method: object, kernels: str, shape: tuple[int, int, int | None], grid: UniformGrid, monkeypatch):
    weight, hessian = layer(shape[0], shape[1], torch.float32)
    results: list[QuantizedWeight] = []
    for name in ("reference", kernels):
        monkeypatch.setenv(backends.ENVIRONMENT, name)
        results.append(method.round(weight, InputStatistics(hessian.double()), WeightScheme(grid, shape[2])))  # type: ignore[attr-defined]
    return weight, hessian, *results


@pytest.mark.sampled(7)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize(
    "method",
    [
        *(RTN(), GPTQ(), QuantEase(3, GPTQ())),
        *(pytest.param(each, marks=pytest.mark.slow) for each in (GPTQ(act_order=False), QuantEase())),
    ],
    ids=str,
)
def test_kernels_do_what_the_reference_does(method, grid, shape, kernels: str, monkeypatch) -> None:
    weight, hessian, reference, native = both(method, kernels, shape, grid, monkeypatch)
    assert (reference.parts[0].codes == native.parts[0].codes).float().mean() > 0.97
    torch.testing.assert_close(
        objective(weight, native.dequantize(), hessian),
        objective(weight, reference.dequantize(), hessian),
        rtol=SAME_OBJECTIVE,
        atol=0,
    )
    (part,) = native.parts
    assert torch.equal(Part.of(part.grid, native.on_grid(), part.params).codes, part.codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_fits_are_the_same_bits_but_for_the_search(grid: UniformGrid, kernels: str) -> None:
    weight, hessian = layer(70, 96, torch.float32)
    importance = hessian.diagonal()
    fitted = CompiledEngine(Native(kernels), grid).fit(weight, 32, importance)
    expected = grid.fit(weight.unflatten(1, (-1, 32)), importance.unflatten(0, (-1, 32)))
    same = (fitted.scale == expected.scale[..., 0]) & (fitted.zero_point == expected.zero_point[..., 0])
    assert same.all() if grid.range == "minmax" else same.float().mean() > 0.99


def test_zero_points_are_codes(kernels: str) -> None:
    weight = -torch.rand(512, 64, generator=torch.Generator().manual_seed(0))
    grid = UniformGrid(8, scale_dtype=torch.bfloat16)
    fitted = CompiledEngine(Native(kernels), grid).fit(weight, 16, torch.ones(64))
    assert fitted.zero_point.max() == 255
    assert torch.equal(fitted.zero_point, grid.fit(weight.unflatten(1, (-1, 16))).zero_point[..., 0])


def test_threads_change_no_bit(kernels: str, monkeypatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, kernels)
    weight, hessian = layer(200, 96, torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(
                QuantEase(start=GPTQ()).round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), 32))
            )
    finally:
        torch.set_num_threads(threads)
    for a, b in itertools.pairwise(found):
        assert torch.equal(a.parts[0].codes, b.parts[0].codes) and torch.equal(
            a.parts[0].params.scale, b.parts[0].params.scale
        )


def test_coordinate_descent_never_raises_the_objective(kernels: str, monkeypatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, kernels)
    weight, hessian = layer(64, 96, torch.float32)
    scheme = WeightScheme(UniformGrid(3), 32)
    found = [
        objective(weight, method.round(weight, InputStatistics(hessian), scheme).dequantize(), hessian.double())
        for method in (RTN(), *(QuantEase(sweeps) for sweeps in (1, 2, 4, 50)))
    ]
    assert all(after <= before * (1 + 1e-6) for before, after in itertools.pairwise(found))


def test_gptq_error_identity(kernels: str, monkeypatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, kernels)
    weight, hessian = layer(20, 96, torch.float32)
    dense = (
        GPTQ(act_order=False)
        .round(weight, InputStatistics(hessian), WeightScheme(UniformGrid(3), 32))
        .dequantize()
        .double()
    )
    damped = hessian.double()
    factor = inverse_factor(damped, GPTQ().damping)
    damped.diagonal().add_(GPTQ().damping * damped.diagonal().mean())
    free, total = weight.double(), torch.zeros(())
    for j in range(96):
        error = (free[:, j] - dense[:, j]) / factor[j, j]
        total = total + error.square().sum()
        free -= error[:, None] * factor[j]
    torch.testing.assert_close(total, objective(weight, dense, damped), rtol=1e-5, atol=0)


def test_they_serve_float32_on_even_grids(kernels: str, monkeypatch) -> None:
    monkeypatch.setenv(backends.ENVIRONMENT, kernels)
    weight = torch.zeros(2, 2)
    assert isinstance(engine_for(weight, UniformGrid(4)), CompiledEngine)
    assert isinstance(engine_for(weight.double(), UniformGrid(4)), PlainEngine)
    assert isinstance(engine_for(weight, CodebookGrid(normal_float(4))), PlainEngine)
    monkeypatch.setenv(backends.ENVIRONMENT, "reference")
    assert isinstance(engine_for(weight, UniformGrid(4)), PlainEngine)


class Narrow(UniformGrid):
    """Spans half of what its parent does."""

    def fit(self, block: torch.Tensor, importance: torch.Tensor | None = None) -> UniformParams:
        params = super().fit(block, importance)
        return params._replace(scale=params.scale / 2)


@pytest.mark.parametrize("method", [RTN(), GPTQ(), GPTQ(act_order=False), QuantEase(start=GPTQ())])
def test_a_class_made_from_a_grid_is_never_taken_for_it(method: Rounder) -> None:
    weight, hessian = layer(16, 64, torch.float32)
    assert isinstance(engine_for(weight, Narrow(4)), PlainEngine)
    found, parents = (
        method.round(weight, InputStatistics(hessian.double()), WeightScheme(grid, 16))
        for grid in (Narrow(4), UniformGrid(4))
    )
    assert not torch.equal(found.parts[0].params.scale, parents.parts[0].params.scale)
    if method == RTN():
        assert torch.allclose(2 * found.parts[0].params.scale, parents.parts[0].params.scale)
