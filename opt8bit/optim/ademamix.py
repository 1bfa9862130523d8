"""AdEMAMix: its rule and its class."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import Options, check_betas, check_finite, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def scheduled_beta3(beta1: float, beta3: float, t_beta3: float, step: float) -> float:
    """Returns beta3 at a step. The slow average's half-life grows linearly from that of beta1 over t_beta3 steps."""
    if not 0 < step < t_beta3 or beta3 == 0:
        return beta3
    ratio = step / t_beta3
    if beta1 == 0:
        return beta3 ** (1 / ratio)  # the limit
    log1, log3 = math.log(beta1), math.log(beta3)
    return min(math.exp(log1 * log3 / ((1 - ratio) * log3 + ratio * log1)), beta3)


def ademamix(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_slow: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    beta3: float,
    alpha: float,
    t_alpha: float,
    t_beta3: float,
    eps: float,
    weight_decay: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of AdEMAMix. All tensors have one shape.

    Source: The AdEMAMix Optimizer: Better, Faster, Older, algorithm 1 and section 3.
    """
    grad = -grad if maximize else grad
    beta3 = scheduled_beta3(beta1, beta3, t_beta3, step)
    alpha = alpha * min(step / t_alpha, 1) if t_alpha else alpha
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_slow = beta3 * exp_avg_slow + (1 - beta3) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    denominator = exp_avg_sq.sqrt() / math.sqrt(bias_correction2) + eps
    direction = (exp_avg / bias_correction1 + alpha * exp_avg_slow) / denominator
    return param * (1 - lr * weight_decay) - lr * direction, exp_avg, exp_avg_slow, exp_avg_sq


HYPER = ("lr", "beta1", "beta2", "beta3", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay", "maximize")
RULE = Rule(
    "ademamix",
    {"exp_avg": True, "exp_avg_slow": True, "exp_avg_sq": False},
    HYPER,
    ademamix,
    bitsandbytes=(("exp_avg", "exp_avg_slow"), ("exp_avg_sq",)),
    bitsandbytes_hyper={name: lambda group, name=name: group.get(name) or 0 for name in ("t_alpha", "t_beta3")},
)


class AdEMAMix8bit(Optimizer8bit):
    """Implements AdEMAMix with 8-bit states: AdamW with a second, slower average. Three bytes a parameter.

    With ``g`` the gradient, ``m`` and ``v`` as in AdamW::

        s = beta3 * s + (1 - beta3) * g
        p = p * (1 - lr * weight_decay) - lr * (m / (1 - beta1^t) + alpha * s) / (sqrt(v / (1 - beta2^t)) + eps)

    An element of ``s`` changes only where a step moves it by half a gap of its codebook or more.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of m, v and s, each in [0, 1).
        alpha: weight of s.
        t_alpha: steps over which alpha rises linearly from 0; 0 for none. The paper takes the whole run.
        t_beta3: steps over which beta3 rises from beta1; 0 for none. The paper takes the whole run.
        eps: added to the denominator.
        weight_decay: decay of the parameter per step, in units of lr.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; The AdEMAMix Optimizer: Better, Faster, Older.
    """

    rules = (RULE,)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        alpha: float = 5.0,
        t_alpha: int = 0,
        t_beta3: int = 0,
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "alpha": alpha,
            "t_alpha": t_alpha,
            "t_beta3": t_beta3,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        names = ("lr", "alpha", "t_alpha", "t_beta3", "eps", "weight_decay")
        check_finite(group, *names)
        check_not_negative(**{name: group[name] for name in names})
        check_betas(group["betas"], count=3)
