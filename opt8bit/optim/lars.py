"""LARS, with momentum: its rules and its class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import Options, check_finite, check_flags, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lars(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: float,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    nesterov: float,
    adapt: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of LARS. All tensors have one shape, that of the whole parameter: its norm counts.

    Source: Large Batch Training of Convolutional Networks, algorithm 1.
    """
    local_lr = lr
    if adapt:
        param_norm, grad_norm = (torch.linalg.vector_norm(x, dtype=torch.float64).item() for x in (param, grad))
        if param_norm != 0 and grad_norm != 0:
            local_lr = lr * trust_coefficient * param_norm / (grad_norm + weight_decay * param_norm + eps)
    grad = -grad if maximize else grad
    direction = local_lr * (grad + weight_decay * param)
    if momentum_buffer is None:
        return (param - direction,)
    momentum_buffer = momentum * momentum_buffer + direction
    return param - (direction + momentum * momentum_buffer if nesterov else momentum_buffer), momentum_buffer


HYPER = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps", "nesterov", "adapt", "maximize")
# Of bitsandbytes' LARS nothing can be loaded: its buffer holds gradients, and here (as in the paper) steps, whose
# learning rates its state dict does not tell.
LARS = Rule("lars", {}, HYPER, lars, family="lars", whole=True)
VARIANTS = {  # by whether there is momentum
    False: LARS,
    True: replace(LARS, name="lars_momentum", states={"momentum_buffer": True}),
}


class LARS8bit(Optimizer8bit):
    """Implements LARS with 8-bit momentum: SGD whose step is in proportion to the norm of each parameter.

    With ``g`` the gradient, all norms over a whole parameter::

        local_lr = lr * trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)
        buffer = momentum * buffer + local_lr * (g + weight_decay * p)
        p = p - buffer          (nesterov: looks ahead by one step)

    Where either norm is zero, local_lr is lr.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        momentum: decay rate of the buffer; 0 has none.
        weight_decay: L2 penalty, added to the gradient.
        trust_coefficient: how far a step may go, in terms of the parameter's norm.
        eps: added to the denominator.
        nesterov: look ahead by one step; takes momentum.
        adapt: take local_lr; False, for the groups of biases and norms, takes lr.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Large Batch Training of Convolutional Networks.
    """

    rules = tuple(VARIANTS.values())

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.9,
        weight_decay: float = 0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        nesterov: bool = False,
        adapt: bool = True,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "weight_decay": weight_decay,
            "trust_coefficient": trust_coefficient,
            "eps": eps,
            "nesterov": nesterov,
            "adapt": adapt,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "nesterov", "adapt")
        names = ("lr", "momentum", "weight_decay", "trust_coefficient", "eps")
        check_finite(group, *names)
        check_not_negative(**{name: group[name] for name in names})
        if group["nesterov"] and group["momentum"] == 0:
            raise ValueError("Nesterov momentum requires a momentum")

    def rule(self, group: dict[str, Any]) -> Rule:
        return VARIANTS[bool(group["momentum"] != 0)]
