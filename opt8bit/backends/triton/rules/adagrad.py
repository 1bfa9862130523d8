"""Adagrad (Duchi, Hazan, Singer, 2011)."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import decayed, quotient, sign_of_grad


@triton.jit
def adagrad_constants(hyper, step, norms):
    lr, lr_decay, eps, weight_decay, maximize = hyper
    return lr / (1 + (step - 1) * lr_decay), eps, weight_decay, sign_of_grad(maximize)


@triton.jit
def adagrad(param, grad, states, constants):
    lr, eps, weight_decay, sign = constants
    grad = decayed(sign * grad, param, weight_decay)
    sum = states[0] + grad * grad
    return param - lr * quotient(grad, tl.sqrt_rn(sum), eps), (sum,)
