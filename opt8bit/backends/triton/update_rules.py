"""The rules of kernels/update_rules.h for a GPU, by the same names: a step of elements in float32.

A rule has two functions. Its constants are numbers of one tensor's step, in float64, from the hyper-parameters in the
order of ``Rule.hyper``, the step, and the norms over the whole tensor, if the rule measures some; before they are
known, the norms are zero. Its update takes the elements, the states in the order of ``Rule.states``, and those numbers
in float32; and a measure, likewise, what the norms are of.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Functions(NamedTuple):
    constants: Any  # (hyper, step, norms) -> the constants
    constant_count: int
    update: Any  # (param, grad, states, constants) -> (param, states)
    measure: Any = None  # (param, grad, states, constants) -> two tensors


@triton.jit
def power(base, exponent):
    """base^exponent of float64 numbers, neither negative."""
    result = tl.exp2(tl.log2(tl.where(base > 0, base, 1.0)) * exponent)
    return tl.where((base > 0) | (exponent == 0), result, 0.0)


@triton.jit
def sign_of_grad(maximize):
    return tl.where(maximize != 0, -1.0, 1.0).to(tl.float64)


@triton.jit
def decayed(grad, param, weight_decay):
    return tl.where(weight_decay != 0, grad + weight_decay * param, grad)


@triton.jit
def quotient(x, root, eps):
    return tl.div_rn(x, root + eps)


# Adam (Kingma & Ba, 2015), with weight decay added to the gradient; AdamW (Loshchilov & Hutter, 2019), beside it.
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


# Stochastic gradient descent; with momentum, as torch.optim has it: the first step takes the gradient undampened.
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


# RMSprop (Hinton, 2012); centered (Graves, 2013), where the variance is kept by its own recurrence.
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


# Adagrad (Duchi, Hazan, Singer, 2011).
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


# Lion (Chen et al., 2023).
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


# AdEMAMix (Pagliardini, Ablin, Grangier, 2024): AdamW with a second, slower average of the gradient.
@triton.jit
def scheduled_beta3(beta1, beta3, t_beta3, step):
    """Rises from beta1 so that the half-life of the average grows linearly over t_beta3 steps."""
    ratio = tl.where(step < t_beta3, step / tl.maximum(t_beta3, 1.0), 1.0)
    log1, log3 = tl.log(tl.where(beta1 > 0, beta1, 0.5)), tl.log(tl.where(beta3 > 0, beta3, 0.5))
    mixed = (1 - ratio) * log3 + ratio * log1
    risen = tl.minimum(tl.exp(log1 * log3 / tl.where(mixed < 0, mixed, -1.0)), beta3)
    risen = tl.where(beta1 > 0, risen, power(beta3, 1 / ratio))  # the limit
    return tl.where((step < t_beta3) & (beta3 > 0), risen, beta3)


@triton.jit
def ademamix_constants(hyper, step, norms):
    lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, maximize = hyper
    beta3 = scheduled_beta3(beta1, beta3, t_beta3, step)
    alpha = tl.where(t_alpha > 0, alpha * tl.minimum(step / tl.maximum(t_alpha, 1.0), 1.0), alpha)
    inverse_correction1 = 1 / (1 - power(beta1, step))
    inverse_root2 = 1 / tl.sqrt(1 - power(beta2, step))
    return (
        lr,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        beta3,
        1 - beta3,
        alpha,
        inverse_correction1,
        inverse_root2,
        eps,
        1 - lr * weight_decay,
        sign_of_grad(maximize),
    )


@triton.jit
def ademamix(param, grad, states, constants):
    exp_avg, exp_avg_slow, exp_avg_sq = states
    lr, beta1, rest1, beta2, rest2, beta3, rest3, alpha, inverse1, inverse_root2, eps, decay, sign = constants
    grad = sign * grad
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_slow = beta3 * exp_avg_slow + rest3 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    direction = quotient(exp_avg * inverse1 + alpha * exp_avg_slow, tl.sqrt_rn(exp_avg_sq) * inverse_root2, eps)
    return param * decay - lr * direction, (exp_avg, exp_avg_slow, exp_avg_sq)


# LAMB (You et al., 2020): Adam whose update is made as long as the parameter, times lr.
@triton.jit
def lamb_constants(hyper, step, norms):
    lr, beta1, beta2, eps, weight_decay, bias_correction, adapt, maximize = hyper
    correction1 = tl.where(bias_correction != 0, 1 - power(beta1, step), 1.0)
    correction2 = tl.where(bias_correction != 0, 1 - power(beta2, step), 1.0)
    is_adapted = (adapt != 0) & (norms[0] != 0) & (norms[1] != 0)
    trust_ratio = tl.where(is_adapted, norms[0] / tl.where(norms[1] != 0, norms[1], 1.0), 1.0)
    return (
        lr * trust_ratio,
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        1 / correction1,
        1 / tl.sqrt(correction2),
        eps,
        weight_decay,
        sign_of_grad(maximize),
    )


@triton.jit
def lamb_direction(param, grad, states, constants):
    exp_avg, exp_avg_sq = states
    _, beta1, rest1, beta2, rest2, inverse1, inverse_root2, eps, weight_decay, sign = constants
    grad = sign * grad
    exp_avg = beta1 * exp_avg + rest1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + rest2 * grad * grad
    direction = quotient(exp_avg * inverse1, tl.sqrt_rn(exp_avg_sq) * inverse_root2, eps) + weight_decay * param
    return direction, exp_avg, exp_avg_sq


@triton.jit
def lamb_measure(param, grad, states, constants):
    direction, _, _ = lamb_direction(param, grad, states, constants)
    return param, direction


@triton.jit
def lamb(param, grad, states, constants):
    direction, exp_avg, exp_avg_sq = lamb_direction(param, grad, states, constants)
    return param - constants[0] * direction, (exp_avg, exp_avg_sq)


# LARS (You, Gitman, Ginsburg, 2017): gradient descent whose step is in proportion to the parameter's norm.
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


RULES = {
    "adam": Functions(adam_constants, 10, adam),
    "adam_amsgrad": Functions(adam_constants, 10, adam_amsgrad),
    "adamw": Functions(adam_constants, 10, adamw),
    "adamw_amsgrad": Functions(adam_constants, 10, adamw_amsgrad),
    "sgd": Functions(sgd_constants, 6, sgd),
    "sgd_momentum": Functions(sgd_constants, 6, sgd_momentum),
    "rmsprop": Functions(rmsprop_constants, 8, rmsprop),
    "rmsprop_momentum": Functions(rmsprop_constants, 8, rmsprop_momentum),
    "rmsprop_centered": Functions(rmsprop_constants, 8, rmsprop_centered),
    "rmsprop_centered_momentum": Functions(rmsprop_constants, 8, rmsprop_centered_momentum),
    "adagrad": Functions(adagrad_constants, 4, adagrad),
    "lion": Functions(lion_constants, 7, lion),
    "ademamix": Functions(ademamix_constants, 13, ademamix),
    "lamb": Functions(lamb_constants, 10, lamb, lamb_measure),
    "lars": Functions(lars_constants, 5, lars, lars_measure),
    "lars_momentum": Functions(lars_constants, 5, lars_momentum, lars_measure),
}
