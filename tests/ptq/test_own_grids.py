"""Grids and methods of one's own: not taken for others, and refused by name where they do not keep their word."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from test_calls import Model
from test_experts import IDS, Sparse
from test_work import Ended, ending_after
from torch import Tensor
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.rounder import Rounder
from opt8bit.quant.described import described
from opt8bit.quant.grid import Grid
from opt8bit.quant.uniform import UniformGrid, UniformParams
from opt8bit.quant.weight import Outliers, Part, QuantizedWeight, WeightScheme

NAME = "model.layers.0.mlp.up_proj.weight"


class Rooted(UniformGrid):
    """Powers of evenly spaced values: neither fitted nor decoded as its parent's."""

    def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
        return super().fit(block.sign() * block.abs() ** 2, importance)

    def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
        x = super().decode(codes, params)
        return x.sign() * x.abs().sqrt()

    def encode(self, x: Tensor, params: UniformParams) -> Tensor:
        return super().encode(x.sign() * x.abs() ** 2, params)

    def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
        return self.decode(self.encode(x, params), params)


class PowersOfTwo(UniformGrid):
    """Scales that are powers of two."""

    def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
        params = super().fit(block, importance)
        return params._replace(scale=torch.exp2(torch.log2(params.scale).ceil()))


class Exponents(NamedTuple):
    scale: Tensor  # log2 of the step


class Exponential(Grid[Exponents]):
    """A grid whose values are not proportional to its ``scale``."""

    params_type = Exponents

    @property
    def bits(self) -> int:
        return 4

    def fit(self, block: Tensor, importance: Tensor | None = None) -> Exponents:
        return Exponents(torch.log2(block.abs().amax(-1, keepdim=True).clamp(min=1e-9) / 7))

    def encode(self, x: Tensor, params: Exponents) -> Tensor:
        return ((x / 2**params.scale).round().clamp(-8, 7) + 8).to(torch.uint8)

    def decode(self, codes: Tensor, params: Exponents) -> Tensor:
        return (codes.float() - 8) * 2**params.scale

    def nearest(self, x: Tensor, params: Exponents) -> Tensor:
        return self.decode(self.encode(x, params), params)

    def stored_bits(self, codes: Tensor, params: Exponents) -> int:
        return 4 * codes.numel() + 8 * params.scale.numel()


class Steps(NamedTuple):
    step: Tensor


class Stepped(Exponential):
    """A grid without a param ``scale``."""

    params_type = Steps

    def fit(self, block: Tensor, importance: Tensor | None = None) -> Any:
        return Steps(super().fit(block, importance).scale)

    def encode(self, x: Tensor, params: Any) -> Tensor:
        return super().encode(x, Exponents(params.step))

    def decode(self, codes: Tensor, params: Any) -> Tensor:
        return super().decode(codes, Exponents(params.step))

    def stored_bits(self, codes: Tensor, params: Any) -> int:
        return super().stored_bits(codes, Exponents(params.step))


def compressed(**options: Any) -> Any:
    return ptq.compress(MODELS["llama"](), token_ids(8, 16), **{"group_size": 16, "method": "rtn", **options})


def test_experts_with_few_tokens_are_rounded_on_the_grid_itself() -> None:
    torch.manual_seed(0)
    with pytest.warns(UserWarning, match="saw too few tokens"):
        result = ptq.compress(
            Model(Sparse(), Sparse()), IDS, grid=PowersOfTwo(4), group_size=8, batch_size=4, method="rtn"
        )
    for name, change in result.changes.items():
        if isinstance(change, QuantizedWeight):
            scale = change.parts[0].params.scale
            assert torch.equal(torch.log2(scale), torch.log2(scale).round()), name


@pytest.mark.parametrize("format", ["compressed-tensors", "gptq"])
def test_packed_formats_refuse_classes_made_from_the_uniform_grid(format: str, tmp_path: Path) -> None:
    grid = Rooted(4, symmetric=True)
    with pytest.raises(ValueError, match=rf"^\S+: {format} holds evenly spaced values alone, got .* of Rooted: use"):
        compressed(grid=grid, checkpoint_format=format)
    result = compressed(grid=grid)
    with pytest.raises(ValueError, match=rf"^\S+: {format} holds evenly spaced values alone, got .* of Rooted: use"):
        ptq.export(result, tmp_path / "out", format=format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "grid", [Exponential(), Stepped(), Rooted(4, symmetric=True)], ids=lambda grid: type(grid).__name__
)
@pytest.mark.parametrize("method", ["gptq", "rtn"])
def test_polish_leaves_scales_that_values_are_not_proportional_to(grid: Grid, method: str) -> None:
    errors = [
        sum(layer.error_rounded for layer in compressed(grid=grid, method=method, polish=polish).report)
        for polish in (False, True)
    ]
    assert errors[1] <= 1.02 * errors[0]


def test_polish_refits_scales_of_any_grid_that_values_are_proportional_to() -> None:
    class Halved(UniformGrid):
        def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
            return super().decode(codes, params) / 2

        def encode(self, x: Tensor, params: UniformParams) -> Tensor:
            return super().encode(2 * x, params)

        def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
            return self.decode(self.encode(x, params), params)

        def fit(self, block: Tensor, importance: Tensor | None = None) -> UniformParams:
            return super().fit(2 * block, importance)

    errors = [
        sum(layer.error_rounded for layer in compressed(grid=grid, method="gptq").report)
        for grid in (Halved(3), UniformGrid(3))
    ]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


