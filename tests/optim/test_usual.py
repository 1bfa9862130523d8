"""A step like the one before it is known by little. Whatever else changes is noticed."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import opt8bit
from opt8bit.optim import lion
from opt8bit.optim.base import Optimizer8bit

Change = Callable[[Optimizer8bit, pytest.MonkeyPatch], Any]


def new_parameter(optimizer: Optimizer8bit) -> None:
    """As Gaussian splatting does when it adds points."""
    params = optimizer.param_groups[0]["params"]
    state = optimizer.state.pop(params[1])
    params[1] = nn.Parameter(params[1].detach() + 1)
    optimizer.state[params[1]] = state


def move_between_groups(optimizer: Optimizer8bit) -> None:
    first, second = (group["params"] for group in optimizer.param_groups)
    second.insert(0, first.pop())


def another_shape(optimizer: Optimizer8bit) -> None:
    param = optimizer.param_groups[0]["params"][0]
    param.data = param.data[:32].clone()
    optimizer.state.pop(param)


def share_memory(optimizer: Optimizer8bit) -> None:
    first, second = (group["params"][0] for group in optimizer.param_groups)
    second.data = first.data


CHANGES: dict[str, Change] = {
    "nothing": lambda optimizer, _: None,
    "lr": lambda optimizer, _: optimizer.param_groups[0].update(lr=0.5),
    "maximize": lambda optimizer, _: optimizer.param_groups[1].update(maximize=True),
    "amsgrad": lambda optimizer, _: optimizer.param_groups[0].update(amsgrad=True),
    "stochastic rounding": lambda optimizer, _: optimizer.param_groups[0].update(stochastic_rounding=True),
    "no kernels": lambda optimizer, _: optimizer.param_groups[0].update(fused=False),
    "another backend": lambda _, patch: patch.setenv("OPT8BIT_BACKEND", "reference"),
    "a new parameter": lambda optimizer, _: new_parameter(optimizer),
    "another shape": lambda optimizer, _: another_shape(optimizer),
    "a parameter in another group": lambda optimizer, _: move_between_groups(optimizer),
    "parameters that share memory": lambda optimizer, _: share_memory(optimizer),
    "a new group": lambda optimizer, _: optimizer.add_param_group({"params": [nn.Parameter(torch.ones(64, 64))]}),
    "a group less": lambda optimizer, _: optimizer.param_groups.pop(),
    "a state in full": lambda optimizer, _: optimizer.state[optimizer.param_groups[0]["params"][0]].update(
        exp_avg=torch.zeros(64, 300)
    ),
    "states in another order": lambda optimizer, _: optimizer.state.update(
        {optimizer.param_groups[0]["params"][0]: optimizer.state.pop(optimizer.param_groups[0]["params"][0])}
    ),
    "something else among the states": lambda optimizer, _: optimizer.state.update({torch.ones(1): {"a": 1}}),
    "a state elsewhere": lambda optimizer, _: optimizer.state[optimizer.param_groups[0]["params"][1]].update(
        step=torch.tensor(7.0)
    ),
}
GRADIENTS: dict[str, Callable[[torch.Tensor], torch.Tensor | None]] = {
    "none": lambda grad: None,
    "not contiguous": lambda grad: grad.t().contiguous().t(),
    "broadcast": lambda grad: grad[:, :1].expand(grad.shape),
    "of a subclass": lambda grad: nn.Parameter(grad, requires_grad=False),
}


def trained(change: Callable[[Optimizer8bit], None], gradient: str | None, *, is_usual: bool) -> list[torch.Tensor]:
    """Parameters and states after steps with a change in between."""
    generator = torch.Generator().manual_seed(0)
    first = [nn.Parameter(torch.randn(64, 300, generator=generator)) for _ in range(2)]
    second = [nn.Parameter(torch.randn(64, 300, generator=generator))]
    optimizer = opt8bit.AdamW8bit([{"params": first}, {"params": second, "lr": 0.1}], lr=0.01)
    for step in range(6):
        if step == 3:
            change(optimizer)
        for number, param in enumerate(param for group in optimizer.param_groups for param in group["params"]):
            grad: torch.Tensor | None = torch.randn(param.shape, generator=generator)
            if step >= 3 and number == 1 and gradient is not None:
                grad = GRADIENTS[gradient](grad)
            param.grad = grad
        if not is_usual:
            optimizer._running.plans.clear()
        optimizer.step()
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [value for param in params for value in (param.detach(), *optimizer.state[param].values())]


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_noticed(change: str, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    results = []
    for is_usual in (False, True):
        with monkeypatch.context() as patch:
            changed = CHANGES[change]
            results.append(trained(lambda optimizer: changed(optimizer, patch), None, is_usual=is_usual))  # noqa: B023
    assert len(results[0]) == len(results[1])
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_every_gradient_is_seen(gradient: str, kernels: str) -> None:
    results = [trained(lambda _: None, gradient, is_usual=is_usual) for is_usual in (False, True)]
    assert all(map(torch.equal, *results))


def test_usual_steps_are_known(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = opt8bit.AdamW8bit([param])
    unusual, original = [], type(optimizer)._update_unusual
    monkeypatch.setattr(type(optimizer), "_update_unusual", lambda self, *args: unusual.append(original(self, *args)))
    for lr in (0.1, 0.1, 0.2, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        param.grad = torch.ones(64, 64)
        optimizer.step()
    assert len(unusual) == 1


def test_a_usual_step_is_seen_by_autograd(kernels: str) -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer = opt8bit.AdamW8bit([param])
    for _ in range(3):
        version, param.grad = param._version, torch.ones(64, 64)
        optimizer.step()
        assert param._version > version and param.requires_grad and param.grad_fn is None


class Unknown8bit(opt8bit.Lion8bit):
    """By a rule that has no kernel, and that cannot maximize."""

    rules = (
        replace(
            lion.RULE,
            name="unknown",
            hyper=tuple(name for name in lion.RULE.hyper if name != "maximize"),
            update=lambda param, *args, **hyper: lion.RULE.update(param, *args, maximize=0.0, **hyper),
        ),
    )


def test_maximize_is_refused_where_a_rule_lacks_it() -> None:
    param = nn.Parameter(torch.ones(64, 64))
    with pytest.raises(ValueError, match="maximize must be False for Unknown8bit, whose rule does not have it, got Tr"):
        Unknown8bit([param], maximize=True)
    optimizer = Unknown8bit([param])
    optimizer.param_groups[0]["maximize"] = True
    param.grad = torch.ones(64, 64)
    with pytest.raises(ValueError, match="maximize must be False for Unknown8bit"):
        optimizer.step()
    assert torch.equal(param, torch.ones(64, 64)) and not optimizer.state


def test_fused_is_refused_where_a_rule_has_no_kernel() -> None:
    param = nn.Parameter(torch.ones(64, 64))
    optimizer: Any = Unknown8bit([param], fused=True)
    param.grad = torch.ones(64, 64)
    with pytest.raises(ValueError, match="fused=True, but no compiled kernels serve unknown for a parameter of torch"):
        optimizer.step()
    assert torch.equal(param, torch.ones(64, 64)) and not optimizer.state
