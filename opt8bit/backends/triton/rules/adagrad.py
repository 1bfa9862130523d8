"""Adagrad (Duchi, Hazan, Singer, 2011)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, decayed, quotient, sign_of_grad


class AdagradConstants(NamedTuple):
    lr: Any
    eps: Any
    weight_decay: Any
    sign: Any


@triton.jit
def adagrad_constants(lr, lr_decay, eps, weight_decay, maximize, step, norms):
    decayed_lr = lr / (1 + (step - 1) * lr_decay)
    return AdagradConstants(lr=decayed_lr, eps=eps, weight_decay=weight_decay, sign=sign_of_grad(maximize))


@triton.jit
def adagrad(param, grad, states, constants):
    constants = AdagradConstants(*constants)
    grad = decayed(constants.sign * grad, param, constants.weight_decay)
    sum = states[0] + grad * grad
    return param - constants.lr * quotient(grad, tl.sqrt_rn(sum), constants.eps), (sum,)


RULES = {"adagrad": Functions(adagrad_constants, AdagradConstants, adagrad)}
