"""Adagrad: its rule and its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import Options, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def adagrad(
    param: Tensor,
    grad: Tensor,
    sum: Tensor,
    *,
    step: float,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
    maximize: float,
) -> tuple[Tensor, ...]:
    """Takes one step of Adagrad. All tensors have one shape.

    Source: Adaptive Subgradient Methods for Online Learning and Stochastic Optimization, section 1.1.
    """
    grad = -grad if maximize else grad
    if weight_decay:
        grad = grad + weight_decay * param
    sum = sum + grad * grad
    return param - lr / (1 + (step - 1) * lr_decay) * (grad / (sum.sqrt() + eps)), sum


HYPER = ("lr", "lr_decay", "eps", "weight_decay", "maximize")
RULE = Rule("adagrad", {"sum": False}, HYPER, adagrad, bitsandbytes=(("sum",),))


class Adagrad8bit(Optimizer8bit):
    """Implements Adagrad with an 8-bit sum: ``torch.optim.Adagrad`` at a quarter of its state memory.

    With ``g`` the gradient plus ``weight_decay * p``, and t the step::

        s = s + g * g
        p = p - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(s) + eps)

    The sum is coded to the nearest value. Once a step adds less than half a gap of the codebook to an element (about
    1/280 of a sum near the block's largest), that element's sum stays as it is: the learning rate of long runs
    falls less than with ``state_bits=32``.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        lr_decay: the learning rate is divided by 1 + (t - 1) * lr_decay.
        weight_decay: L2 penalty, added to the gradient.
        initial_accumulator_value: what the sum begins as.
        eps: added to the denominator.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Adaptive Subgradient Methods for Online Learning and
    Stochastic Optimization.
    """

    rules = (RULE,)
    counterpart = "Adagrad"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "lr_decay": lr_decay,
            "eps": eps,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        names = ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps")
        check_not_negative(**{name: group[name] for name in names})

    def initial(self, group: dict[str, Any]) -> dict[str, float]:
        return {"sum": group["initial_accumulator_value"]}
