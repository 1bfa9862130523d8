"""States and steps on the CPU, whatever the parameters are on; where there is no GPU the CPU stands for both sides."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

import opt8bit
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.offload import target
from opt8bit.optim.states import initialized

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES: list[tuple[Any, torch.dtype, dict[str, Any]]] = [
    (opt8bit.AdamW8bit, torch.float32, {"lr": 1e-2}),
    (opt8bit.SGD8bit, torch.float32, {"lr": 1e-2, "momentum": 0.9}),
    (opt8bit.LAMB8bit, torch.float32, {"lr": 1e-2}),
    (opt8bit.AdamW8bit, torch.bfloat16, {"lr": 1e-3, "stochastic_rounding": True}),
    (opt8bit.AdamW8bit, torch.bfloat16, {"lr": 1e-3, "compensation": True}),
]


def network(dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64)).to(device, dtype)


def backward(model: nn.Module, number: int) -> None:
    param = next(model.parameters())
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(number)).to(param)
    model(x).float().square().mean().backward()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for number in range(steps):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
        scheduler.step()


def assert_same(model: nn.Module, optimizer: Optimizer8bit, other: nn.Module, expected: Optimizer8bit) -> None:
    for param, reference in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(param.cpu(), reference.cpu())
        state, wanted = optimizer.state[param], expected.state[reference]
        assert state.keys() == wanted.keys()
        assert all(torch.equal(value.cpu(), wanted[name].cpu()) for name, value in state.items())


@pytest.mark.parametrize("offload", [True, "backward"])
@pytest.mark.parametrize(("kind", "dtype", "options"), CASES)
def test_the_same_bits_as_on_the_cpu(kind: Any, dtype: torch.dtype, options: dict[str, Any], offload: Any) -> None:
    if DEVICE != "cpu":
        pytest.skip("gradients have other bits on a GPU")
    models = [network(dtype), network(dtype)]
    optimizers = [
        kind(model.parameters(), **options, offload=where)
        for model, where in zip(models, (offload, False), strict=True)
    ]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    assert_same(models[0], optimizers[0], models[1], optimizers[1])


@pytest.mark.parametrize("offload", [True, "backward"])
def test_states_are_on_the_cpu_and_parameters_where_they_were(offload: Any) -> None:
    model = network(device=DEVICE)
    before = copy.deepcopy(list(model.parameters()))
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=offload)
    train(model, optimizer)
    for param, old in zip(model.parameters(), before, strict=True):
        assert param.device.type == DEVICE and not torch.equal(param, old)
        assert all(value.device.type == "cpu" for value in optimizer.state[param].values())
        assert optimizer.state[param]["step"] == 4


def test_a_changed_gradient_and_a_changed_parameter_count() -> None:
    models = [network(), network()]
    for model, offload in zip(models, (True, False), strict=True):
        optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=offload)
        for number in range(3):
            for part in range(2):
                backward(model, 2 * number + part)
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            for param in model.parameters():
                param.data.mul_(0.9)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_beside_the_backward_pass_parameters_wait_for_the_step() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    before = copy.deepcopy(list(model.parameters()))
    backward(model, 0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}


def test_beside_the_backward_pass_a_second_one_is_refused() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"each step, but a parameter of shape \(64,\) has got a second"):
        backward(model, 1)
    with pytest.raises(RuntimeError, match="with a gradient that was changed afterwards: accumulated"):
        optimizer.step()
    optimizer.zero_grad()
    backward(model, 2)
    optimizer.step()


def test_beside_the_backward_pass_gradients_are_final() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    backward(model, 0)
    nn.utils.clip_grad_norm_(model.parameters(), 1e-6)
    with pytest.raises(RuntimeError, match="with a gradient that was changed afterwards: accumulated, clipped"):
        optimizer.step()


def test_beside_the_backward_pass_bad_options_are_refused_at_once() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    optimizer.param_groups[0]["lr"] = -1.0
    with pytest.raises(ValueError, match=r"Invalid learning rate: -1.0"):
        backward(model, 0)
    assert not optimizer.state


@pytest.mark.parametrize("unscale", [False, True])
def test_beside_the_backward_pass_a_scaler_comes_too_late(unscale: bool) -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(model(torch.ones(8, 64, device=DEVICE)).mean()).backward()
    if unscale:
        scaler.unscale_(optimizer)
        optimizer.zero_grad()  # so that the change does not show
    with pytest.raises(RuntimeError, match="offload='backward' has stepped before GradScaler could unscale"):
        scaler.step(optimizer)


def test_beside_the_backward_pass_gradients_may_be_let_go_at_once() -> None:
    models = [network(), network()]
    optimizers = [
        opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=where)
        for model, where in zip(models, ("backward", False), strict=True)
    ]
    for param in models[0].parameters():
        param.register_post_accumulate_grad_hook(lambda param: setattr(param, "grad", None))
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    assert_same(models[0], optimizers[0], models[1], optimizers[1])


def test_beside_the_backward_pass_a_state_dict_is_that_of_whole_steps() -> None:
    model = network()
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    train(model, optimizer)
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    backward(model, 0)
    assert all(state["step"] == 5 for state in optimizer.state_dict()["state"].values())
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)  # rolls back what the pass has begun
    optimizer.zero_grad()
    optimizer.step()
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(state["step"] == 4 for state in optimizer.state.values())


def test_beside_the_backward_pass_a_refused_state_dict_changes_nothing() -> None:
    models, steps = [network(), network()], []
    for model, is_tried in zip(models, (True, False), strict=True):
        optimizer = opt8bit.AdamW8bit(model.parameters(), offload="backward")
        for number in range(2):
            backward(model, number)
            if is_tried and number == 1:
                with pytest.raises(ValueError, match="state 'step' must be"):
                    optimizer.load_state_dict({**optimizer.state_dict(), "state": {0: {"step": "no"}}})
            optimizer.step()
            optimizer.zero_grad()
        steps.append([state["step"].item() for state in optimizer.state.values()])
    assert steps[0] == steps[1]
    for ours, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(ours, other)


def test_beside_the_backward_pass_a_parameter_may_be_unfrozen() -> None:
    model = network()
    first = next(model.parameters()).requires_grad_(False)
    optimizer = opt8bit.AdamW8bit(model.parameters(), offload="backward")
    train(model, optimizer, 1)
    assert first not in optimizer.state
    first.requires_grad_(True)
    optimizer.step()
    optimizer.zero_grad()
    backward(model, 1)
    assert first in optimizer._running.backward._begun
    optimizer.step()
    assert optimizer.state[first]["step"] == 1


def test_hooks_are_there_whenever_they_are_asked_for() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=True)
    optimizer.param_groups[0]["offload"] = "backward"
    copied_model, copied = copy.deepcopy((model, optimizer))
    for of, each in ((model, optimizer), (copied_model, copied)):
        each.step()  # from here on
        backward(of, 0)
        assert len(each._running.backward.finish(is_scaled=False)) == 4


def test_parameters_that_are_gone_are_let_go() -> None:
    model, other = network(device=DEVICE), network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    train(model, optimizer)
    optimizer.param_groups[0]["params"] = list(other.parameters())[:2]
    backward(model, 0)  # whose parameters are nobody's now
    backward(other, 0)
    optimizer.step()
    assert set(optimizer._running.hosts._hosts) == set(list(other.parameters())[:2])


def test_gradients_keep_their_dtype() -> None:
    values = torch.randn(64, 256).to(torch.bfloat16)
    results = []
    for offload in (False, True):
        param = nn.Parameter(values.clone())
        if not hasattr(param, "grad_dtype"):
            pytest.skip("gradients have their parameter's dtype in this torch")
        param.grad_dtype = torch.float32
        param.grad = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
        optimizer = opt8bit.AdamW8bit([param], lr=1e-2, offload=offload)
        optimizer.step()
        results.append((param.detach(), *optimizer.state[param].values()))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_scaler_skips_a_step_on_the_cpu() -> None:
    model = network(device=DEVICE)
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=True)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
    before = copy.deepcopy(list(model.parameters()))
    for value in (torch.inf, 1.0):
        optimizer.zero_grad()
        scaler.scale(model(torch.full((8, 64), value, device=DEVICE)).mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        is_unchanged = all(torch.equal(a, b) for a, b in zip(model.parameters(), before, strict=True))
        assert is_unchanged == (value == torch.inf)


@pytest.mark.parametrize("offload", [True, "backward"])
def test_a_state_dict_goes_on_anywhere(offload: Any) -> None:
    model = network()
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=offload)
    train(model, optimizer)
    for where in (True, "backward", False):
        other = copy.deepcopy(model)
        resumed = opt8bit.AdamW8bit(other.parameters(), lr=1e-2, offload=where)
        resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert resumed.param_groups[0]["offload"] == where
        assert_same(other, resumed, model, optimizer)
        reference = copy.deepcopy(model)
        expected = opt8bit.AdamW8bit(reference.parameters(), lr=1e-2)
        expected.load_state_dict(optimizer.state_dict())
        train(other, resumed)
        train(reference, expected)
        assert_same(other, resumed, reference, expected)


def moved(state: dict[str, Any], device: str) -> dict[str, Any]:
    """As Lightning moves states to the parameters' device after it has loaded them."""
    return {name: value if name == "step" else value.to(device, copy=True) for name, value in state.items()}


