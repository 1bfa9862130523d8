"""What is not as an extension must be is refused by the names of the layer and the class."""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.calibration.statistics import InputStatistics
from opt8bit.ptq.rounding.rounder import Rounder
from opt8bit.quant.contract import check_grid
from opt8bit.quant.uniform import UniformGrid, UniformParams
from opt8bit.quant.weight import Outliers, Part, QuantizedWeight, WeightScheme

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")
FIRST = "model.layers.0.self_attn.q_proj"


def compress(**options: Any) -> ptq.Result:
    return ptq.compress(MODELS["llama"](), token_ids(4, 8), **{"bits": 3, "group_size": 16, **options})


@dataclass(frozen=True)
class Wrong(Rounder):
    """Rounds to nearest, and then spoils what comes of it."""

    spoil: Callable[[QuantizedWeight], Any]
    rowwise = False

    def round(self, weight: Tensor, statistics: InputStatistics, scheme: WeightScheme) -> Any:
        return self.spoil(ptq.RTN().round(weight, statistics, scheme))


def parts(change: Callable[[Part], Part]) -> Callable[[QuantizedWeight], QuantizedWeight]:
    return lambda rounded: replace(rounded, parts=tuple(map(change, rounded.parts)))


def with_outlier(rounded: QuantizedWeight) -> QuantizedWeight:
    first = torch.tensor([0])
    return replace(rounded, outliers=Outliers(first, first, torch.tensor([5.0])))


SPOILED: list[tuple[Callable[[QuantizedWeight], Any], str]] = [
    (lambda rounded: None, "Wrong.round must return a QuantizedWeight, got NoneType"),
    (QuantizedWeight.dequantize, "Wrong.round must return a QuantizedWeight, got Tensor"),
    (lambda rounded: rounded.rows_from(0, 5), "Wrong.round must return a weight of shape (32, 32), got (5, 32)"),
    (lambda rounded: rounded.rows_from(0, 1), "Wrong.round must return a weight of shape (32, 32), got (1, 32)"),
    (
        lambda rounded: replace(rounded.rows_from(0, 1), shape=(32, 32)),
        "Wrong.round must return codes as torch.uint8 (32, 32), got torch.uint8 (1, 32)",
    ),
    (
        parts(lambda part: replace(part, codes=part.codes.long())),
        "Wrong.round must return codes as torch.uint8 (32, 32), got torch.int64 (32, 32)",
    ),
    (
        parts(lambda part: replace(part, params=part.params._replace(scale=part.params.scale[:1]))),
        "Wrong.round must return scale as (32, groups), got (1, 2)",
    ),
    (parts(lambda part: replace(part, params=tuple(part.params))), "must return params as UniformParams, got tuple"),
    (
        parts(lambda part: replace(part, grid=UniformGrid(8))),
        "Wrong.grids must name the grid of each part, [('UniformGrid', 8)], got [('UniformGrid', 3)]",
    ),
    (lambda rounded: replace(rounded, parts=()), "Wrong.grids must name the grid of each part, [], got"),
    (with_outlier, "Wrong.round returned outliers: its keeps_outliers must be True, got False"),
]


@pytest.mark.parametrize(("spoil", "message"), SPOILED, ids=[message for _, message in SPOILED])
@pytest.mark.parametrize("polished", [False, True])
def test_what_a_method_returns(spoil: Callable[[QuantizedWeight], Any], message: str, polished: bool) -> None:
    method: Rounder = Wrong(spoil)
    if polished:
        method = ptq.QuantEase(start=method)
    with pytest.raises((TypeError, ValueError), match=re.escape(FIRST) + ": .*" + re.escape(message)):
        compress(method=method)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (["second_moments"], "Needing.needs must be a frozenset of some of second_moments, got ['second_moments']"),
        ("second_moments", "Needing.needs must be a frozenset of some of second_moments, got 'second_moments'"),
        (frozenset({"second_moment"}), "Needing.needs may have second_moments, got 'second_moment'"),
    ],
    ids=str,
)
def test_what_a_method_needs(needs: Any, message: str) -> None:
    kind: Any = type("Needing", (Wrong,), {"needs": needs})
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        compress(method=kind(lambda rounded: rounded))


