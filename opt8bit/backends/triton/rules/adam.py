"""Adam (Kingma & Ba, 2015), with weight decay added to the gradient; AdamW (Loshchilov & Hutter, 2019), beside it."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import decayed, power, quotient, sign_of_grad


@triton.jit
def adam_constants(hyper, step, norms):
    lr, beta1, beta2, eps, weight_decay, maximize = hyper
    correction1 = 1 - power(beta1, step)
    inverse_root2 = 1 / tl.sqrt(1 - power(beta2, step))
    return (
        sign_of_grad(maximize),
        weight_decay,
        1 - lr * weight_decay,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        inverse_root2,
        eps,
        lr / correction1,
    )


@triton.jit
def adam_moments(grad, exp_avg, exp_avg_sq, constants):
    exp_avg = constants[3] * exp_avg + constants[4] * grad
    exp_avg_sq = constants[5] * exp_avg_sq + constants[6] * grad * grad
    return exp_avg, exp_avg_sq


@triton.jit
def adam_descend(param, exp_avg, exp_avg_sq, constants):
    return param - constants[9] * quotient(exp_avg, tl.sqrt_rn(exp_avg_sq) * constants[7], constants[8])


@triton.jit
def adam(param, grad, states, constants):
    exp_avg, exp_avg_sq = states
    grad = decayed(constants[0] * grad, param, constants[1])
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    return adam_descend(param, exp_avg, exp_avg_sq, constants), (exp_avg, exp_avg_sq)


@triton.jit
def adam_amsgrad(param, grad, states, constants):
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    grad = decayed(constants[0] * grad, param, constants[1])
    exp_avg, exp_avg_sq = adam_moments(grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    return adam_descend(param, exp_avg, max_exp_avg_sq, constants), (exp_avg, exp_avg_sq, max_exp_avg_sq)


@triton.jit
def adamw(param, grad, states, constants):
    exp_avg, exp_avg_sq = states
    exp_avg, exp_avg_sq = adam_moments(constants[0] * grad, exp_avg, exp_avg_sq, constants)
    return adam_descend(param * constants[2], exp_avg, exp_avg_sq, constants), (exp_avg, exp_avg_sq)


@triton.jit
def adamw_amsgrad(param, grad, states, constants):
    exp_avg, exp_avg_sq, max_exp_avg_sq = states
    exp_avg, exp_avg_sq = adam_moments(constants[0] * grad, exp_avg, exp_avg_sq, constants)
    max_exp_avg_sq = tl.maximum(max_exp_avg_sq, exp_avg_sq, propagate_nan=tl.PropagateNan.ALL)
    param = adam_descend(param * constants[2], exp_avg, max_exp_avg_sq, constants)
    return param, (exp_avg, exp_avg_sq, max_exp_avg_sq)
