"""LARS (You, Gitman, Ginsburg, 2017): gradient descent whose step is in proportion to the parameter's norm."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, sign_of_grad


class LarsConstants(NamedTuple):
    local_lr: Any
    momentum: Any
    weight_decay: Any
    nesterov: Any
    sign: Any


@triton.jit
def lars_constants(lr, momentum, weight_decay, trust_coefficient, eps, nesterov, adapt, maximize, step, norms):
    is_adapted = (adapt != 0) & (norms[0] != 0) & (norms[1] != 0)
    length = tl.where(is_adapted, norms[1] + weight_decay * norms[0] + eps, 1.0)
    return LarsConstants(
        local_lr=lr * tl.where(is_adapted, trust_coefficient * norms[0] / length, 1.0),
        momentum=momentum,
        weight_decay=weight_decay,
        nesterov=nesterov,
        sign=sign_of_grad(maximize),
    )


@triton.jit
def lars_measure(param, grad, states, constants):
    return param, grad


@triton.jit
def lars_direction(param, grad, constants):
    return constants.local_lr * (constants.sign * grad + constants.weight_decay * param)


@triton.jit
def lars(param, grad, states, constants):
    constants = LarsConstants(*constants)
    return param - lars_direction(param, grad, constants), states


@triton.jit
def lars_momentum(param, grad, states, constants):
    constants = LarsConstants(*constants)
    direction = lars_direction(param, grad, constants)
    momentum_buffer = constants.momentum * states[0] + direction
    step = tl.where(constants.nesterov != 0, direction + constants.momentum * momentum_buffer, momentum_buffer)
    return param - step, (momentum_buffer,)


RULES = {
    "lars": Functions(lars_constants, LarsConstants, lars, lars_measure),
    "lars_momentum": Functions(lars_constants, LarsConstants, lars_momentum, lars_measure),
}
