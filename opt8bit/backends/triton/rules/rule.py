"""What the rules share."""

import triton
import triton.language as tl


@triton.jit
def power(base, exponent):
    """base^exponent of float64 numbers, neither negative."""
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
