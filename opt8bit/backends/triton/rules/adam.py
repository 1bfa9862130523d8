"""Adam (Kingma & Ba, 2015), with weight decay added to the gradient; AdamW (Loshchilov & Hutter, 2019), beside it."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import (
    Functions,
    agreement,
    caution_measure,
    caution_scale,
    decayed,
    power,
    quotient,
    sign_of_grad,
)


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
    caution: Any


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
        caution=caution_scale(norms),
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


@triton.jit
def cautious(exp_avg, grad, constants):
    return exp_avg * (agreement(exp_avg, grad) * constants.caution)


@triton.jit
def adam_cautious(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq = states
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    return adam_descend(param, cautious(exp_avg, grad, constants), exp_avg_sq, constants), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad_cautious(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    param = adam_descend(param, cautious(exp_avg, grad, constants), max_exp_avg_sq, constants)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adamw_cautious(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq = states
    grad = constants.sign * grad
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    param = adam_descend(param * constants.decay, cautious(exp_avg, grad, constants), exp_avg_sq, constants)
    return param, (exp_avg, exp_avg_sq)


@triton.jit
def adamw_amsgrad_cautious(param, grad, states, constants):
    constants = AdamConstants(*constants)
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = constants.sign * grad
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    param = adam_descend(param * constants.decay, cautious(exp_avg, grad, constants), max_exp_avg_sq, constants)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adam_measure(param, grad, states, constants):
    constants = AdamConstants(*constants)
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    return caution_measure(constants.beta1 * states[0] + constants.rest1 * grad, grad)


@triton.jit
def adamw_measure(param, grad, states, constants):
    constants = AdamConstants(*constants)
    grad = constants.sign * grad
    return caution_measure(constants.beta1 * states[0] + constants.rest1 * grad, grad)


RULES = {
    "adam": Functions(adam_constants, AdamConstants, adam),
    "adam_amsgrad": Functions(adam_constants, AdamConstants, adam_amsgrad),
    "adamw": Functions(adam_constants, AdamConstants, adamw),
    "adamw_amsgrad": Functions(adam_constants, AdamConstants, adamw_amsgrad),
    "adam_cautious": Functions(adam_constants, AdamConstants, adam_cautious, adam_measure),
    "adam_amsgrad_cautious": Functions(adam_constants, AdamConstants, adam_amsgrad_cautious, adam_measure),
    "adamw_cautious": Functions(adam_constants, AdamConstants, adamw_cautious, adamw_measure),
    "adamw_amsgrad_cautious": Functions(adam_constants, AdamConstants, adamw_amsgrad_cautious, adamw_measure),
}
