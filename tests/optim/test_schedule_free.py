"""Schedule-free AdamW: its modes, and what they make of parameters, states and checkpoints."""

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import gradients, parameter, schedule_free, train, use
from torch import nn

import opt8bit


def test_modes_are_those_of_the_package() -> None:
    """With 32-bit states, through steps, both modes and a change of the learning rate."""
    package = pytest.importorskip("schedulefree")
    ours, theirs = parameter(), parameter()
    hyper: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "warmup_steps": 4, "r": 0.5}
    mine = opt8bit.AdamWScheduleFree8bit([ours], state_bits=32, **hyper)
    reference = package.AdamWScheduleFree([theirs], **hyper)
    for part in range(3):
        for optimizer, param in ((mine, ours), (reference, theirs)):
            optimizer.train()
            optimizer.param_groups[0]["lr"] = 0.01 / (part + 1)
            train(optimizer, param, [grad.clone() for grad in gradients(3, seed=part)])
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        mine.eval()
        reference.eval()
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    for name in ("k", "weight_sum", "lr_max"):
        assert mine.param_groups[0][name] == pytest.approx(reference.param_groups[0][name])


@pytest.mark.parametrize("bits", [8, 32])
def test_in_eval_mode_a_parameter_is_the_average_of_z(bits: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights are equal, as lr is. That z is not coded shows in how exact that is."""
    use(monkeypatch, backend)
    param = parameter()
    optimizer = opt8bit.AdamWScheduleFree8bit([param], lr=0.01, state_bits=bits)
    optimizer.train()
    points = []
    for grad in gradients(6):
        train(optimizer, param, [grad])
        points.append(optimizer.state[param]["z"].double())
    y = param.detach().clone()
    optimizer.eval()
    torch.testing.assert_close(param.double(), torch.stack(points).mean(0), rtol=1e-5, atol=1e-6)
    optimizer.train()
    torch.testing.assert_close(param.detach(), y, rtol=1e-6, atol=1e-6)
    assert ("exp_avg_sq_codes" in optimizer.state[param]) == (bits == 8)
    assert optimizer.state[param]["z"].dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"offload": True}, {"compensation": True}])
def test_modes_go_round_with_every_option(options: dict[str, Any]) -> None:
    dtype = torch.bfloat16 if "compensation" in options else torch.float32
    param, plain = parameter(dtype=dtype), nn.Parameter(parameter(dtype=dtype).detach().float())
    optimizer, exact = schedule_free([param], **options), schedule_free([plain])
    for grad in gradients(4):
        grad = grad.to(dtype)
        train(optimizer, param, [grad])
        train(exact, plain, [grad])
        for each in (optimizer, exact):
            each.eval()
        torch.testing.assert_close(param.float(), plain, rtol=2**-8 if options.get("compensation") else 0, atol=0)
        for each in (optimizer, exact):
            each.train()
    assert torch.equal(optimizer.state[param]["z"], exact.state[plain]["z"])


def test_a_step_in_eval_mode_is_refused_and_changes_nothing() -> None:
    param = parameter()
    optimizer = opt8bit.AdamWScheduleFree8bit([param])
    before = param.detach().clone()
    with pytest.raises(RuntimeError, match=r"is in eval mode: call optimizer.train\(\) before training"):
        train(optimizer, param, gradients(1))
    assert torch.equal(param, before) and not optimizer.state and optimizer.param_groups[0]["k"] == 0


def test_a_step_that_fails_is_not_counted() -> None:
    param = parameter()
    optimizer = schedule_free([param])
    train(optimizer, param, gradients(1))
    before = {name: optimizer.param_groups[0][name] for name in ("k", "weight_sum", "lr_max")}
    param.grad = torch.ones(param.shape).to_sparse()
    with pytest.raises(RuntimeError, match="gradients must be dense"):
        optimizer.step()
    assert {name: optimizer.param_groups[0][name] for name in before} == before


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state dict"])
def test_checkpoints_carry_the_mode_and_go_on_bit_for_bit(way: str, train_mode: bool) -> None:
    param = parameter()
    optimizer = schedule_free([param], warmup_steps=3)
    train(optimizer, param, gradients(2))
    if not train_mode:
        optimizer.eval()
    if way == "state dict":
        other_param = nn.Parameter(param.detach().clone())
        other = opt8bit.AdamWScheduleFree8bit([other_param])
        other.load_state_dict(optimizer.state_dict())
    else:
        both = (optimizer, param)
        other, other_param = copy.deepcopy(both) if way == "deepcopy" else pickle.loads(pickle.dumps(both))
    assert other.param_groups[0]["train_mode"] is train_mode
    for each, its in ((optimizer, param), (other, other_param)):
        each.train()
        train(each, its, gradients(2, seed=5))
        each.eval()
    assert torch.equal(param, other_param)
    assert all(torch.equal(value, other.state[other_param][name]) for name, value in optimizer.state[param].items())


def test_states_are_reported_as_they_are() -> None:
    param = parameter(shape=(64, 256))
    optimizer = schedule_free([param])
    train(optimizer, param, gradients(2, (64, 256)))
    (row,) = opt8bit.memory_report(optimizer).rows
    assert row.state_bytes == 64 * 256 * 5 + 64 * 4 + 4
    assert [each.state for each in opt8bit.state_error(optimizer).rows] == ["exp_avg_sq"]
    exact = schedule_free([nn.Parameter(param.detach().clone())], state_bits=32)
    assert "z" in optimizer.dequantized_state(param) and exact.state == {}


@pytest.mark.parametrize(
    ("hyper", "message"),
    [
        ({"betas": (0.0, 0.9)}, r"betas\[0\] must be above 0"),
        ({"warmup_steps": -1}, "Invalid warmup_steps value: -1"),
        ({"offload": "backward"}, "offload='backward' steps before the step's weight is known"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
        ({"lr": "a"}, "lr must be a finite number, got 'a'"),
        ({"eps": None}, "eps must be a finite number, got None"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number, got inf"),
        ({"warmup_steps": "a"}, "warmup_steps must be a finite number, got 'a'"),
        ({"warmup_steps": float("inf")}, "warmup_steps must be a finite number, got inf"),
        ({"weight_lr_power": None}, "weight_lr_power must be a finite number, got None"),
        ({"r": True}, "r must be a finite number, got True"),
    ],
)
def test_bad_arguments_are_refused(hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opt8bit.AdamWScheduleFree8bit([parameter()], **hyper)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"k": -5}, "Invalid k value: -5"),
        ({"weight_sum": -3.0}, r"Invalid weight_sum value: -3\.0"),
        ({"k": "a"}, "k must be a finite number, got 'a'"),
        ({"lr_max": None}, "lr_max must be a finite number, got None"),
        ({"beta1_of_y": "a"}, "beta1_of_y must be a finite number, got 'a'"),
    ],
)
def test_bad_entries_of_groups_are_refused(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opt8bit.AdamWScheduleFree8bit([{"params": [parameter()], **entry}])


@pytest.mark.parametrize("is_loaded", [False, True])
def test_beta1_changes_in_eval_mode_only(is_loaded: bool) -> None:
    """The average survives a change that is refused, and one in eval mode."""
    param = parameter()
    optimizer = schedule_free([param], lr=0.01)
    points = []
    for grad in gradients(4):
        train(optimizer, param, [grad])
        points.append(optimizer.state[param]["z"].double())
    before, running = param.detach().clone(), dict(optimizer.param_groups[0])
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    if is_loaded:
        saved, optimizer = optimizer.state_dict(), opt8bit.AdamWScheduleFree8bit([param])
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match=r"betas\[0\] must not change in train mode, from 0\.9 to 0\.8"):
        train(optimizer, param, gradients(1))
    assert torch.equal(param, before) and optimizer.param_groups[0]["k"] == running["k"]
    for switch in (optimizer.eval, optimizer.train):
        switch()
    for grad in gradients(4, seed=1):
        train(optimizer, param, [grad])
        points.append(optimizer.state[param]["z"].double())
    optimizer.eval()
    torch.testing.assert_close(param.double(), torch.stack(points).mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cycle_momentum", [True, False])
def test_one_cycle_leaves_the_momentum_alone_or_is_refused(cycle_momentum: bool) -> None:
    param = parameter()
    optimizer = schedule_free([param])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=4, cycle_momentum=cycle_momentum)
    if cycle_momentum:
        with pytest.raises(ValueError, match="OneCycleLR and CyclicLR take cycle_momentum=False"):
            train(optimizer, param, gradients(1))
    else:
        train(optimizer, param, gradients(1))
        schedule.step()
        train(optimizer, param, gradients(1))


def test_groups_that_begin_in_train_mode_are_stepped() -> None:
    param = parameter()
    optimizer = opt8bit.AdamWScheduleFree8bit([{"params": [param], "train_mode": True}])
    train(optimizer, param, gradients(1))
    optimizer.param_groups[0]["betas"] = (0.8, 0.999)
    with pytest.raises(ValueError, match=r"from 0\.9 to 0\.8"):
        train(optimizer, param, gradients(1))
