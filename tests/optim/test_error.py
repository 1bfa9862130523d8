import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opt8bit
from opt8bit.optim import error
from opt8bit.quant import decode_state, dynamic_map, encode_state, state_map

SHAPE = (32, 300)  # with a short block at the end of each row
HALF: float = 0.5 + 2**-23 / 0.014  # codebook values are rounded to float32, and lie 0.014 apart next to -1


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"weight": SHAPE, "bias": (300,)}
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}


def train(steps: int, params: dict[str, nn.Parameter], *optimizers: torch.optim.Optimizer) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for param in params.values():
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        for optimizer in optimizers:
            optimizer.step()


def test_one_coding_costs_half_a_level_at_most() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params.items())
    train(3, params, optimizer)
    report = opt8bit.state_error(optimizer)
    assert [(row.parameter, row.state) for row in report.rows] == [("weight", "exp_avg"), ("weight", "exp_avg_sq")]
    assert (report.full, report.skipped) == (1, 0)
    for row in report.rows:
        assert 0 < row.mean_levels < row.max_levels <= HALF
        assert 0 < row.relative < 0.02


def test_one_coding_is_that_of_the_next_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPT8BIT_BACKEND", "reference")
    params = parameters()
    optimizer = opt8bit.SGD8bit([params["weight"]], momentum=0.9, weight_decay=0.1)
    train(3, params, optimizer)
    weight, state = params["weight"], dict(optimizer.state[params["weight"]])
    assert weight.grad is not None
    old = decode_state(state["momentum_buffer_codes"], state["momentum_buffer_scale"], True, 256)
    exact = 0.9 * old + (weight.grad + 0.1 * weight.detach())
    (row,) = opt8bit.state_error(optimizer).rows
    optimizer.step()
    state = optimizer.state[weight]
    stored = decode_state(state["momentum_buffer_codes"], state["momentum_buffer_scale"], True, 256)
    assert row.relative == ((stored - exact).double().norm() / exact.double().norm()).item()


@pytest.mark.parametrize("with_exact", [False, True])
def test_measuring_changes_nothing(with_exact: bool) -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params.values(), amsgrad=True)
    exact = opt8bit.AdamW8bit(params.values(), amsgrad=True, lr=0, state_bits=32)
    train(2, params, exact, optimizer)
    before = copy.deepcopy((optimizer.state_dict(), exact.state_dict(), list(params.values())))
    opt8bit.state_error(optimizer, exact if with_exact else None)
    after = (optimizer.state_dict(), exact.state_dict(), list(params.values()))
    torch.testing.assert_close(after, before, rtol=0, atol=0)


TWINS: dict[str, tuple[type[torch.optim.Optimizer], type[torch.optim.Optimizer], dict[str, Any]]] = {
    "ours": (opt8bit.AdamW8bit, opt8bit.AdamW8bit, {"state_bits": 32}),
    "torch.optim.AdamW": (opt8bit.AdamW8bit, torch.optim.AdamW, {}),
    "torch.optim.SGD": (opt8bit.SGD8bit, torch.optim.SGD, {"momentum": 0.9}),
}


@pytest.mark.parametrize("twin", TWINS)
def test_a_twin_tells_what_has_come_together(twin: str) -> None:
    params = parameters()
    ours, theirs, hyper = TWINS[twin]
    optimizer: Any = ours(params.values(), **{name: hyper[name] for name in hyper if name == "momentum"})
    exact = theirs(params.values(), **{"lr": 0.0, **hyper})
    train(1, params, exact, optimizer)
    first = opt8bit.state_error(optimizer, exact).rows
    most = {"exp_avg_sq": 1.0}  # of which none that is positive becomes zero
    assert all(row.max_levels <= most.get(row.state, HALF) for row in first)  # states begin at an exact zero
    assert all(row.zeroed == 0 for row in first if row.state in most)
    train(20, params, exact, optimizer)
    last = opt8bit.state_error(optimizer, exact).rows
    assert [row.parameter for row in last] == ["group 0, parameter 0"] * len(last)
    for before, after in zip(first, last, strict=True):
        assert after.mean_levels > before.mean_levels
        assert before.relative < after.relative < 0.05


@pytest.mark.parametrize("scale", [2.0, -2.0])
def test_levels_count_codes_and_fractions(scale: float) -> None:
    codes = torch.tensor([[0, 73, 127, 129]], dtype=torch.uint8)  # of values that ascend: 127, 200, 254 and 0
    scales = torch.tensor([[scale]])
    stored = decode_state(codes, scales, True, 4)
    assert (error.levels(stored, codes, scales, True, 4) == 0).all()
    book = dynamic_map().double()
    moved = scale * torch.stack([book[130], (book[200] + book[201]) / 2, book[255], book[0] - (book[1] - book[0]) / 2])
    distance = error.levels(moved[None], codes, scales, True, 4)
    torch.testing.assert_close(distance, torch.tensor([[3, 0.5, 1, 0.5]], dtype=torch.float64))


@pytest.mark.parametrize("signed", [False, True])
def test_every_code_stands_at_its_own_level(signed: bool) -> None:
    codes = torch.arange(256, dtype=torch.uint8)[None]
    distance = error.levels(state_map(signed)[None], codes, torch.ones(1, 1), signed, 256)
    assert not distance.any()


