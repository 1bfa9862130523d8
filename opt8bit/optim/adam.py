"""Adam and AdamW: their rules and their classes."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.caution import caution_mask, cautious
from opt8bit.optim.options import Options, check_betas, check_flags, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adam(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    maximize: float,
    caution: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one step of Adam, with weight decay added to the gradient. All tensors have one shape.

    Source: Adam: A Method for Stochastic Optimization, algorithm 1; AMSGrad, where ``max_exp_avg_sq`` is given:
    On the Convergence of Adam and Beyond, algorithm 2.
    """
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad + weight_decay * param
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    bias_correction1 = 1 - beta1**step
    bias_correction2 = 1 - beta2**step
    if max_exp_avg_sq is None:
        second, states = exp_avg_sq, (exp_avg, exp_avg_sq)
    else:
        second = max_exp_avg_sq.maximum(exp_avg_sq)
        states = (exp_avg, exp_avg_sq, second)
    direction = exp_avg / (second.sqrt() / math.sqrt(bias_correction2) + eps)
    if caution:
        direction = direction * caution_mask(exp_avg, grad)
    return param - (lr / bias_correction1) * direction, *states


def adamw(param: Tensor, *tensors: Tensor, lr: float, weight_decay: float, **hyper: float) -> tuple[Tensor, ...]:
    """Takes one step of Adam after the parameter has decayed by ``1 - lr * weight_decay``.

    Source: Decoupled Weight Decay Regularization, algorithm 2.
    """
    return adam(param * (1 - lr * weight_decay), *tensors, lr=lr, weight_decay=0.0, **hyper)


HYPER = ("lr", "beta1", "beta2", "eps", "weight_decay", "maximize")
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
MOMENTS_AMSGRAD = {**MOMENTS, "max_exp_avg_sq": False}
ADAM = Rule(
    "adam",
    MOMENTS,
    HYPER,
    adam,
    family="adam",
    bitsandbytes=(("exp_avg",), ("exp_avg_sq",)),
    bitsandbytes_hyper={"decoupled_weight_decay": lambda group: True},  # its Adam decays as its AdamW does
)
ADAMW = replace(ADAM, name="adamw", update=adamw, bitsandbytes_hyper={})
PLAIN = {  # by whether weight decay is decoupled, and amsgrad
    (False, False): ADAM,
    (False, True): replace(ADAM, name="adam_amsgrad", states=MOMENTS_AMSGRAD, bitsandbytes=()),
    (True, False): ADAMW,
    (True, True): replace(ADAMW, name="adamw_amsgrad", states=MOMENTS_AMSGRAD, bitsandbytes=()),
}
VARIANTS = {False: PLAIN, True: {key: cautious(rule) for key, rule in PLAIN.items()}}  # by caution, then as those


def check_adam(group: dict[str, Any]) -> None:
    """Checks the hyper-parameters of a group that Adam or AdamW steps.

    Raises:
        ValueError: one is out of range; the words are torch.optim's where it refuses it, too.
    """
    check_flags(group, *({"amsgrad", "decoupled_weight_decay"} & group.keys()))
    check_not_negative(lr=group["lr"], eps=group["eps"], weight_decay=group["weight_decay"])
    check_betas(group["betas"])


class _AdamBase(Optimizer8bit):
    rules = tuple(rule for variants in VARIANTS.values() for rule in variants.values())

    def check_group(self, group: dict[str, Any]) -> None:
        check_adam(group)


class Adam8bit(_AdamBase):
    """Implements Adam with 8-bit states: ``torch.optim.Adam`` at a quarter of its state memory.

    With ``g`` the gradient plus ``weight_decay * p``::

        m = beta1 * m + (1 - beta1) * g,  v = beta2 * v + (1 - beta2) * g * g
        p = p - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)

    ``m`` and ``v`` are decoded, updated in float32 and coded again block by block, so that each step adds to a
    state an error of at most half a gap of its codebook: 0.0071 (m) and 0.0036 (v) times the block's absmax.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of m and v, each in [0, 1).
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        amsgrad: divide by the largest v so far, a third state.
        decoupled_weight_decay: decay the parameter as AdamW does instead.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Adam: A Method for Stochastic Optimization.
    """

    counterpart = "Adam"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "decoupled_weight_decay": decoupled_weight_decay,
        }
        super().__init__(params, defaults, options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return VARIANTS[group["caution"]][group["decoupled_weight_decay"], group["amsgrad"]]


class AdamW8bit(_AdamBase):
    """Implements AdamW with 8-bit states: ``torch.optim.AdamW`` at a quarter of its state memory.

    As :class:`Adam8bit`, but the parameter decays by ``1 - lr * weight_decay`` before the step, and the gradient
    is left alone.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay rates of the first and second moment, each in [0, 1).
        eps: added to the denominator.
        weight_decay: decay of the parameter per step, in units of lr.
        amsgrad: divide by the largest second moment so far, a third state.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Decoupled Weight Decay Regularization.
    """

    counterpart = "AdamW"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "amsgrad": amsgrad}
        super().__init__(params, defaults, options)

    def rule(self, group: dict[str, Any]) -> Rule:
        return VARIANTS[group["caution"]][True, group["amsgrad"]]
