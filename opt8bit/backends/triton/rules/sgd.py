"""Stochastic gradient descent; with momentum, as torch.optim has it: the first step takes the gradient undampened."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import decayed, sign_of_grad


@triton.jit
def sgd_constants(hyper, step, norms):
    lr, momentum, dampening, weight_decay, nesterov, maximize = hyper
    return lr, momentum, tl.where(step == 1, 1.0, 1 - dampening), weight_decay, nesterov, sign_of_grad(maximize)


@triton.jit
def sgd(param, grad, states, constants):
    lr, _, _, weight_decay, _, sign = constants
    return param - lr * decayed(sign * grad, param, weight_decay), states


@triton.jit
def sgd_momentum(param, grad, states, constants):
    lr, momentum, undampened, weight_decay, nesterov, sign = constants
    grad = decayed(sign * grad, param, weight_decay)
    momentum_buffer = momentum * states[0] + undampened * grad
    direction = tl.where(nesterov != 0, grad + momentum * momentum_buffer, momentum_buffer)
    return param - lr * direction, (momentum_buffer,)