@pytest.mark.parametrize("signed", [False, True])
def test_nearest_codes_are_within_half_a_level(signed: bool) -> None:
    x = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    x = x if signed else x.square()
    codes, scale = encode_state(x, signed, 64)
    assert (scale < 0).any() == signed
    distance = error.levels(x, codes, scale, signed, 64)
    is_kept = (codes == 1) & (not signed)  # what is positive does not become zero, though zero may be nearer
    assert distance[~is_kept].max() <= HALF
    assert (distance[is_kept] < 1).all()


def test_levels_of_a_block_of_zeros() -> None:
    codes, scale = torch.zeros(1, 2, dtype=torch.uint8), torch.zeros(1, 1)
    distance = error.levels(torch.tensor([[0.0, 1.0]]), codes, scale, True, 2)
    assert distance.tolist() == [[0, math.inf]]


def test_what_is_lost_to_zero_is_counted() -> None:
    weight = nn.Parameter(torch.zeros(16, 256))
    optimizer = opt8bit.SGD8bit([weight], momentum=0.9)
    weight.grad = torch.ones(16, 256)
    weight.grad[:, ::4] = 1e-9  # a quarter of each block, far below its smallest value
    weight.grad[:, 1] = 0
    optimizer.step()
    (row,) = opt8bit.state_error(optimizer).rows
    assert row.zeroed == 0.25


@pytest.mark.parametrize(
    ("stored", "exact", "expected"),
    [([3.0, 0.0], [3.0, 4.0], 0.8), ([0.0, 0.0], [0.0, 0.0], 0.0), ([1.0, 0.0], [0.0, 0.0], math.inf)],
)
def test_relative_error(stored: list[float], exact: list[float], expected: float) -> None:
    assert error.relative_error(Tensor(stored), Tensor(exact)) == expected


def test_what_is_left_out_is_counted() -> None:
    params = parameters()
    idle = nn.Parameter(torch.zeros(SHAPE))
    optimizer = opt8bit.AdamW8bit([*params.values(), idle])
    train(1, params, optimizer)
    report = opt8bit.state_error(optimizer)
    assert (len(report.rows), report.full, report.skipped) == (2, 1, 1)
    lines = str(report).splitlines()
    assert len(lines) == 4 and lines[1].startswith("group 0, parameter 0") and "exp_avg " in lines[1]
    assert lines[-1] == "left out: 1 parameters with states in full, 1 without states or gradient"


def test_states_in_full_have_no_rows() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params.values(), state_bits=32)
    train(1, params, optimizer)
    assert opt8bit.state_error(optimizer) == error.StateErrorReport((), 2, 0)


def test_half_precision_and_named_groups() -> None:
    weight = nn.Parameter(torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16())
    groups = [{"params": [("body.weight", weight)], "block_size": 64}]
    optimizer, exact = opt8bit.AdamW8bit(groups), opt8bit.AdamW8bit([weight], lr=0, state_bits=32)
    train(2, {"weight": weight}, exact, optimizer)
    for report in (opt8bit.state_error(optimizer), opt8bit.state_error(optimizer, exact)):
        assert {row.parameter for row in report.rows} == {"body.weight"}
        assert all(0 < row.relative < 0.02 for row in report.rows)


def test_what_cannot_be_measured_is_said() -> None:
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params.values())
    with pytest.raises(ValueError, match="no parameter has 8-bit states and a gradient"):
        opt8bit.state_error(optimizer)
    train(2, params, optimizer)
    torchs = torch.optim.AdamW(params.values())
    with pytest.raises(TypeError, match=r"optimizer must be one of opt8bit, got torch\.optim"):
        opt8bit.state_error(torchs)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match=r"exact must be an optimizer, got builtins\.int"):
        opt8bit.state_error(optimizer, 3)  # pyright: ignore[reportArgumentType]
    optimizer.zero_grad()
    with pytest.raises(ValueError, match=r"zero_grad\(\) sets gradients to None"):
        opt8bit.state_error(optimizer)
    params["weight"].grad = torch.eye(32, 300).to_sparse()
    with pytest.raises(ValueError, match=r"group 0, parameter 0: the gradient must be dense"):
        opt8bit.state_error(optimizer)


WRONG_TWINS: dict[str, tuple[Any, int, str]] = {
    "other parameters": (lambda p: torch.optim.AdamW([p["weight"]]), 2, r"groups of \[2\] parameters.*got \[1\]"),
    "other states": (lambda p: torch.optim.SGD(p.values(), momentum=0.9), 2, "exact has no state 'exp_avg'"),
    "not stepped": (lambda p: torch.optim.AdamW(p.values()), 0, "has it been stepped"),
    "other steps": (lambda p: torch.optim.AdamW(p.values()), 3, "exact must have taken 2 steps, too, got 3"),
    "8-bit states": (lambda p: opt8bit.AdamW8bit(p.values()), 2, "exact has 8-bit states.*state_bits=32"),
}


@pytest.mark.parametrize("wrong", WRONG_TWINS)
def test_a_wrong_twin_is_refused(wrong: str) -> None:
    make, steps, message = WRONG_TWINS[wrong]
    params = parameters()
    optimizer = opt8bit.AdamW8bit(params.values())
    exact = make(params)
    train(2, params, optimizer)
    train(steps, params, exact)
    with pytest.raises(ValueError, match=message):
        opt8bit.state_error(optimizer, exact)
