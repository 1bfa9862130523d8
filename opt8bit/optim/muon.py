"""Muon: its rule and its class."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from opt8bit.backends import Rule
from opt8bit.optim.base import Optimizer8bit
from opt8bit.optim.options import LEAST, Options, check_count, check_flags, check_not_negative, check_real

if TYPE_CHECKING:
    from typing_extensions import Unpack


LARGE = 512  # rows from which on it pays to do with fewer or smaller products
LARGE_WITH_AMX = 4096  # and where a processor multiplies tiles, so that products take little beside copies
PANEL = 256  # rows of a symmetric product that are computed together
WIDE = 1.5  # columns for each row, from which on polynomials of the Gram matrix take fewer products
# Iterations that bfloat16 allows on one Gram matrix, of the first and of later ones: with one more, singular values of
# matrices of low rank come out up to 1.4, where those of single iterations end at 1.2.
ON_GRAM = (3, 2)

Coefficients = tuple[float, float, float]


def orthogonalized(
    x: Tensor,  # (rows, columns), or a batch of such matrices, (batch, rows, columns)
    coefficients: Coefficients,
    steps: int,
    eps: float,
) -> Tensor:
    """Newton-Schulz iterations towards the nearest matrix with orthonormal rows or columns, in bfloat16.

    In float32 on processors that have no arithmetic for bfloat16. Two of an iteration's three products are symmetric.
    Where one side of a large matrix is much the longer one, several iterations become one product with a polynomial of
    the Gram matrix, whose sides are as short as the other. The matrices of a batch are iterated together, each for
    itself.

    Source: Muon: An optimizer for hidden layers in neural networks (Jordan et al., 2024).
    """
    if x.dim() == 3 and len(x) == 1:  # products of batches of one are slower
        return orthogonalized(x[0], coefficients, steps, eps)[None]
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.to(product_dtype(x))
    x = x.mT if is_tall else x
    x = (x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)).contiguous()
    rows, columns = x.shape[-2:]
    if rows >= LARGE and columns >= WIDE * rows:
        first, later = ON_GRAM
        for done in (0, *range(first, steps, later)):
            x = _iterated_on_gram(x, coefficients, min(later if done else first, steps - done))
    else:
        x = _iterated(x, coefficients, steps)
    return x.mT if is_tall else x


def _iterated(x: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Iterations one by one, x being overwritten. What the first has allocated serves the others."""
    a, b, c = coefficients
    gram = added = spare = None
    add_product = torch.addmm if x.dim() == 2 else torch.baddbmm
    for _ in range(steps):
        gram = symmetric_product(x, x.mT, out=gram)
        added = symmetric_product(gram, gram, gram, beta=b, alpha=c, out=added)
        x, spare = add_product(x, added, x, beta=a, out=spare), x
    return x


def _iterated_on_gram(x: Tensor, coefficients: Coefficients, steps: int) -> Tensor:
    """Iterations on one Gram matrix G: each takes x to Px and G to PGP, where P = a + bG + cG²."""
    a, b, c = coefficients
    gram = symmetric_product(x, x.mT)
    added = symmetric_product(gram, gram, gram, beta=b, alpha=c)  # P - a
    product = added.clone()  # of all P
    product.diagonal(dim1=-2, dim2=-1).add_(a)
    for _ in range(steps - 1):
        for _ in range(2):
            gram = symmetric_product(added, gram, gram, beta=a)
        added = symmetric_product(gram, gram, gram, beta=b, alpha=c)
        product = symmetric_product(added, product, product, beta=a)
    return product @ x


def symmetric_product(
    left: Tensor,  # (n, m) or (batch, n, m)
    right: Tensor,  # (m, n) or (batch, m, n)
    added: Tensor | None = None,  # (n, n) or (batch, n, n), symmetric
    *,
    beta: float = 1.0,
    alpha: float = 1.0,
    out: Tensor | None = None,  # (n, n) or (batch, n, n), none of the others
) -> Tensor:
    """``beta * added + alpha * left @ right``, (n, n), known to be symmetric: half of it is computed, half copied.

    By panels of rows, where the matrix is large enough for that to pay. (On GPUs that has not been measured.) Products
    of a batch are computed in full.
    """
    n = left.shape[-2]
    large = LARGE_WITH_AMX if left.dtype == torch.bfloat16 and has_amx() else LARGE
    if left.dim() == 3 or left.device.type != "cpu" or n < large:
        if added is None:
            return torch.matmul(left, right, out=out)
        add_product = torch.addmm if left.dim() == 2 else torch.baddbmm
        return add_product(added, left, right, beta=beta, alpha=alpha, out=out)
    whole = left.new_empty(n, n) if out is None else out
    for start in range(0, n, PANEL):
        end = min(start + PANEL, n)
        rows, columns = left[start:end], right[:, :end]
        if added is None:
            part = rows @ columns
        else:
            part = torch.addmm(added[start:end, :end], rows, columns, beta=beta, alpha=alpha)
        if start:
            whole[:start, start:end] = part.T.contiguous()[:start]  # transposed whole, as torch does it fast
        whole[start:end, :end] = part
    return whole


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype of products on a tensor's device."""
    return torch.bfloat16 if x.device.type != "cpu" or has_bfloat16() else torch.float32


def has_bfloat16() -> bool:
    """Whether this processor has arithmetic for bfloat16, or torch cannot tell."""
    known = _capabilities()
    found = [known[name] for name in ("avx512_bf16", "amx_bf16", "bf16") if name in known]
    return any(found) or not found


def has_amx() -> bool:
    """Whether this processor has instructions that multiply tiles of bfloat16."""
    return _capabilities().get("amx_bf16", False)


@functools.cache
def _capabilities() -> Mapping[str, Any]:
    """What this processor has, which torch 2.10 and later tell; empty with others."""
    return getattr(torch.cpu, "get_capabilities", dict)()


ADJUSTMENTS = {  # of lr, by the number of rows and columns
    "original": lambda rows, columns: math.sqrt(max(1, rows / max(1, columns))),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / max(1, columns)),
}


def direction_of(
    grad: Tensor, momentum_buffer: Tensor, *, momentum: float, nesterov: bool, maximize: bool, **_: Any
) -> tuple[Tensor, Tensor]:
    """What is to be orthogonalized, in the dtype of the products, and the momentum, which is updated where it is."""
    grad = -grad if maximize else grad
    momentum_buffer.lerp_(grad, 1 - momentum)
    direction = grad.lerp(momentum_buffer, momentum) if nesterov else momentum_buffer
    return direction.to(product_dtype(direction)), momentum_buffer


def orthogonalized_by_heads(
    direction: Tensor, *, ns_coefficients: Coefficients, ns_steps: int, eps: float, heads: int = 1, **_: Any
) -> Tensor:
    """With several ``heads``, the rows of a matrix are that many matrices below each other, each one for itself."""
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
    """The parameter after a step in an orthogonal direction."""
    rows, columns = param.shape[-2:]
    adjusted_lr = lr * ADJUSTMENTS[adjust_lr_fn or "original"](rows // heads, columns)
    return (param * (1 - lr * weight_decay)).add_(direction.to(param.dtype), alpha=-adjusted_lr)


def muon(param: Tensor, grad: Tensor, momentum_buffer: Tensor, *, step: float, **hyper: Any) -> tuple[Tensor, ...]:
    """One step of Muon; all tensors of one shape: (rows, columns), or several such matrices, (..., rows, columns).

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
    """Muon whose momentum takes 8 bits: ``torch.optim.Muon`` at a quarter of its state memory.

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
