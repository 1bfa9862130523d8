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
def adam_grad(param, grad, constants, is_decoupled: tl.constexpr):
    grad = constants.sign * grad
    return grad if is_decoupled else decayed(grad, param, constants.weight_decay)


@triton.jit
def adam_step(
    param,
    grad,
    states,
    constants,
    is_decoupled: tl.constexpr,
    has_amsgrad: tl.constexpr,
    is_cautious: tl.constexpr,
):
    constants = AdamConstants(*constants)
    grad = adam_grad(param, grad, constants, is_decoupled)
    if is_decoupled:
        param = param * constants.decay
    exp_avg = constants.beta1 * states[0] + constants.rest1 * grad
    exp_avg_sq = constants.beta2 * states[1] + constants.rest2 * grad * grad
    direction, largest = exp_avg, exp_avg_sq
    if is_cautious:
        direction = exp_avg * (agreement(exp_avg, grad) * constants.caution)
    if has_amsgrad:
        largest = tl.maximum(states[2], exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    root = tl.sqrt_rn(largest) * constants.inverse_root2
    param = param - constants.step_size * quotient(direction, root, constants.eps)
    states = (exp_avg, exp_avg_sq, largest) if has_amsgrad else (exp_avg, exp_avg_sq)
    return param, states


@triton.jit
def adam(param, grad, states, constants):
    return adam_step(param, grad, states, constants, False, False, False)


@triton.jit
def adam_amsgrad(param, grad, states, constants):
    return adam_step(param, grad, states, constants, False, True, False)


@triton.jit
def adam_cautious(param, grad, states, constants):
    return adam_step(param, grad, states, constants, False, False, True)


@triton.jit
def adam_amsgrad_cautious(param, grad, states, constants):
    return adam_step(param, grad, states, constants, False, True, True)


@triton.jit
def adamw(param, grad, states, constants):
    return adam_step(param, grad, states, constants, True, False, False)


@triton.jit
def adamw_amsgrad(param, grad, states, constants):
    return adam_step(param, grad, states, constants, True, True, False)


@triton.jit
def adamw_cautious(param, grad, states, constants):
    return adam_step(param, grad, states, constants, True, False, True)


@triton.jit
def adamw_amsgrad_cautious(param, grad, states, constants):
    return adam_step(param, grad, states, constants, True, True, True)


@triton.jit
def adam_measure(param, grad, states, constants):
    constants = AdamConstants(*constants)
    grad = adam_grad(param, grad, constants, False)
    return caution_measure(constants.beta1 * states[0] + constants.rest1 * grad, grad)


@triton.jit
def adamw_measure(param, grad, states, constants):
    constants = AdamConstants(*constants)
    grad = adam_grad(param, grad, constants, True)
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
