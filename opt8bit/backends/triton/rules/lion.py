"""Lion (Chen et al., 2023)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, agreement, caution_measure, caution_scale, sign_of_grad


class LionConstants(NamedTuple):
    lr: Any
    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    decay: Any
    sign: Any
    caution: Any


@triton.jit
def lion_constants(lr, beta1, beta2, weight_decay, maximize, step, norms):
    return LionConstants(
        lr=lr,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        decay=1 - lr * weight_decay,
        sign=sign_of_grad(maximize),
        caution=caution_scale(norms),
    )


@triton.jit
def lion_direction(grad, exp_avg, constants):
    mixed = constants.beta1 * exp_avg + constants.rest1 * grad
    # torch.sign has 0 for a NaN, too.
    return (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)


@triton.jit
def lion(param, grad, states, constants):
    constants = LionConstants(*constants)
    grad = constants.sign * grad
    direction = lion_direction(grad, states[0], constants)
    exp_avg = constants.beta2 * states[0] + constants.rest2 * grad
    return param * constants.decay - constants.lr * direction, (exp_avg,)


@triton.jit
def lion_cautious(param, grad, states, constants):
    constants = LionConstants(*constants)
    grad = constants.sign * grad
    direction = lion_direction(grad, states[0], constants)
    direction = direction * (agreement(direction, grad) * constants.caution)
    exp_avg = constants.beta2 * states[0] + constants.rest2 * grad
    return param * constants.decay - constants.lr * direction, (exp_avg,)


@triton.jit
def lion_measure(param, grad, states, constants):
    constants = LionConstants(*constants)
    grad = constants.sign * grad
    return caution_measure(lion_direction(grad, states[0], constants), grad)


RULES = {
    "lion": Functions(lion_constants, LionConstants, lion),
    "lion_cautious": Functions(lion_constants, LionConstants, lion_cautious, lion_measure),
}
