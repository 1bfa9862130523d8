"""Defines what a rule has on a GPU, and what the rules share."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Functions(NamedTuple):
    """A rule for a GPU.

    Attributes:
        constants: of one tensor's step: (*hyper, step, norms) -> Constants. Numbers in float64, hyper-parameters by
            the names and in the order of ``Rule.hyper``; the norms are zero until they are known.
        kind: the NamedTuple Constants.
        update: of elements in float32: (param, grad, states, constants) -> (param, states), with the constants, in
            float32, as a tuple without names, which kernels cannot hand on.
        measure: what the norms are of: (param, grad, states, constants) -> two tensors; None if it asks for none.
    """

    constants: Any
    kind: Any
    update: Any
    measure: Any = None


@triton.jit
def power(base, exponent):
    """Returns base^exponent of float64 numbers, neither negative."""
    result = tl.exp2(tl.log2(tl.where(base > 0, base, 1.0)) * exponent)
    return tl.where((base > 0) | (exponent == 0), result, 0.0)


@triton.jit
def sign_of_grad(maximize):
    return tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)


@triton.jit
def decayed(grad, param, weight_decay):
    return tl.where(weight_decay != 0, grad + weight_decay * param, grad)


@triton.jit
def quotient(x, root, eps):
    return tl.div_rn(x, root + eps)


@triton.jit
def caution_scale(norms):
    """Returns one over the share of the elements that agree; see kernels/rules/caution.h."""
    elements = tl.where(norms[1] > 0, norms[1] * norms[1], 1.0)
    return 1 / tl.maximum(norms[0] * norms[0] / elements, 1e-3)


@triton.jit
def agreement(direction, grad):
    """Returns 1 where a direction and the gradient have the same sign, else 0."""
    return (((direction > 0) & (grad > 0)) | ((direction < 0) & (grad < 0))).to(tl.float32)


@triton.jit
def caution_measure(direction, grad):
    """Returns what the norms are of: their squares are how many elements agree, and how many there are."""
    return agreement(direction, grad), tl.full(grad.shape, 1.0, tl.float32)
