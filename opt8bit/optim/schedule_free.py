"""Schedule-free AdamW: its rule and its class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import COMPENSATION, Rule
from opt8bit.backends.rounding import compensated, set_compensated
from opt8bit.optim import shards
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.offload import BACKWARD
from opt8bit.optim.options import Options, check_betas, check_finite, check_flags, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adamw_schedule_free(
    param: Tensor,  # y of the paper, at which the gradient is taken
    grad: Tensor,
    z: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    scheduled_lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    averaging: float,
    k: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of schedule-free AdamW. All tensors have one shape.

    The average x is nowhere: y = (1 - beta1) * z + beta1 * x holds before and after, and moves as x and z do.

    Source: The Road Less Scheduled (Defazio et al., 2024), algorithm 1, as its authors' code has it.
    """
    grad = -grad if maximize else grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    direction = grad / ((exp_avg_sq / (1 - beta2**k)).sqrt() + eps)
    if weight_decay:
        direction = direction + weight_decay * param
    param = param.lerp(z, averaging) + scheduled_lr * (beta1 * (1 - averaging) - 1) * direction
    return param, z - scheduled_lr * direction, exp_avg_sq


HYPER = ("scheduled_lr", "beta1", "beta2", "eps", "weight_decay", "averaging", "k", "maximize")
RULE = Rule("adamw_schedule_free", {"z": True, "exp_avg_sq": False}, HYPER, adamw_schedule_free, iterates=("z",))
RUNNING = {  # of a group, as they begin
    **{"k": 0, "scheduled_lr": 0.0, "lr_max": 0.0, "weight_sum": 0.0, "averaging": 0.0},
    "beta1_of_y": 0.0,  # that y has been computed with, once it has been
}


def advanced(group: Mapping[str, Any]) -> dict[str, float]:
    """Returns what RUNNING names as it is in the next step of a group.

    ``k`` counts its steps. ``averaging`` is the weight of z in the new average: the step's weight over the sum of all
    weights. That of a step is k^r times a power of the largest learning rate so far.
    """
    k = group["k"] + 1
    lr = float(group["lr"]) * min(1.0, k / max(group["warmup_steps"], 1))
    lr_max = max(lr, group["lr_max"])
    weight = k ** group["r"] * lr_max ** group["weight_lr_power"]
    weight_sum = group["weight_sum"] + weight
    averaging = weight / weight_sum if weight_sum else 0.0
    return {
        **{"k": k, "scheduled_lr": lr, "lr_max": lr_max, "weight_sum": weight_sum, "averaging": averaging},
        "beta1_of_y": _beta1_of_y(group),
    }


def _beta1_of_y(group: Mapping[str, Any]) -> float:
    return group["beta1_of_y"] or float(group["betas"][0])


class AdamWScheduleFree8bit(Optimizer8bit):
    """Implements ``schedulefree.AdamWScheduleFree`` with an 8-bit second moment, at 5 bytes a parameter.

    It takes no schedule of learning rates. A model is evaluated at the average x of the points z that AdamW moves.
    Gradients are taken between the two, at y. With ``g`` the gradient at y and c the weight of the newest z::

        v = beta2 * v + (1 - beta2) * g * g,  d = g / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * y
        z = z - lr * d,  x = (1 - c) * x + c * z,  y = (1 - beta1) * z + beta1 * x

    ``z`` is stored exactly, as a sum of many small steps: 4 bytes a parameter. ``v`` is coded in 8 bits. The parameter
    is y in train mode and x in eval mode. The optimizer begins in eval mode and steps in train mode: call
    :meth:`train` before training, and :meth:`eval` before the model is evaluated or saved. A checkpoint has the mode.
    In bfloat16 each change of the mode rounds, unless there is ``compensation``.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: part of x in y, in (0, 1), and decay rate of v, in [0, 1). The first changes in eval mode only.
        eps: added to the denominator.
        weight_decay: decay per step, in units of lr, computed at y.
        warmup_steps: steps over which lr rises linearly.
        r: power of the step's number in its weight.
        weight_lr_power: power of the largest lr so far in a step's weight.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range, or ``offload="backward"``, which steps before :meth:`step`.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; The Road Less Scheduled, arXiv 2405.15682.
    """

    rules = (RULE,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.0025,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        warmup_steps: int = 0,
        r: float = 0.0,
        weight_lr_power: float = 2.0,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "r": r,
            "weight_lr_power": weight_lr_power,
            "train_mode": False,
            **RUNNING,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "train_mode")
        names = ("lr", "eps", "weight_decay", "warmup_steps", "r", "weight_lr_power", *RUNNING)
        check_finite(group, *names)
        check_not_negative(**{name: group[name] for name in names})
        check_betas(group["betas"])
        if group["betas"][0] == 0:
            raise ValueError("betas[0] must be above 0, as the average cannot be told from y and z otherwise, got 0")
        if group["offload"] == BACKWARD:
            raise ValueError(f"offload={BACKWARD!r} steps before the step's weight is known: use offload=True")

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates every parameter that has a gradient, as :meth:`Optimizer8bit.step` does.

        Raises:
            RuntimeError: the optimizer is in eval mode. Nothing has been updated then.
            ValueError: ``betas[0]`` has changed in train mode. Nothing has been updated then.
        """
        if not all(group["train_mode"] for group in self.param_groups):
            raise RuntimeError(
                f"{type(self).__name__} is in eval mode: call optimizer.train() before training, and optimizer.eval() "
                "before the model is evaluated or saved"
            )
        for group in self.param_groups:
            _check_beta1(group)
        before = [{name: group[name] for name in RUNNING} for group in self.param_groups]
        for group in self.param_groups:
            group.update(advanced(group))
        try:
            return super().step(closure)
        except BaseException:
            for group, running in zip(self.param_groups, before, strict=True):
                group.update(running)
            raise

    def train(self) -> None:
        """Sets the parameters to y, where gradients are taken; does nothing in train mode."""
        self._switch(train_mode=True)

    def eval(self) -> None:
        """Sets the parameters to the average x, where the model is good; does nothing in eval mode."""
        self._switch(train_mode=False)

    @torch.no_grad()
    def _switch(self, *, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] == train_mode:
                continue
            beta1 = float(group["betas"][0]) if train_mode else _beta1_of_y(group)
            weight = 1 - beta1 if train_mode else 1 - 1 / beta1
            for param in group["params"]:
                state = shards.local_states(self.state.get(param, {}))
                if "z" in state:
                    _move_towards(shards.local(param), state, weight)
            group.update(train_mode=train_mode, beta1_of_y=beta1)


def _check_beta1(group: Mapping[str, Any]) -> None:
    """
    Raises:
        ValueError: it is not the one that y has been computed with, by which x follows from y and z.
    """
    beta1, of_y = float(group["betas"][0]), _beta1_of_y(group)
    if beta1 != of_y:
        raise ValueError(
            f"betas[0] must not change in train mode, from {of_y} to {beta1}: change it in eval mode; OneCycleLR and "
            "CyclicLR take cycle_momentum=False"
        )


def _move_towards(param: Tensor, state: Mapping[str, Tensor], weight: float) -> None:
    """Moves a parameter, or a shard, by a part of its way to z."""
    z = state["z"].to(param.device)
    if COMPENSATION not in state:
        param.copy_(param.to(z.dtype).lerp(z, weight))
        return
    low = state[COMPENSATION].to(param.device).view(torch.int16)[..., 0]
    set_compensated(param, low, compensated(param, low).lerp(z, weight))
    state[COMPENSATION].view(torch.int16)[..., 0].copy_(low)
