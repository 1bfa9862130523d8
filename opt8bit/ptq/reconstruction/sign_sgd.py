"""SignSGD, which AutoRound trains with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

from opt8bit.recipe.arguments import check_positive


class SignSGD(torch.optim.Optimizer):
    """Steps by the sign of the gradient, without states: ``p = p - lr * sign(g)``.

    Args:
        params: parameters, or parameter groups, as torch.optim takes them.
        lr: learning rate: how far a step moves each element.

    Raises:
        ValueError: ``lr`` is not a positive number.

    Source: signSGD: Compressed Optimisation for Non-Convex Problems (https://arxiv.org/abs/1802.04434).
    """

    def __init__(self, params: Iterable[Any], lr: float = 5e-3) -> None:
        check_positive("lr", lr)
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.sub_(param.grad.sign(), alpha=group["lr"])
        return loss
