"""What is unusual around a step, or in what it works on, ends as with torch.optim; rare gradients among them."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import ANY_SHAPE, Case, gradients, parameter, train, use
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

import opt8bit
from opt8bit.quant import dynamic_map, linear_map, normal_float

PAIRS = {
    "AdamW": (opt8bit.AdamW8bit, torch.optim.AdamW),
    "SGD": (opt8bit.SGD8bit, torch.optim.SGD),
}
Pair = tuple[Any, Any]


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.mark.sampled(7)
@pytest.mark.parametrize("rare", [3e-4, 1e-5, 1e-15, 1e21])
@pytest.mark.slow_interpreted
def test_a_gradient_that_comes_once_moves_as_with_full_states(
    any_shape: Case, rare: float, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Far below the others of its block, or so large that its square is infinite: no second moment may become zero
    while the first is not."""
    use(monkeypatch, backend)
    spot, moved = (3, 40), []
    for bits in (8, 32):
        param = parameter()
        start = param.detach().clone()
        optimizer = any_shape.ours([param], state_bits=bits, **{**any_shape.hyper, "weight_decay": 0.0})
        for number in range(6):
            grad = torch.ones(param.shape)
            grad[spot] = rare if number == 0 else 0.0
            train(optimizer, param, [grad])
        assert param.isfinite().all()
        moved.append((param - start).abs())
    if any_shape.ours in (opt8bit.SGD8bit, opt8bit.LARS8bit) and rare > 1:
        return  # which move by what the gradient is
    assert moved[0][spot] <= 3 * moved[1][spot] + 3 * moved[1].median()
    block = moved[0][3, :256], moved[1][3, :256]
    assert 0.9 < block[0].median() / block[1].median() < 1.1


@pytest.mark.parametrize("rule", ["AdamW8bit weight decay", "Adagrad8bit decay"])
def test_second_moments_are_zero_only_if_they_are(rule: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, backend)
    case = ANY_SHAPE[rule]
    param = parameter()
    optimizer = case.ours([param], **{**case.hyper, "weight_decay": 0.0})
    grad = gradients(1)[0]
    grad[:, ::3] = 0
    grad[:, 1::3] *= 1e-6
    train(optimizer, param, [grad])
    name = "exp_avg_sq" if rule.startswith("Adam") else "sum"
    codes = optimizer.state[param][f"{name}_codes"]
    assert torch.equal(codes == 0, grad == 0) and (codes == 1).any()


def test_converted_second_moments_are_zero_only_if_they_are() -> None:
    ours, theirs = parameter(), parameter()
    full = torch.optim.AdamW([theirs])
    grad = torch.ones(theirs.shape)
    grad[:, ::3] = 1e-6
    grad[:, 1::3] = 0
    train(full, theirs, [grad])
    optimizer = opt8bit.AdamW8bit([ours])
    optimizer.load_state_dict(full.state_dict())
    assert torch.equal(optimizer.state[ours]["exp_avg_sq_codes"] == 0, grad == 0)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_a_gradient_that_is_the_negative_of_what_lies_in_memory(pair: Pair, shape: tuple[int, ...]) -> None:
    results = []
    for kind in pair:
        param = nn.Parameter(torch.ones(shape))
        optimizer = kind([param], lr=0.1)
        for _ in range(2):
            param.grad = None
            (torch.complex(torch.ones(shape), param).conj() * (1 + 2j)).real.sum().backward()
            assert param.grad is not None and param.grad.is_neg()
            optimizer.step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


def test_a_conjugate_is_stepped() -> None:
    results = []
    for kind in PAIRS["SGD"]:
        param = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]).conj())
        param.grad = torch.ones(2, dtype=torch.complex64)
        kind([param], lr=0.1).step()
        results.append(param.detach())
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("fused", [None, False])
def test_autograd_notices_a_step_between_forward_and_backward(pair: Pair, fused: bool | None) -> None:
    model, x = nn.Linear(64, 128), torch.randn(8, 64, requires_grad=True)
    optimizer = pair[0](model.parameters(), lr=0.1, fused=fused)
    first, second = model(x).square().mean(), model(x).sum()
    first.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward()