def test_states_that_someone_has_moved_go_on() -> None:
    models = [network(device=DEVICE), network(device=DEVICE)]
    optimizers = [opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload=True) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
        for state in optimizer.state.values() if optimizer is optimizers[0] else ():
            state.update(moved(state, DEVICE))
        train(model, optimizer)
        assert all(value.device.type == "cpu" for state in optimizer.state.values() for value in state.values())
    assert_same(models[0], optimizers[0], models[1], optimizers[1])


@pytest.mark.parametrize("offload", [True, False])
@pytest.mark.parametrize("bits", [8, 32])
def test_only_offloaded_states_come_back_to_the_cpu(bits: int, offload: bool) -> None:
    """With a GPU that is not there, and tensors without elements in memory."""
    param = nn.Parameter(torch.ones(64, 256))
    optimizer = opt8bit.AdamW8bit([param], lr=1e-2, state_bits=bits, offload=offload)
    (group,) = optimizer.param_groups
    rule = optimizer.rule(group)
    with FakeTensorMode():
        made = initialized("parameter 0", {}, rule, target(param, group), group, bits == 8, {})
        assert {value.device.type for value in made.values()} == {"cpu"}
        found = initialized("parameter 0", moved(made, "cuda:0"), rule, target(param, group), group, bits == 8, {})
    assert found.keys() == made.keys()
    devices = {value.device.type for name, value in found.items() if name != "step"}
    assert devices == {"cpu" if offload else "cuda"}


