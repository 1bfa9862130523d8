"""RMSprop, centered or not, with momentum or without: its rules and its class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import Options, check_flags, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def rmsprop(
    param: Tensor,
    grad: Tensor,
    square_avg: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: float,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of RMSprop. All tensors have one shape.

    Source: Neural Networks for Machine Learning (Hinton, 2012), lecture 6e.
    """
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad + weight_decay * param
    square_avg = alpha * square_avg + (1 - alpha) * grad * grad
    direction = grad / (square_avg.sqrt() + eps)
    if momentum_buffer is None:
        return param - lr * direction, square_avg
    momentum_buffer = momentum * momentum_buffer + direction
    return param - lr * momentum_buffer, square_avg, momentum_buffer


def rmsprop_centered(
    param: Tensor,
    grad: Tensor,
    variance: Tensor,
    grad_avg: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: float,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of centered RMSprop. All tensors have one shape.

    The variance is the mean square less the squared mean, by its own recurrence: the difference of two numbers
    that were each rounded could be negative.

    Source: Generating Sequences With Recurrent Neural Networks (Graves, 2013), equations 38 to 45.
    """
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad + weight_decay * param
    deviation = grad - grad_avg
    variance = alpha * variance + alpha * (1 - alpha) * deviation * deviation
    grad_avg = alpha * grad_avg + (1 - alpha) * grad
    direction = grad / (variance.sqrt() + eps)
    if momentum_buffer is None:
        return param - lr * direction, variance, grad_avg
    momentum_buffer = momentum * momentum_buffer + direction
    return param - lr * momentum_buffer, variance, grad_avg, momentum_buffer


HYPER = ("lr", "alpha", "eps", "weight_decay", "momentum", "maximize")
SQUARE_AVG = {"square_avg": False}
CENTERED = {"variance": False, "grad_avg": True}
MOMENTUM = {"momentum_buffer": True}
RMSPROP = Rule(
    "rmsprop",
    SQUARE_AVG,
    HYPER,
    rmsprop,
    family="rmsprop",
    bitsandbytes_hyper={"alpha": lambda group: group["betas"][0]},
)
RMSPROP_CENTERED = replace(RMSPROP, name="rmsprop_centered", states=CENTERED, update=rmsprop_centered)
VARIANTS = {  # by whether it is centered, and whether there is momentum
    (False, False): replace(RMSPROP, bitsandbytes=(("square_avg",),)),
    (False, True): replace(RMSPROP, name="rmsprop_momentum", states={**SQUARE_AVG, **MOMENTUM}),
    (True, False): RMSPROP_CENTERED,
    (True, True): replace(RMSPROP_CENTERED, name="rmsprop_centered_momentum", states={**CENTERED, **MOMENTUM}),
}


class RMSprop8bit(Optimizer8bit):
    """Implements RMSprop with 8-bit states: ``torch.optim.RMSprop`` at a quarter of its state memory.

    With ``g`` the gradient plus ``weight_decay * p``::

        v = alpha * v + (1 - alpha) * g * g
        p = p - lr * g / (sqrt(v) + eps)        (momentum: the quotient goes through a buffer)

    Centered, the square root is of the variance of g, ``v`` less the square of its average. That variance is the
    state (``variance``, where torch.optim has ``square_avg``), so that rounding cannot make it negative.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        alpha: decay rate of the averages.
        eps: added to the denominator.
        weight_decay: L2 penalty, added to the gradient.
        momentum: decay rate of the buffer; 0 has none.
        centered: divide by the standard deviation of the gradient.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Neural Networks for Machine Learning, lecture 6e.
    """

    rules = tuple(VARIANTS.values())
    counterpart = "RMSprop"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "centered")
        check_not_negative(**{name: group[name] for name in ("lr", "eps", "momentum", "weight_decay", "alpha")})

    def rule(self, group: dict[str, Any]) -> Rule:
        return VARIANTS[group["centered"], bool(group["momentum"] != 0)]
