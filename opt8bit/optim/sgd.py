"""Stochastic gradient descent, with momentum: its rules and its class."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.caution import caution_mask, cautious
from opt8bit.optim.options import Options, check_flags, check_not_negative, check_number

if TYPE_CHECKING:
    from typing_extensions import Unpack


def sgd(
    param: Tensor,
    grad: Tensor,
    momentum_buffer: Tensor | None = None,
    *,
    step: float,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: float,
    maximize: float,
    caution: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one step of SGD, with momentum where a ``momentum_buffer`` is given. All tensors have one shape.

    The first step takes the gradient undampened, as in torch.optim.

    Source: On the importance of initialization and momentum in deep learning.
    """
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad + weight_decay * param
    if momentum_buffer is None:
        return (param - lr * grad,)
    momentum_buffer = momentum * momentum_buffer + (1 if step == 1 else 1 - dampening) * grad
    direction = grad + momentum * momentum_buffer if nesterov else momentum_buffer
    if caution:
        direction = direction * caution_mask(direction, grad)
    return param - lr * direction, momentum_buffer


HYPER = ("lr", "momentum", "dampening", "weight_decay", "nesterov", "maximize")
SGD = Rule(
    "sgd",
    {},
    HYPER,
    sgd,
    family="sgd",
    torch_counts_steps=False,
    bitsandbytes_hyper={"momentum": lambda group: group["betas"][0]},
)
MOMENTUM = replace(SGD, name="sgd_momentum", states={"momentum_buffer": True}, bitsandbytes=(("momentum_buffer",),))
CAUTIOUS = cautious(MOMENTUM)


class SGD8bit(Optimizer8bit):
    """Implements SGD with 8-bit momentum: ``torch.optim.SGD`` at a quarter of its state memory.

    With ``g`` the gradient plus ``weight_decay * p``::

        buffer = momentum * buffer + (1 - dampening) * g
        p = p - lr * buffer             (nesterov: p - lr * (g + momentum * buffer))

    The buffer is decoded, updated in float32 and coded again block by block, so that each step adds to it an error
    of at most 0.0071 times the block's absmax. Without momentum there is no state and this is plain SGD.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        momentum: decay rate of the buffer.
        dampening: part of the gradient that the buffer leaves out.
        weight_decay: L2 penalty, added to the gradient.
        nesterov: look ahead by one step; takes momentum and no dampening.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization.
    """

    rules = (SGD, MOMENTUM, CAUTIOUS)
    counterpart = "SGD"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float = 0,
        nesterov: bool = False,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_flags(group, "nesterov")
        check_number("dampening", group["dampening"])
        check_not_negative(lr=group["lr"], momentum=group["momentum"], weight_decay=group["weight_decay"])
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError("Nesterov momentum requires a momentum and zero dampening")
        if group["caution"] and group["momentum"] == 0:
            raise ValueError("caution=True takes momentum, as a gradient never moves against itself, got momentum=0")

    def rule(self, group: dict[str, Any]) -> Rule:
        if group["momentum"] == 0:
            return SGD
        return CAUTIOUS if group["caution"] else MOMENTUM
