"""Bits for layers under a budget."""

import itertools
import math
import re
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from toys import MODELS, token_ids

from opt8bit import ptq
from opt8bit.ptq.allocation.knapsack import Choice, allocate
from opt8bit.ptq.allocation.layer_objective import allocate_bits
from opt8bit.ptq.layer_report import LayerReport
from opt8bit.ptq.result import Result

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def brute_force(items: list[list[Choice]], budget: int) -> float:
    """The least cost, tried."""
    found = math.inf
    for chosen in itertools.product(*items):
        if sum(choice.size for choice in chosen) <= budget:
            found = min(found, sum(choice.cost for choice in chosen))
    return found


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_is_the_best_there_is(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    count, choices = 1 + seed % 7, 1 + seed % 4
    sizes = torch.randint(0, 40, (count, choices), generator=generator).tolist()
    costs = torch.rand(count, choices, generator=generator).tolist()
    items = [[Choice(*each) for each in zip(*row, strict=True)] for row in zip(sizes, costs, strict=True)]
    least, most = (sum(of(choice.size for choice in row) for row in items) for of in (min, max))
    for budget in {least, (least + most) // 2, most}:
        chosen = [items[i][number] for i, number in enumerate(allocate(items, budget))]
        assert sum(choice.size for choice in chosen) <= budget
        assert sum(choice.cost for choice in chosen) == pytest.approx(brute_force(items, budget), abs=1e-12)


def test_two_hundred_layers_of_few_shapes_take_no_time() -> None:
    items = [[Choice(3 * size, 1.0 + i % 7), Choice(4 * size, 0.1)] for i in range(210) for size in [(i % 3 + 1) * 64]]
    budget = sum(choices[0].size for choices in items) * 7 // 6
    chosen = allocate(items, budget)
    assert 0 < sum(chosen) < 210
    assert sum(items[i][number].size for i, number in enumerate(chosen)) <= budget


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="the smallest choices take 5 together, more than the budget of 4"):
        allocate([[Choice(2, 0.0)], [Choice(3, 0.0)]], 4)
    with pytest.raises(ValueError, match=r"item 1: Choice\(size=3, cost=nan\) must have a finite cost"):
        allocate([[Choice(2, 0.0)], [Choice(3, math.nan)]], 9)
    assert allocate([], 0) == []


def test_layers_get_the_bits_that_do_most() -> None:
    model, ids = MODELS["llama"](), token_ids(16, 16)

    def compress(**options: Any) -> ptq.Result:
        return ptq.compress(model, ids, group_size=16, held_out=ids[:4], **options)

    results = {bits: compress(bits=bits) for bits in (2, 4)}
    reports = {bits: result.report for bits, result in results.items()}
    layers = [row.name for row in reports[2]]
    qkv = [[f"model.layers.{i}.self_attn.{name}_proj" for name in "qkv"] for i in range(2)]
    between = (results[2].bits_per_weight + results[4].bits_per_weight) / 2
    overrides = allocate_bits(reports, between, together=qkv)
    assert list(overrides) == [name for name in layers if name in overrides] and overrides.keys() == set(layers)
    assert {override["bits"] for override in overrides.values()} == {2, 4}
    assert all(len({overrides[name]["bits"] for name in names}) == 1 for names in qkv)
    mixed = compress(bits=2, overrides=overrides)
    assert mixed.bits_per_weight <= between
    errors = [sum(row.error_rounded for row in result.report) for result in (results[2], mixed, results[4])]
    assert errors[0] > errors[1] > errors[2]
    assert allocate_bits(reports, 99.0) == {name: {"bits": 4} for name in layers}


def test_reports_that_do_not_go_together_are_refused() -> None:
    report = ptq.compress(MODELS["llama"](), token_ids(), bits=2, group_size=16, method=ptq.RTN()).report
    with pytest.raises(ValueError, match=r"the reports at 2 and 3 bits are not on the same layers: model\.layers"):
        allocate_bits({2: report, 3: report[1:]}, 5.0)
    with pytest.raises(ValueError, match="more than the budget"):
        allocate_bits({2: report}, 1.0)
    with pytest.raises(ValueError, match="together names q, on which there is no report"):
        allocate_bits({2: report}, 5.0, together=[["q"]])
    name = report[0].name
    with pytest.raises(ValueError, match=rf"together names {name} twice"):
        allocate_bits({2: report}, 5.0, together=[[name], [report[1].name, name]])


def row(name: str, shape: tuple[int, int], bits: int, error: float = 0.1) -> LayerReport:
    """A layer in whole rows, each with a scale and a zero point: its bits per weight are seldom a binary fraction."""
    stored = bits * math.prod(shape) + (16 + bits) * shape[0]
    return LayerReport(name, shape, stored / math.prod(shape), error, error, 0.0, 0, None, None, "", 0.0)


@given(st.lists(st.tuples(st.integers(1, 20000), st.integers(1, 20000)), min_size=1, max_size=200))
@example([(48, 576), (1536, 96), (32, 1536)])
def test_what_a_result_takes_is_enough_for_it(shapes: list[tuple[int, int]]) -> None:
    reports = {bits: [row(f"{i}", shape, bits, 1 / bits) for i, shape in enumerate(shapes)] for bits in (3, 4)}
    for bits, report in reports.items():
        source: Any = None
        result = Result(source, source, {}, report=report)
        chosen = allocate_bits(reports, result.bits_per_weight)
        if bits == 3:
            assert {each["bits"] for each in chosen.values()} == {bits}
        taken = sum(reports[chosen[each.name]["bits"]][i].stored_bits for i, each in enumerate(report))
        assert taken <= sum(each.stored_bits for each in report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits_per_weight": "4"}, "bits_per_weight must be a positive number, got '4'"),
        ({"bits_per_weight": math.inf}, "bits_per_weight must be a positive number, got inf"),
        ({"bits_per_weight": math.nan}, "bits_per_weight must be a positive number, got nan"),
        ({"bits_per_weight": None}, "bits_per_weight must be a positive number, got None"),
        ({"bits_per_weight": True}, "bits_per_weight must be a positive number, got True"),
        ({"reports": {}}, "reports must have a report for each width, got {}"),
        ({"reports": {2: [], 3: []}}, "reports must have a report for each width, got {2: [], 3: []}"),
        ({"reports": [[]]}, "reports must be a mapping from widths to reports, got [[]]"),
        ({"reports": {"3": [row("a.b", (4, 16), 3)]}}, "reports must be by the width, an integer, got '3'"),
        ({"reports": {3: [row("a.b", (4, 16), 3, math.nan)]}}, "a.b: its error at 3 bits must be finite, got nan"),
        ({"together": ["a.b"]}, "together must have lists of names, such as [['a', 'b']], got ['a.b']"),
        ({"together": "a.b"}, "together must have lists of names, such as [['a', 'b']], got 'a.b'"),
    ],
    ids=str,
)
def test_what_cannot_be_allocated_is_said(options: dict[str, Any], message: str) -> None:
    usual = {"reports": {3: [row("a.b", (4, 16), 3)]}, "bits_per_weight": 5.0}
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        allocate_bits(**{**usual, **options})


def test_layers_that_go_together_get_one_width() -> None:
    def report(errors: dict[str, float], bits: int) -> list[LayerReport]:
        rest = (0, 0, None, None, "", 0.0)
        return [LayerReport(name, (8, 8), float(bits), error, error, *rest) for name, error in errors.items()]

    reports = {2: report({"q": 1.0, "k": 0.2, "o": 0.7}, 2), 4: report({"q": 0.0, "k": 0.19, "o": 0.0}, 4)}
    apart, together = (allocate_bits(reports, 10 / 3, together=groups) for groups in ([], [["q", "k"]]))
    assert {name: options["bits"] for name, options in apart.items()} == {"q": 4, "k": 2, "o": 4}
    assert {name: options["bits"] for name, options in together.items()} == {"q": 4, "k": 4, "o": 2}
