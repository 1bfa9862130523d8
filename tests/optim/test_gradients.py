"""Gradients of another dtype than their parameter, and parameters that have none in some steps."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from cases import CASES, MUON, SHAPE, use
from torch import Tensor, nn

import opt8bit
from opt8bit.optim import plan
from opt8bit.optim.base import Optimizer8bit

PAIRS: dict[str, tuple[torch.dtype, torch.dtype, dict[str, Any]]] = {  # of a parameter, of its gradient, options
    "float32, bfloat16": (torch.float32, torch.bfloat16, {}),
    "float32, float16": (torch.float32, torch.float16, {}),
    "float16, float32": (torch.float16, torch.float32, {}),
    "bfloat16, float32": (torch.bfloat16, torch.float32, {}),
    "bfloat16, float32, stochastic": (torch.bfloat16, torch.float32, {"stochastic_rounding": True, "seed": 3}),
    "bfloat16, float32, compensated": (torch.bfloat16, torch.float32, {"compensation": True}),
    "bfloat16, float16": (torch.bfloat16, torch.float16, {}),
}


def backends_of(optimizer: Optimizer8bit) -> set[str]:
    return {share.backend.name for share in optimizer._running.plans[None]._shares}


def random(seed: int) -> Tensor:
    """Numbers that every dtype holds."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SHAPE, generator=generator).to(torch.bfloat16).float().clamp(-8, 8).mul(16).round().div(16)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("grad_scale", [None, 4.0])
@pytest.mark.parametrize("state_bits", [8, 32])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case not in MUON.values()])
def test_a_gradient_of_another_dtype_has_the_bits_of_one_of_the_same(
    name: str, pair: str, state_bits: int, grad_scale: float | None, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, kernels)
    case, (dtype, grad_dtype, options) = CASES[name], PAIRS[pair]
    results: list[list[Tensor]] = []
    for of_grad in (grad_dtype, dtype):
        param = nn.Parameter(random(0).to(dtype))
        param.grad_dtype = None
        optimizer = case.ours([param], **{**case.hyper, **options, "state_bits": state_bits})
        if grad_scale:
            optimizer.grad_scale = torch.tensor(grad_scale)  # type: ignore[attr-defined]
        for step in range(3):
            param.grad = random(step + 1).to(of_grad)
            optimizer.step()
        results.append([param.detach(), *optimizer.state[param].values()])
        assert kernels == "triton" or backends_of(optimizer) == {kernels}
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_channels_last_and_another_dtype(dtypes: tuple[torch.dtype, torch.dtype], kernels: str) -> None:
    results = []
    for layout in (torch.channels_last, torch.contiguous_format):
        generator = torch.Generator().manual_seed(0)
        start, grad = (torch.randn(8, 64, 3, 3, generator=generator).to(dtype) for dtype in dtypes)
        param = nn.Parameter(start.to(memory_format=layout, copy=True))
        param.grad_dtype = None
        param.grad = grad.to(memory_format=layout)
        opt8bit.AdamW8bit([param], lr=0.1).step()
        results.append(param.detach())
    assert torch.equal(*results) and not torch.equal(results[0], start)


def some_gradients(params: list[nn.Parameter], steps: int) -> Iterator[list[Tensor | None]]:
    """All at first, then other ones in each step, and none in one of them."""
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        chosen = torch.rand(len(params), generator=generator) < (0, 0.5)[step != 4]
        yield [
            torch.randn(param.shape, generator=generator) if step == 0 or is_chosen else None
            for param, is_chosen in zip(params, chosen.tolist(), strict=True)
        ]


@pytest.mark.parametrize("name", ["AdamW8bit weight decay", "LAMB8bit defaults", "Muon8bit defaults"])
def test_parameters_without_a_gradient_stay(name: str, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the others are stepped as each by an optimizer of its own."""
    use(monkeypatch, kernels)
    case = {**CASES, **MUON}[name]
    together, alone = ([nn.Parameter(torch.randn(24, 300, generator=g)) for _ in range(5)] for g in generators())
    optimizer = case.ours([{"params": together[:3]}, {"params": together[3:], "lr": 0.3}], **case.hyper)
    each = [
        case.ours([{"params": [param], **({"lr": 0.3} if i > 2 else {})}], **case.hyper)
        for i, param in enumerate(alone)
    ]
    made = []
    original = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    for grads in some_gradients(together, 9):
        plans, versions = len(made), [param._version for param in together]
        for param, grad in zip(together, grads, strict=True):
            param.grad = grad
        optimizer.step()
        for param, grad, before in zip(together, grads, versions, strict=True):
            assert (param._version > before) == (grad is not None)
        if plans and kernels != "triton":
            assert len(made) == plans
        made_together = len(made)
        for param, grad, mine in zip(alone, grads, each, strict=True):
            param.grad = grad
            mine.step()
        del made[made_together:]
    for param, other, mine in zip(together, alone, each, strict=True):
        assert torch.equal(param, other)
        assert all(map(torch.equal, optimizer.state[param].values(), mine.state[other].values()))


def generators() -> list[torch.Generator]:
    return [torch.Generator().manual_seed(0) for _ in range(2)]


def test_a_parameter_that_gets_its_first_gradient_late(kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When others have none: each new one takes a new plan, and no other step does."""
    params = [nn.Parameter(torch.ones(64, 64)) for _ in range(4)]
    optimizer, made = opt8bit.AdamW8bit(params, lr=0.5, weight_decay=0.0), []
    original = plan.Plan.__init__
    monkeypatch.setattr(plan.Plan, "__init__", lambda self, *args: made.append(self) or original(self, *args))
    for chosen in ([0], [1], [2], [0], [1, 2], [0], [3], [1], [0, 3]):
        for i, param in enumerate(params):
            param.grad = torch.ones(64, 64) if i in chosen else None
        optimizer.step()
    assert len(made) == 4
    counts = [optimizer.state[param]["step"].item() for param in params]
    assert counts == [4, 3, 2, 2]
    for param, count in zip(params, counts, strict=True):
        torch.testing.assert_close(param.detach(), torch.full((64, 64), 1 - 0.5 * count))