@pytest.mark.parametrize("start", [1 / 3, 0.1])
def test_a_schedule_may_end_a_rounding_error_below_zero(pair: Pair, start: float) -> None:
    results = []
    for kind in pair:
        param = parameter()
        optimizer = kind([param], lr=1e-3)
        schedule = LinearLR(optimizer, start_factor=start, end_factor=0.0, total_iters=10)
        for grad in gradients(13):
            train(optimizer, param, [grad])
            schedule.step()
        assert -1e-18 < optimizer.param_groups[0]["lr"] < 0
        again = kind([param], lr=1e-3)
        again.load_state_dict(optimizer.state_dict())
        results.append(again.param_groups[0]["lr"])
    assert results[0] == results[1]


def test_a_learning_rate_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="Invalid learning rate: -1e-06"):
        opt8bit.AdamW8bit([parameter()], lr=-1e-6)


@pytest.mark.parametrize("is_strided", [False, True])
def test_groups_that_share_memory_are_stepped_one_after_another(pair: Pair, is_strided: bool) -> None:
    results = []
    for kind in pair:
        weight = torch.ones(64, 64)
        first, second = nn.Parameter(weight), nn.Parameter(weight.t() if is_strided else weight)
        optimizer = kind([{"params": [first]}, {"params": [second]}], lr=0.1)
        for _ in range(3):
            for param in (first, second):
                param.grad = torch.ones(64, 64)
            optimizer.step()
        results.append(weight)
    torch.testing.assert_close(*results)


def test_a_group_is_the_users_own(pair: Pair) -> None:
    model = nn.Linear(8, 8)
    results = []
    for kind in pair:
        groups: list[dict[str, Any]] = [{"params": model.parameters(), "lr": 0.5}]
        optimizer, twin = kind(groups), kind(groups, lr=0.0)
        groups[0]["lr"] = 0.25
        results.append([len(each.param_groups[0]["params"]) for each in (optimizer, twin)])
        assert optimizer.param_groups[0]["lr"] == 0.25 and optimizer.param_groups[0] is groups[0]
    assert results[0] == results[1] == [2, 2]


def test_a_group_that_is_none_is_refused_in_torchs_words(pair: Pair) -> None:
    messages = []
    for kind in pair:
        with pytest.raises(TypeError) as error:
            kind([parameter()]).add_param_group([parameter()])
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.fixture(params=["dtype float64", "dtype bfloat16", "device meta"])
def defaults(request: pytest.FixtureRequest) -> Iterator[None]:
    """Torch's own, which have no say in what states are."""
    if request.param == "device meta":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(getattr(torch, request.param.split()[1]))
    yield
    torch.set_default_device(None)
    torch.set_default_dtype(torch.float32)


MAPS: dict[str, Callable[[], Tensor]] = {
    "dynamic, signed": dynamic_map,
    "dynamic, unsigned": lambda: dynamic_map(False),
    "linear": linear_map,
    "linear, unsigned": lambda: linear_map(False),
    "normal float": normal_float,
}
EXPECTED = {name: make() for name, make in MAPS.items()}
MOVED = opt8bit.AdamW8bit([parameter()])
train(MOVED, MOVED.param_groups[0]["params"][0], gradients(1))


@pytest.mark.parametrize("name", MAPS)
def test_codebooks_are_whatever_torchs_defaults(name: str, defaults: None) -> None:
    found = MAPS[name]()
    assert found.dtype == torch.float32 and torch.equal(found, EXPECTED[name])


@pytest.mark.parametrize("offload", [False, True])
def test_steps_and_state_dicts_are_whatever_torchs_defaults(offload: bool, defaults: None) -> None:
    param = nn.Parameter(MOVED.param_groups[0]["params"][0].detach().clone())
    optimizer = opt8bit.AdamW8bit([param], offload=offload)
    optimizer.load_state_dict(copy.deepcopy(MOVED.state_dict()))
    param.grad = MOVED.param_groups[0]["params"][0].grad
    optimizer.step()
    state = optimizer.state[param]
    assert state["step"].dtype == torch.float32 and state["step"] == 2
    assert state["exp_avg_codes"].dtype == torch.uint8 and state["exp_avg_codes"].device.type == "cpu"
    assert opt8bit.state_error(optimizer).rows[0].max_levels <= 0.5 + 1e-5
    assert opt8bit.optim.to_torch_state_dict(optimizer)["state"][0]["exp_avg"].dtype == torch.float32


def test_bad_flags_and_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="dampening must be a finite number, got None"):
        opt8bit.SGD8bit([parameter()], momentum=0.9, dampening=None)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="decoupled_weight_decay must be True or False, got 'no'"):
        opt8bit.Adam8bit([parameter()], decoupled_weight_decay="no")  # type: ignore[arg-type]
