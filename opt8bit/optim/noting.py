"""Shows the steps of an optimizer to profilers, compilers and hooks."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.autograd import profiler
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

GLOBAL_HOOKS = (_global_optimizer_pre_hooks, _global_optimizer_post_hooks)


def noted_where_seen(func: Callable[..., Any]) -> Callable[..., Any]:
    """Returns ``func``, which is a step, as torch.optim has it: noted by profilers, and with hooks around it.

    Where neither is there it is called alone: noting takes longer than all else in a step of a small parameter.
    """
    noted = Optimizer.profile_hook_step(func)

    @wraps(func)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (noted if is_seen(self) else func)(self, *args, **kwargs)

    return step


def is_seen(optimizer: Optimizer) -> bool:
    """Tells whether a profiler, a compiler or a hook wants to see the steps of an optimizer."""
    own = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    return any(own) or any(GLOBAL_HOOKS) or profiler._is_profiler_enabled or torch.compiler.is_compiling()
