"""RMSprop (Hinton, 2012); centered (Graves, 2013), where the variance is kept by its own recurrence."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, decayed, quotient, sign_of_grad


class RmspropConstants(NamedTuple):
    lr: Any
    alpha: Any
    rest: Any
    of_variance: Any
    eps: Any
    weight_decay: Any
    momentum: Any
    sign: Any


@triton.jit
def rmsprop_constants(lr, alpha, eps, weight_decay, momentum, maximize, step, norms):
    return RmspropConstants(
        lr=lr,
        alpha=alpha,
        rest=1 - alpha,
        of_variance=alpha * (1 - alpha),
        eps=eps,
        weight_decay=weight_decay,
        momentum=momentum,
        sign=sign_of_grad(maximize),
    )


@triton.jit
def rmsprop_direction(param, grad, square_avg, constants):
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    square_avg = constants.alpha * square_avg + constants.rest * grad * grad
    return quotient(grad, tl.sqrt_rn(square_avg), constants.eps), square_avg


@triton.jit
def rmsprop_centered_direction(param, grad, variance, grad_avg, constants):
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    deviation = grad - grad_avg
    variance = constants.alpha * variance + constants.of_variance * deviation * deviation
    grad_avg = constants.alpha * grad_avg + constants.rest * grad
    return quotient(grad, tl.sqrt_rn(variance), constants.eps), variance, grad_avg


@triton.jit
def rmsprop(param, grad, states, constants):
    constants = RmspropConstants(*constants)
    direction, square_avg = rmsprop_direction(param, grad, states[0], constants)
    return param - constants.lr * direction, (square_avg,)


@triton.jit
def rmsprop_momentum(param, grad, states, constants):
    constants = RmspropConstants(*constants)
    direction, square_avg = rmsprop_direction(param, grad, states[0], constants)
    momentum_buffer = constants.momentum * states[1] + direction
    return param - constants.lr * momentum_buffer, (square_avg, momentum_buffer)


@triton.jit
def rmsprop_centered(param, grad, states, constants):
    constants = RmspropConstants(*constants)
    direction, variance, grad_avg = rmsprop_centered_direction(param, grad, states[0], states[1], constants)
    return param - constants.lr * direction, (variance, grad_avg)


@triton.jit
def rmsprop_centered_momentum(param, grad, states, constants):
    constants = RmspropConstants(*constants)
    direction, variance, grad_avg = rmsprop_centered_direction(param, grad, states[0], states[1], constants)
    momentum_buffer = constants.momentum * states[2] + direction
    return param - constants.lr * momentum_buffer, (variance, grad_avg, momentum_buffer)


RULES = {
    "rmsprop": Functions(rmsprop_constants, RmspropConstants, rmsprop),
    "rmsprop_momentum": Functions(rmsprop_constants, RmspropConstants, rmsprop_momentum),
    "rmsprop_centered": Functions(rmsprop_constants, RmspropConstants, rmsprop_centered),
    "rmsprop_centered_momentum": Functions(rmsprop_constants, RmspropConstants, rmsprop_centered_momentum),
}
