"""Adam (Kingma & Ba, 2015), with weight decay added to the gradient; AdamW (Loshchilov & Hutter, 2019), beside it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, decayed, power, quotient, sign_of_grad


class AdamConstants(NamedTuple):
    sign: Any
    weight_decay: Any
    decay: Any
    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    inverse_root2: Any
    eps: Any
    step_size: Any


@triton.jit
def adam_constants(lr, beta1, beta2, eps, weight_decay, maximize, step, norms):
    return AdamConstants(
        sign=sign_of_grad(maximize),
        weight_decay=weight_decay,
        decay=1 - lr * weight_decay,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        inverse_root2=1 / tl.sqrt(1 - power(beta2, step)),
        eps=eps,
        step_size=lr / (1 - power(beta1, step)),
    )


@triton.jit
def adam_moments(grad, exp_avg, exp_avg_sq, constants):
    exp_avg = constants.beta1 * exp_avg + constants.rest1 * grad
    exp_avg_sq = constants.beta2 * exp_avg_sq + constants.rest2 * grad * grad
    return exp_avg, exp_avg_sq


@triton.jit
def adam_descend(param, exp_avg, exp_avg_sq, constants):
    root = tl.sqrt_rn(exp_avg_sq) * constants.inverse_root2
    return param - constants.step_size * quotient(exp_avg, root, constants.eps)


@triton.jit
def adam(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq = states
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    return adam_descend(param, exp_avg, exp_avg_sq, constants), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return adam_descend(param, exp_avg, max_exp_avg_sq, constants), (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adamw(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq = states
    exp_avg, exp_avg_sq = adam_moments(constants.sign * grad, exp_avg, exp_avg_sq, constants)
    return adam_descend(param * constants.decay, exp_avg, exp_avg_sq, constants), (exp_avg, exp_avg_sq)


@triton.jit
def adamw_amsgrad(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    exp_avg, exp_avg_sq = adam_moments(constants.sign * grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    param = adam_descend(param * constants.decay, exp_avg, max_exp_avg_sq, constants)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


RULES = {
    "adam": Functions(adam_constants, AdamConstants, adam),
    "adam_amsgrad": Functions(adam_constants, AdamConstants, adam_amsgrad),
    "adamw": Functions(adam_constants, AdamConstants, adamw),
    "adamw_amsgrad": Functions(adam_constants, AdamConstants, adamw_amsgrad),
}
