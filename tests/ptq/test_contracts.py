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
from opt8bit.quant.uniform import UniformGrid
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
