"""LAMB (You et al., 2020): Adam whose update is made as long as the parameter, times lr."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import power, quotient, sign_of_grad


@triton.jit
def lamb_constants(hyper, step, norms):
    lr, beta1, beta2, eps, weight_decay, bias_correction, adapt, maximize = hyper
    correction1 = tl.where(bias_correction != 0, 1 - power(beta1, step), 1.0)
    correction2 = tl.where(bias_correction != 0, 1 - power(beta2, step), 1.0)
    is_adapted = (adapt != 0) & (norms[0] != 0) & (norms[1] != 0)
    trust_ratio = tl.where(is_adapted, norms[0] / tl.where(norms[1] != 0, norms[1], 1.0), 1.0)
    return (
        lr * trust_ratio,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / correction1,
        1 / tl.sqrt(correction2),
        eps,
        weight_decay,
        sign_of_grad(maximize),
    )


@triton.jit
def lamb_direction(param, grad, states, constants):
    exp_avg, exp_avg_sq = states
    _, beta1, rest1, beta2, rest2, inverse1, inverse_root2, eps, weight_decay, sign = constants
    grad = sign * grad
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    direction = quotient(exp_avg * inverse1, tl.sqrt_rn(exp_avg_sq) * inverse_root2, eps) + weight_decay * param
    return direction, exp_avg, exp_avg_sq


@triton.jit
def lamb_measure(param, grad, states, constants):
    direction, _, _ = lamb_direction(param, grad, states, constants)
    return param, direction


@triton.jit
def lamb(param, grad, states, constants):
    direction, exp_avg, exp_avg_sq = lamb_direction(param, grad, states, constants)
    return param - constants[0] * direction, (exp_avg, exp_avg_sq)
