"""torch.compile of a training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import opt8bit

pytestmark = pytest.mark.filterwarnings("ignore")  # what torch.compile warns of is its own


def trained(wrap: Callable[[Callable[[Tensor], Tensor]], Callable[[Tensor], Tensor]]) -> tuple[nn.Module, list[float]]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    optimizer = opt8bit.AdamW8bit(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    wrapped, losses = wrap(step), []
    for _ in range(4):
        losses.append(wrapped(torch.ones(8, 64)).item())
        scheduler.step()
    return model, losses


def test_a_compiled_training_step_is_the_same() -> None:
    model, losses = trained(lambda step: step)
    compiled, found = trained(lambda step: torch.compile(step, backend="eager"))
    assert found == losses and losses[-1] < losses[0]
    assert all(torch.equal(a, b) for a, b in zip(compiled.parameters(), model.parameters(), strict=True))


def test_a_graph_breaks_at_the_step_and_nowhere_in_it() -> None:
    torch._dynamo.reset()
    param = nn.Parameter(torch.ones(64, 256))
    optimizer = opt8bit.AdamW8bit([param], lr=1e-2)
    param.grad = torch.ones(64, 256)

    def step(x: Tensor) -> Tensor:
        x = x * 2
        optimizer.step()
        return x + 1

    explained = torch._dynamo.explain(step)(torch.ones(3))
    assert (explained.graph_count, explained.graph_break_count) == (2, 1), explained.break_reasons
    assert optimizer.state[param]["step"] == 1
