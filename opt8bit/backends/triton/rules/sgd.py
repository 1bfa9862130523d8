"""Stochastic gradient descent; with momentum, as torch.optim has it: the first step takes the gradient undampened."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import (
    Functions,
    agreement,
    caution_measure,
    caution_scale,
    decayed,
    sign_of_grad,
)


class SgdConstants(NamedTuple):
    lr: Any
    momentum: Any
    undampened: Any
    weight_decay: Any
    nesterov: Any
    sign: Any
    caution: Any


@triton.jit
def sgd_constants(lr, momentum, dampening, weight_decay, nesterov, maximize, step, norms):
    return SgdConstants(
        lr=lr,
        momentum=momentum,
        undampened=tl.where(step == 1, 1.0, 1 - dampening),
        weight_decay=weight_decay,
        nesterov=nesterov,
        sign=sign_of_grad(maximize),
        caution=caution_scale(norms),
    )


@triton.jit
def sgd(param, grad, states, constants):
    constants = SgdConstants(*constants)
    return param - constants.lr * decayed(constants.sign * grad, param, constants.weight_decay), states


@triton.jit
def sgd_momentum_direction(grad, momentum_buffer, constants):
    momentum_buffer = constants.momentum * momentum_buffer + constants.undampened * grad
    ahead = grad + constants.momentum * momentum_buffer
    return tl.where(constants.nesterov != 0, ahead, momentum_buffer), momentum_buffer


@triton.jit
def sgd_momentum(param, grad, states, constants):
    constants = SgdConstants(*constants)
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    direction, momentum_buffer = sgd_momentum_direction(grad, states[0], constants)
    return param - constants.lr * direction, (momentum_buffer,)


@triton.jit
def sgd_momentum_cautious(param, grad, states, constants):
    constants = SgdConstants(*constants)
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    direction, momentum_buffer = sgd_momentum_direction(grad, states[0], constants)
    direction = direction * (agreement(direction, grad) * constants.caution)
    return param - constants.lr * direction, (momentum_buffer,)


@triton.jit
def sgd_momentum_measure(param, grad, states, constants):
    constants = SgdConstants(*constants)
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    direction, _ = sgd_momentum_direction(grad, states[0], constants)
    return caution_measure(direction, grad)


RULES = {
    "sgd": Functions(sgd_constants, SgdConstants, sgd),
    "sgd_momentum": Functions(sgd_constants, SgdConstants, sgd_momentum),
    "sgd_momentum_cautious": Functions(sgd_constants, SgdConstants, sgd_momentum_cautious, sgd_momentum_measure),
}