@dataclass(frozen=True)
class KeepsLargest(Rounder):
    """Rounds to nearest, and keeps the largest weight of each row."""

    needs = frozenset()
    rowwise = True
    keeps_outliers = True  # type: ignore[assignment]

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        rounded = ptq.RTN().round(weight, statistics, scheme)
        rows, columns = torch.arange(len(weight)), weight.abs().argmax(1)
        values = weight[rows, columns] - rounded.dequantize()[rows, columns]
        return replace(rounded, outliers=Outliers(rows, columns, values))


def test_outliers_of_a_rowwise_method_are_kept() -> None:
    model = MODELS["llama"]()
    result = ptq.compress(model, token_ids(8, 16), bits=2, group_size=16, method=KeepsLargest())
    change: Any = result.changes[NAME]
    weight = model.get_parameter(NAME)
    rows, columns = torch.arange(len(weight)), weight.abs().argmax(1)
    assert torch.equal(change.outliers.columns, columns)
    assert torch.allclose(change.dequantize()[rows, columns], weight[rows, columns])


@dataclass(frozen=True)
class Wider(Rounder):
    """Rounds on a grid that it does not name."""

    names: bool = False
    needs = frozenset()

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        return (UniformGrid(8),) if self.names else super().grids(scheme)

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        return ptq.RTN().round(weight, statistics, replace(scheme, grid=UniformGrid(8)))


def test_a_method_keeps_to_the_grids_that_it_names(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: Wider\.grids must name the grid of each part, "):
        compressed(bits=3, method=Wider())
    for work in (None, tmp_path / "work"):
        result = compressed(bits=3, method=Wider(names=True), work=work)
        change: Any = result.changes[NAME]
        assert change.parts[0].grid.bits == 8
    with pytest.raises(ValueError, match="gptq holds the grid of the scheme, not those of Wider"):
        ptq.export(result, tmp_path / "out", format="gptq")
    assert not (tmp_path / "out").exists()


@dataclass(frozen=True)
class Halves(Rounder):
    """The even columns on one grid, the odd ones on another."""

    needs = frozenset()

    def grids(self, scheme: WeightScheme) -> tuple[Grid, ...]:
        return UniformGrid(4), UniformGrid(2)

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> QuantizedWeight:
        parts = []
        for first, grid in enumerate(self.grids(scheme)):
            columns = torch.arange(first, weight.shape[1], 2)
            own = weight[:, columns]
            params = UniformParams(*(each[..., 0] for each in grid.fit(own.unflatten(1, (1, -1)))))
            parts.append(replace(Part.of(grid, own, params), columns=columns))
        return QuantizedWeight((weight.shape[0], weight.shape[1]), tuple(parts))


def test_weights_of_several_parts_are_kept_on_disk(tmp_path: Path) -> None:
    results = [compressed(method=Halves(), work=work) for work in (None, tmp_path / "work")]
    weights = [result.changes[NAME].dequantize() for result in results]
    assert torch.equal(*weights)
    for method in (ptq.QuantEase(start=Halves()), ptq.OutlierQuantEase(start=Halves())):
        with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: \w+ goes on from a weight on one grid, got 2"):
            compressed(method=method)
    for format in ("gptq", "compressed-tensors"):
        with pytest.raises(ValueError, match="holds the grid of the scheme, not those of Halves"):
            compressed(method=Halves(), checkpoint_format=format)


class Nan(UniformGrid):
    def decode(self, codes: Tensor, params: UniformParams) -> Tensor:
        return super().decode(codes, params) * torch.nan


@pytest.mark.parametrize("layer", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_a_weight_that_is_not_finite_is_its_grids(layer: str) -> None:
    own = {"grid": Nan(4), "group_size": 16, "method": "rtn"}
    with pytest.raises(ValueError, match=rf"^{layer}: its rounded weight is not finite, by RTN\(\) on "):
        compressed(bits=4, overrides={layer: own})


def test_a_run_goes_on_with_its_own_grid_only(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        compressed(grid=UniformGrid(4), work=tmp_path, see=ending_after(8))
    with pytest.raises(ValueError, match="differs in: options"):
        compressed(grid=PowersOfTwo(4), work=tmp_path)
    compressed(grid=UniformGrid(4), work=tmp_path)


def test_a_run_goes_on_with_classes_that_have_no_repr(tmp_path: Path) -> None:
    with pytest.raises(Ended):
        compressed(grid=Exponential(), work=tmp_path, see=ending_after(8))
    result = compressed(grid=Exponential(), work=tmp_path)
    expected = compressed(grid=Exponential())
    assert torch.equal(result.changes[NAME].dequantize(), expected.changes[NAME].dequantize())


def test_what_is_described_alike_is_alike() -> None:
    assert described(UniformGrid(4)) == described(UniformGrid(4)) != described(UniformGrid(3))
    assert described(PowersOfTwo(4)) != described(UniformGrid(4))
    assert described({"a": torch.ones(2)}) == described({"a": torch.ones(2)}) != described({"a": torch.zeros(2)})
    assert described({"a": 1, "b": 2}) != described({"b": 2, "a": 1})  # the last override that fits is the one
    assert described({1, 2}) == described({2, 1})
    assert described([torch.float32, ptq.GPTQ]) == "builtins.list(torch.float32, opt8bit.ptq.rounding.gptq.GPTQ)"
