"""Gradients that are not finite, and the scaling of gradients that finds them."""

import math
from typing import Any

import pytest
import torch
from cases import ANY_SHAPE, MUON, STATEFUL, Case, gradients, parameter, rule_of, train, use
from torch import nn

import opt8bit
from opt8bit.optim.ruled import RULES

ELEMENTWISE = [name for name, case in ANY_SHAPE.items() if not RULES[rule_of(case)].whole]


@pytest.mark.sampled(7)
@pytest.mark.slow_interpreted
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_neighbours_stay_right(
    name: str, value: float, bits: int, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this step and in every later one: as if the element had had another gradient, small and finite."""
    use(monkeypatch, backend)
    case, spot = ANY_SHAPE[name], (3, 40)
    params = [parameter(), parameter()]
    optimizers = [case.ours([param], state_bits=bits, **case.hyper) for param in params]
    others = torch.ones(params[0].shape, dtype=torch.bool)
    others[spot] = False
    for number, grad in enumerate(gradients(6)):
        grad[spot] = 0
        for param, optimizer, spoilt in zip(params, optimizers, (True, False), strict=True):
            with torch.no_grad():
                param[spot] = 0  # as its decay is part of some gradients
            mine = grad.clone()
            if spoilt and number == 2:
                mine[spot] = value
            train(optimizer, param, [mine])
        assert torch.equal(params[0][others], params[1][others])


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_the_element_itself_becomes_what_the_oracle_makes_of_it(name: str, value: float) -> None:
    case, spot = ANY_SHAPE[name], (3, 40)
    ours, theirs = parameter(), parameter()
    grad = gradients(1)[0]
    grad[spot] = value
    train(case.ours([ours], **case.hyper), ours, [grad])
    train(case.oracle([theirs], **case.hyper), theirs, [grad])
    torch.testing.assert_close(ours[spot], theirs[spot], rtol=1e-5, atol=0, equal_nan=True)
    assert torch.equal(ours.isfinite(), theirs.isfinite())


def skip_without_kernels(case: Case, backend: str, fused: bool | None) -> None:
    if fused and (case in MUON.values() or backend == "reference"):
        pytest.skip("fused=True takes compiled kernels of the rule")


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.slow_interpreted
def test_grad_scaler_hands_its_scale_over_or_unscales(
    stateful: Case, fused: bool | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_kernels(stateful, backend, fused)
    use(monkeypatch, backend)
    ours, plain = parameter(), parameter()
    mine = stateful.ours([ours], fused=fused, **stateful.hyper)
    unscaled = stateful.ours([plain], **stateful.hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2)
    x = torch.randn(7, 32)
    for _ in range(5):
        for param, optimizer, scale in ((ours, mine, True), (plain, unscaled, False)):
            optimizer.zero_grad()
            loss = (x @ param).square().mean()
            (scaler.scale(loss) if scale else loss).backward()
        scaler.step(mine)
        assert ours.grad is not None and plain.grad is not None
        assert torch.equal(ours.grad, plain.grad * (scaler.get_scale() if fused else 1))
        scaler.update()
        unscaled.step()
    assert scaler.get_scale() > 1024
    assert torch.equal(ours, plain)  # the scale is a power of two


@pytest.mark.sampled(7)
@pytest.mark.parametrize("fused", [None, True])
def test_grad_scaler_skips_a_step_with_infinities(
    stateful: Case, fused: bool | None, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    skip_without_kernels(stateful, backend, fused)
    use(monkeypatch, backend)
    param = parameter()
    optimizer = stateful.ours([param], fused=fused, **stateful.hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    (scaler.scale(param.square().sum())).backward()
    scaler.step(optimizer)
    scaler.update()
    before = param.detach().clone(), {name: value.clone() for name, value in optimizer.state[param].items()}
    assert param.grad is not None
    param.grad[1, 1] = math.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(param, before[0]) and scaler.get_scale() == 512
    assert all(torch.equal(value, before[1][name]) for name, value in optimizer.state[param].items())


def test_gradients_unscaled_by_the_user_are_not_unscaled_again(stateful: Case) -> None:
    ours, plain = parameter(), parameter()
    mine, unscaled = stateful.ours([ours], **stateful.hyper), stateful.ours([plain], **stateful.hyper)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(ours.square().sum()).backward()
    plain.square().sum().backward()
    scaler.unscale_(mine)
    nn.utils.clip_grad_norm_([ours], 1.0)
    nn.utils.clip_grad_norm_([plain], 1.0)
    scaler.step(mine)
    unscaled.step()
    assert torch.equal(ours, plain)


def test_unscaling_is_left_to_the_step_if_every_group_says_so() -> None:
    """As torch.optim says it: what clips between the two takes optimizers only that leave it to the scaler."""
    for fused, expected in (((True, True), True), ((True, None), False), ((None, None), False), ((False, True), False)):
        groups = [{"params": [parameter()], "fused": value} for value in fused]
        assert opt8bit.AdamW8bit(groups)._step_supports_amp_scaling is expected
    optimizer = opt8bit.AdamW8bit([parameter()])
    optimizer.param_groups[0]["fused"] = True
    assert optimizer._step_supports_amp_scaling is True


def test_zero_gradients_never_move_a_parameter() -> None:
    """In 1,000 steps, whatever the neighbours do. Bins of equal width would code an exact 0 as a small number."""
    for case in STATEFUL.values():
        if case in MUON.values():  # which mixes the elements of a matrix
            continue
        param = parameter(shape=(16, 512))
        before = param.detach().clone()
        optimizer = case.ours([param], **{**case.hyper, "weight_decay": 0.0})
        grads = gradients(10, (16, 512))
        for step in range(1000):
            grad = grads[step % 10] * (1 + step % 7)
            grad[:, ::3] = 0
            if step == 500:
                grad[5, 5 - 5 % 3 + 1] = math.nan
            train(optimizer, param, [grad])
        if case.ours not in (opt8bit.LAMB8bit, opt8bit.LARS8bit):  # whose norms see the NaN
            assert torch.equal(param[:, ::3], before[:, ::3]), case.ours
            assert not torch.equal(param[:, 1::3], before[:, 1::3])


def test_grad_scaler_with_nothing_to_step(stateful: Case) -> None:
    param = parameter()
    optimizer: Any = stateful.ours([param], **stateful.hyper)
    optimizer.found_inf, optimizer.grad_scale = 0, None  # as a scaler without gradients leaves them
    optimizer.step()
    assert not optimizer.state
