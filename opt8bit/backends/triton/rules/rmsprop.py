"""RMSprop (Hinton, 2012); centered (Graves, 2013), where the variance is kept by its own recurrence."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import decayed, quotient, sign_of_grad


@triton.jit
def rmsprop_constants(hyper, step, norms):
    lr, alpha, eps, weight_decay, momentum, maximize = hyper
    return lr, alpha, 1 - alpha, alpha * (1 - alpha), eps, weight_decay, momentum, sign_of_grad(maximize)


@triton.jit
def rmsprop_direction(param, grad, square_avg, constants):
    _, alpha, rest, _, eps, weight_decay, _, sign = constants
    grad = decayed(sign * grad, param, weight_decay)
    square_avg = alpha * square_avg + rest * grad * grad
    return quotient(grad, tl.sqrt_rn(square_avg), eps), square_avg


@triton.jit
def rmsprop_centered_direction(param, grad, variance, grad_avg, constants):
    _, alpha, rest, of_variance, eps, weight_decay, _, sign = constants
    grad = decayed(sign * grad, param, weight_decay)
    deviation = grad - grad_avg
    variance = alpha * variance + of_variance * deviation * deviation
    grad_avg = alpha * grad_avg + rest * grad
    return quotient(grad, tl.sqrt_rn(variance), eps), variance, grad_avg


@triton.jit
def rmsprop(param, grad, states, constants):
    direction, square_avg = rmsprop_direction(param, grad, states[0], constants)
    return param - constants[0] * direction, (square_avg,)


@triton.jit
def rmsprop_momentum(param, grad, states, constants):
    direction, square_avg = rmsprop_direction(param, grad, states[0], constants)
    momentum_buffer = constants[6] * states[1] + direction
    return param - constants[0] * momentum_buffer, (square_avg, momentum_buffer)


@triton.jit
def rmsprop_centered(param, grad, states, constants):
    direction, variance, grad_avg = rmsprop_centered_direction(param, grad, states[0], states[1], constants)
    return param - constants[0] * direction, (variance, grad_avg)


@triton.jit
def rmsprop_centered_momentum(param, grad, states, constants):
    direction, variance, grad_avg = rmsprop_centered_direction(param, grad, states[0], states[1], constants)
    momentum_buffer = constants[6] * states[2] + direction
    return param - constants[0] * momentum_buffer, (variance, grad_avg, momentum_buffer)
