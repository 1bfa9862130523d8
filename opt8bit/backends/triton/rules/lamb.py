"""LAMB (You et al., 2020): Adam whose update is made as long as the parameter, times lr."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, power, quotient, sign_of_grad


class LambConstants(NamedTuple):
    lr: Any
    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    inverse1: Any
    inverse_root2: Any
    eps: Any
    weight_decay: Any
    sign: Any


@triton.jit
def lamb_constants(lr, beta1, beta2, eps, weight_decay, bias_correction, adapt, maximize, step, norms):
    correction1 = tl.where(bias_correction != 0, 1 - power(beta1, step), 1.0)
    correction2 = tl.where(bias_correction != 0, 1 - power(beta2, step), 1.0)
    is_adapted = (adapt != 0) & (norms[0] != 0) & (norms[1] != 0)
    trust_ratio = tl.where(is_adapted, norms[0] / tl.where(norms[1] != 0, norms[1], 1.0), 1.0)
    return LambConstants(
        lr=lr * trust_ratio,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        inverse1=1 / correction1,
        inverse_root2=1 / tl.sqrt(correction2),
        eps=eps,
        weight_decay=weight_decay,
        sign=sign_of_grad(maximize),
    )


@triton.jit
def lamb_direction(param, grad, states, constants):
    exp_avg, exp_avg_sq = states
    grad = constants.sign * grad
    exp_avg = constants.beta1 * exp_avg + constants.rest1 * grad
    exp_avg_sq = constants.beta2 * exp_avg_sq + constants.rest2 * grad * grad
    root = tl.sqrt_rn(exp_avg_sq) * constants.inverse_root2
    direction = quotient(exp_avg * constants.inverse1, root, constants.eps) + constants.weight_decay * param
    return direction, exp_avg, exp_avg_sq


@triton.jit
def lamb_measure(param, grad, states, constants):
    constants = LambConstants(*constants)
    direction, _, _ = lamb_direction(param, grad, states, constants)
    return param, direction


@triton.jit
def lamb(param, grad, states, constants):
    constants = LambConstants(*constants)
    direction, exp_avg, exp_avg_sq = lamb_direction(param, grad, states, constants)
    return param - constants.lr * direction, (exp_avg, exp_avg_sq)


RULES = {"lamb": Functions(lamb_constants, LambConstants, lamb, lamb_measure)}
