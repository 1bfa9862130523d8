"""Muon: its rule and its class."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.backends.processor import product_dtype
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.newton_schulz import Coefficients, orthogonalized
from opt8bit.optim.options import LEAST, Options, check_count, check_flags, check_not_negative, check_real

if TYPE_CHECKING:
    from typing_extensions import Unpack


ADJUSTMENTS = {  # of lr, by the number of rows and columns
    "original": lambda rows, columns: math.sqrt(max(1, rows / max(1, columns))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / max(1, columns)),
}


def direction_of(
    grad: Tensor, momentum_buffer: Tensor, *, momentum: float, nesterov: bool, maximize: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    """Updates the momentum in place, and returns what is to be orthogonalized, in the dtype of the products."""
    grad = -grad if maximize else grad
    momentum_buffer.lerp_(grad, 1 - momentum)
    direction = grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    return direction.to(product_dtype(direction.device)), momentum_buffer


def orthogonalized_by_heads(
    direction: Tensor, *, ns_coefficients: Coefficients, ns_steps: int, eps: float, heads: int = 1, **_: Any
) -> Tensor:
    """Orthogonalizes the rows of a matrix as ``heads`` matrices below each other, each by itself."""
    rows, columns = direction.shape[-2:]
    matrices = direction
    if heads > 1 or direction.dim() > 2:
        matrices = direction.reshape(-1, rows // heads, columns)
    return orthogonalized(matrices, ns_coefficients, ns_steps, eps).reshape(direction.shape)


def moved(
    param: Tensor,
    direction: Tensor,
    *,
    lr: float,
    weight_decay: float,
    adjust_lr_fn: str | None,
    heads: int = 1,
    **_: Any,
) -> Tensor:
    """Returns the parameter after a step in an orthogonal direction."""
    rows, columns = param.shape[-2:]
    adjusted_lr = lr * ADJUSTMENTS[adjust_lr_fn or "original"](rows // heads, columns)
    return (param * (1 - lr * weight_decay)).add_(direction.to(param.dtype), alpha=-adjusted_lr)


def muon(param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, step: float, **hyper: Any) -> tuple[Tensor, ...]:
    """Takes one step of Muon. All tensors have one shape: (rows, columns), or (..., rows, columns).

    Each is stepped for itself.

    Source: Muon: An optimizer for hidden layers in neural networks; Muon is Scalable for LLM Training; Deriving Muon
    (Bernstein, 2025).
    """
    direction, momentum_buffer = direction_of(grad, momentum_buffer.clone(), **hyper)
    return moved(param, orthogonalized_by_heads(direction, **hyper), **hyper), momentum_buffer


HYPER = (
    "lr",
    "momentum",
    "nesterov",
    "weight_decay",
    "ns_coefficients",
    "ns_steps",
    "eps",
    "adjust_lr_fn",
    "maximize",
)
RULE = Rule(
    "muon",
    {"momentum_buffer": True},
    HYPER,
    muon,
    parts=(direction_of, orthogonalized_by_heads, moved),
    whole=True,
    dim=2,
    torch_counts_steps=False,
)
RULE_OF_BATCHES = replace(RULE, name="muon_of_batches", hyper=(*HYPER, "heads"), dim=None)


def check_muon(group: dict[str, Any]) -> None:
    """Checks the hyper-parameters of a group that Muon steps.

    Raises:
        ValueError: one is out of range; the words are torch.optim's where it refuses it, too.
    """
    check_flags(group, "nesterov")
    if isinstance(group["lr"], Tensor) and group["lr"].numel() != 1:
        raise ValueError("Tensor lr must be 1-element")
    for name, label in (("lr", "Learning rate"), ("momentum", "momentum"), ("weight_decay", "weight decay")):
        check_real(name, group[name])
        if not LEAST.get(name, 0.0) <= group[name]:
            raise ValueError(f"{label} should be >= 0 but is: {group[name]}")
    check_not_negative(eps=group["eps"])
    check_count("ns_coefficients", group["ns_coefficients"], 3)
    for index, coefficient in enumerate(group["ns_coefficients"]):
        check_real(f"ns_coefficients[{index}]", coefficient)
    if group["fused"]:
        raise ValueError("fused=True, but Muon's matrix products are torch's; leave fused out")
    if not isinstance(group["ns_steps"], int) or not 0 <= group["ns_steps"] < 100:
        raise ValueError(f"ns_steps must be an integer from 0 to 99, got {group['ns_steps']!r}")
    if group["adjust_lr_fn"] is not None and group["adjust_lr_fn"] not in ADJUSTMENTS:
        raise ValueError(f"Adjust learning rate function {group['adjust_lr_fn']} is not supported")


class Muon8bit(Optimizer8bit):
    """Implements Muon with 8-bit momentum: ``torch.optim.Muon`` at a quarter of its state memory.

    For the matrices of hidden layers; embeddings, heads, norms and biases want another optimizer. With ``g`` the
    gradient, and O(.) the Newton-Schulz iteration towards an orthogonal matrix::

        buffer = momentum * buffer + (1 - momentum) * g
        p = p * (1 - lr * weight_decay) - adjusted_lr * O(buffer)       (nesterov: looks ahead by one step)

    The kernels code the buffer; the matrix products are torch's.

    Args:
        params: parameters of two dimensions, named parameters or parameter groups, as torch.optim takes them.
        lr: learning rate, a float or a tensor of one element.
        weight_decay: decay of the parameter per step, in units of lr.
        momentum: decay rate of the buffer.
        nesterov: look ahead by one step.
        ns_coefficients: of the Newton-Schulz polynomial.
        eps: least norm that a matrix is divided by.
        ns_steps: iterations, less than 100.
        adjust_lr_fn: how lr follows the shape. "original" (or None) takes sqrt(max(1, rows / columns)) * lr,
            "match_rms_adamw" 0.2 * sqrt(max(rows, columns)) * lr, and "spectral_unclamped" sqrt(rows / columns) * lr,
            which torch.optim.Muon has from torch 2.14 on.
        options: see :class:`opt8bit.optim.options.Options`.

    Raises:
        ValueError: a hyper-parameter is out of range, or a parameter has not two dimensions.
        RuntimeError: a parameter is complex.
        TypeError: an unknown option, or a parameter of an unsupported dtype.

    Source: 8-bit Optimizers via Block-wise Quantization; Muon: An optimizer for hidden layers in neural networks.
    """

    rules = (RULE,)
    counterpart = "Muon"

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: Coefficients = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        **options: Unpack[Options],
    ) -> None:
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_coefficients": ns_coefficients,
            "eps": eps,
            "ns_steps": ns_steps,
            "adjust_lr_fn": adjust_lr_fn,
        }
        super().__init__(params, defaults, options)

    def check_group(self, group: dict[str, Any]) -> None:
        check_muon(group)

    def check_param(self, param: Tensor, group: dict[str, Any]) -> None:
        super().check_param(param, group)
        if param.is_complex():
            raise RuntimeError("Muon does not support complex parameters")
