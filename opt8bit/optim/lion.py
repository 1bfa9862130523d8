"""Lion: its rule and its class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.caution import caution_mask, cautious
from opt8bit.optim.options import Options, check_betas, check_finite, check_not_negative

if TYPE_CHECKING:
    from typing_extensions import Unpack


def lion(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    *,
    step: float,
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    maximize: float,
    caution: bool = False,
) -> tuple[Tensor, ...]:
    """Takes one step of Lion. All tensors have one shape.

    Source: Symbolic Discovery of Optimization Algorithms, algorithm 2.
    """
    grad = -grad if maximize else grad
    direction = (beta1 * exp_avg + (1 - beta1) * grad).sign()
    if caution:
        direction = direction * caution_mask(direction, grad)
    exp_avg = beta2 * exp_avg + (1 - beta2) * grad
    return param * (1 - lr * weight_decay) - lr * direction, exp_avg


HYPER = ("lr", "beta1", "beta2", "weight_decay", "maximize")
RULE = Rule("lion", {"exp_avg": True}, HYPER, lion, torch_counts_steps=False, bitsandbytes=(("exp_avg",),))
CAUTIOUS = cautious(RULE)


class Lion8bit(Optimizer8bit):
    """Implements Lion with an 8-bit average: one byte of state a parameter.

    With ``g`` the gradient::

        p = p * (1 - lr * weight_decay) - lr * sign(beta1 * m + (1 - beta1) * g)
        m = beta2 * m + (1 - beta2) * g

    The sign of a number that is not one is 0, as torch.sign has it.

    Args:
        params: parameters, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element; about a tenth of Adam's.
        betas: weight of m in the step, and decay rate of m, each in [0, 1).
        weight_decay: decay of the parameter per step, in units of lr; about ten times Adam's.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Symbolic Discovery of Optimization Algorithms.
    """

    rules = (RULE, CAUTIOUS)

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay}, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_finite(group, "lr", "weight_decay")
        check_not_negative(lr=group["lr"], weight_decay=group["weight_decay"])
        check_betas(group["betas"])

    def rule(self, group: dict[str, Any]) -> Rule:
        return CAUTIOUS if group["caution"] else self.rules[0]
