"""Lion (Chen et al., 2023)."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import sign_of_grad


@triton.jit
def lion_constants(hyper, step, norms):
    lr, beta1, beta2, weight_decay, maximize = hyper
    return lr, beta1, 1 - beta1, beta2, 1 - beta2, 1 - lr * weight_decay, sign_of_grad(maximize)


@triton.jit
def lion(param, grad, states, constants):
    lr, beta1, rest1, beta2, rest2, decay, sign = constants
    grad = sign * grad
    mixed = beta1 * states[0] + rest1 * grad
    # torch.sign has 0 for a NaN, too.
    direction = (mixed > 0).to(tl.float32) - (mixed < 0).to(tl.float32)
    return param * decay - lr * direction, (beta2 * states[0] + rest2 * grad,)