class Even(UniformGrid):
    """Evenly spaced values, to be spoiled."""


def fitted(change: Callable[[UniformParams], Any]) -> Callable[..., Any]:
    return lambda grid, block, importance=None: change(UniformGrid.fit(grid, block, importance))


class Bare(UniformGrid):
    def __init__(self) -> None:
        self._bits, self.symmetric, self.range = 4, False, "minmax"


WRONG_GRIDS: list[tuple[dict[str, Any], str]] = [
    (
        {"fit": fitted(lambda params: UniformParams(*(part[..., 0] for part in params)))},
        "Even.fit, scale, must return (2",
    ),
    ({"fit": fitted(tuple)}, "Even.fit must return UniformParams, got tuple"),
    ({"fit": fitted(lambda params: params.scale)}, "Even.fit must return UniformParams, got Tensor"),
    ({"fit": fitted(lambda params: None)}, "Even.fit must return UniformParams, got NoneType"),
    ({"fit": fitted(lambda params: UniformParams(1.0, 0.0))}, "Even.fit, scale, must return a tensor, got float"),  # type: ignore[arg-type]
    ({"fit": lambda grid, block: UniformGrid.fit(grid, block)}, "2 positional arguments but 3 were given"),
    ({"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params)[..., :1]}, "Even.encode must return (2"),
    (
        {"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params).long()},
        "Even.encode must return torch.uint8",
    ),
    (
        {"encode": lambda grid, x, params: UniformGrid.encode(grid, x, params) + 16},
        "Even.encode must return codes below 16",
    ),
    ({"decode": lambda grid, codes, params: None}, "Even.decode must return a tensor, got NoneType"),
    ({"nearest": lambda grid, x, params: x}, "Even.nearest must be decode(encode(x)), differs by "),
    ({"stored_bits": lambda grid, codes, params: None}, "Even.stored_bits must return an integer from 0, got None"),
    ({"stored_bits": lambda grid, codes, params: -1}, "Even.stored_bits must return an integer from 0, got -1"),
    ({"bits": 0}, "Even.bits must be 1 to 8, got 0"),
    ({"bits": 9}, "Even.bits must be 1 to 8, got 9"),
    ({"params_type": None}, "Even.params_type must be a NamedTuple of tensors, got None"),
    ({"__init__": lambda grid, bits: Bare.__init__(grid)}, "Even.__init__ must call super().__init__()"),
]


@pytest.mark.parametrize(("spoiled", "message"), WRONG_GRIDS, ids=[message for _, message in WRONG_GRIDS])
@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_a_grid_does(spoiled: dict[str, Any], message: str, method: str) -> None:
    grid: Any = type("Even", (UniformGrid,), spoiled)(4)
    seen: list[str] = []
    with pytest.raises((TypeError, ValueError), match=re.escape(FIRST) + ": .*" + re.escape(message)):
        compress(bits=4, grid=grid, method=method, see=lambda report, layers: seen.append(report.name))
    assert not seen
    with pytest.raises((TypeError, ValueError), match=f"model.layers.1.mlp.down_proj: .*{re.escape(message)}"):
        compress(overrides={"*.1.mlp.down_proj": {"grid": grid, "method": method}})


def test_a_grid_is_tried_without_a_change_to_the_weight() -> None:
    class InPlace(UniformGrid):
        def encode(self, x: Tensor, params: UniformParams) -> Tensor:
            return super().encode(x.mul_(1), params)

        def nearest(self, x: Tensor, params: UniformParams) -> Tensor:
            found = super().nearest(x, params)
            x.zero_()
            return found

    block = torch.randn(2, 3, 8)
    given = block.clone()
    check_grid(InPlace(4), block)
    assert torch.equal(block, given)
