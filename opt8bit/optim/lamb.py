"""LAMB: its rule and its class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import Options, check_betas, check_finite, check_flags, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lamb(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    bias_correction: float,
    adapt: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of LAMB. All tensors have one shape, that of the whole parameter: its norm counts.

    Source: Large Batch Optimization for Deep Learning: Training BERT in 76 minutes, algorithm 2.
    """
    grad = -grad if maximize else grad
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias_correction1 = 1 - beta1**step if bias_correction else 1
    bias_correction2 = 1 - beta2**step if bias_correction else 1
    denominator = exp_avg_sq.sqrt() / math.sqrt(bias_correction2) + eps
    direction = exp_avg / bias_correction1 / denominator + weight_decay * param
    trust_ratio = norm_ratio(param, direction) if adapt else 1
    return param - lr * trust_ratio * direction, exp_avg, exp_avg_sq


def norm_ratio(param: Tensor, direction: Tensor) -> float:
    """Returns the norm of one tensor in terms of another's; 1 if either is zero."""
    norms = [torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (param, direction)]
    return norms[0] / norms[1] if norms[0] != 0 and norms[1] != 0 else 1.0


HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "bias_correction", "adapt", "maximize")
RULE = Rule(
    "lamb",
    {"exp_avg": True, "exp_avg_sq": False},
    HYPER,
    lamb,
    whole=True,
    bitsandbytes=(("exp_avg",), ("exp_avg_sq",)),
)


class LAMB8bit(Optimizer8bit):
    """Implements LAMB with 8-bit states: Adam whose step is in proportion to the norm of each parameter.

    With ``m`` and ``v`` as in Adam, all norms over a whole parameter::

        r = m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay * p
        p = p - lr * |p| / |r| * r

    The trust ratio |p| / |r| is 1 where either norm is zero.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the denominator.
        weight_decay: part of the parameter that is added to the step.
        bias_correction: divide m and v by 1 - beta^t.
        adapt: take the trust ratio; False, for the groups of biases and norms, takes 1.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Large Batch Optimization for Deep Learning: Training BERT
    in 76 minutes.
    """

    rules = (RULE,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        bias_correction: bool = True,
        adapt: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "adapt": adapt,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "bias_correction", "adapt")
        check_finite(group, "lr", "eps", "weight_decay")
        check_not_negative(lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
        check_betas(group["betas"])