def test_an_optimizer_is_let_go_and_copied() -> None:
    model = network()
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2, offload="backward")
    train(model, optimizer)
    copied = copy.deepcopy(optimizer)
    assert copied.param_groups[0]["offload"] == "backward" and len(copied.state) == 4
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None
    backward(model, 0)  # whose hooks find nobody


def test_an_optimizer_that_is_gone_leaves_no_hooks() -> None:
    model = nn.Linear(64, 64)
    opt8bit.memory_report(model, offload="backward")
    gc.collect()
    assert not model.weight._post_accumulate_grad_hooks


def test_what_cannot_be_offloaded_is_refused() -> None:
    values = torch.zeros(64, 256)
    with pytest.raises(ValueError, match="memory of their own: 2 share theirs"):
        opt8bit.AdamW8bit([nn.Parameter(values), nn.Parameter(values[:32])], offload=True)
    with pytest.raises(ValueError, match="memory of their own: 2 share theirs"):
        opt8bit.AdamW8bit([{"params": [nn.Parameter(of)]} for of in (values, values[:32])], offload=True)
    with pytest.raises(ValueError, match="offload must be True, False or 'backward', got 'cpu'"):
        opt8bit.AdamW8bit([nn.Parameter(values)], offload="cpu")
    param = nn.Parameter(values)
    optimizer = opt8bit.AdamW8bit([param], offload=True)
    param.grad = torch.zeros(64, 256).to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()
    assert not optimizer.state
