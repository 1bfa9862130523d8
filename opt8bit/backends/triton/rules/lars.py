"""LARS (You, Gitman, Ginsburg, 2017): gradient descent whose step is in proportion to the parameter's norm."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import sign_of_grad


@triton.jit
def lars_constants(hyper, step, norms):
    lr, momentum, weight_decay, trust_coefficient, eps, nesterov, adapt, maximize = hyper
    is_adapted = (adapt != 0) & (norms[0] != 0) & (norms[1] != 0)
    length = tl.where(is_adapted, norms[1] + weight_decay * norms[0] + eps, 1.0)
    local_lr = lr * tl.where(is_adapted, trust_coefficient * norms[0] / length, 1.0)
    return local_lr, momentum, weight_decay, nesterov, sign_of_grad(maximize)


@triton.jit
def lars_measure(param, grad, states, constants):
    return param, grad


@triton.jit
def lars(param, grad, states, constants):
    local_lr, _, weight_decay, _, sign = constants
    return param - local_lr * (sign * grad + weight_decay * param), states


@triton.jit
def lars_momentum(param, grad, states, constants):
    local_lr, momentum, weight_decay, nesterov, sign = constants
    direction = local_lr * (sign * grad + weight_decay * param)
    momentum_buffer = momentum * states[0] + direction
    step = tl.where(nesterov != 0, direction + momentum * momentum_buffer, momentum_buffer)
    return param - step, (momentum_buffer,)
