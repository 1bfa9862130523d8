"""Parameters without a gradient in a step, such as those of experts without a token, which stay in its plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from opt8bit.backends import backend_for

PLAIN = {Tensor, nn.Parameter}  # types that are no subclass with ways of its own
Grads = Sequence["Tensor | None"]


def held(params: Sequence[Tensor], grads: Grads, state: Mapping[Tensor, Any]) -> list[int]:
    """Returns the places of parameters that stay in a plan: they have states, and no gradient now.

    A step leaves them as they are. A plan for each set of parameters with a gradient would take longer than the steps.
    """
    return [
        i
        for i, (param, grad) in enumerate(zip(params, grads, strict=True))
        if grad is None and type(param) in PLAIN and param in state and backend_for(param.device).can_skip()
    ]


def absent(grads: Grads) -> list[int]:
    """Returns the places where there is no gradient."""
    if type(None) not in set(map(type, grads)):
        return []
    return [i for i, grad in enumerate(grads) if grad is None]


def with_gradient(params: Sequence[Tensor], grads: Grads) -> list[Tensor]:
    """Returns those of some parameters that have a gradient."""
    missing = {*absent(grads)}
    return [param for i, param in enumerate(params) if i not in missing] if missing else [*params]


def with_stand_ins(params: Iterable[Tensor], grads: Grads) -> list[Tensor]:
    """Returns gradients, and the parameter where there is none."""
    return [param if grad is None else grad for param, grad in zip(params, grads, strict=True)]
