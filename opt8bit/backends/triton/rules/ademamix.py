"""AdEMAMix (Pagliardini, Ablin, Grangier, 2024): AdamW with a second, slower average of the gradient."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import Functions, power, quotient, sign_of_grad


class AdEMAMixConstants(NamedTuple):
    lr: Any
    beta1: Any
    rest1: Any
    beta2: Any
    rest2: Any
    beta3: Any
    rest3: Any
    alpha: Any
    inverse1: Any
    inverse_root2: Any
    eps: Any
    decay: Any
    sign: Any


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
def ademamix_constants(lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, maximize, step, norms):
    beta3 = scheduled_beta3(beta1, beta3, t_beta3, step)
    return AdEMAMixConstants(
        lr=lr,
        beta1=beta1,
        rest1=1 - beta1,
        beta2=beta2,
        rest2=1 - beta2,
        beta3=beta3,
        rest3=1 - beta3,
        alpha=tl.where(t_alpha > 0, alpha * tl.minimum(step / tl.maximum(t_alpha, 1.0), 1.0), alpha),
        inverse1=1 / (1 - power(beta1, step)),
        inverse_root2=1 / tl.sqrt(1 - power(beta2, step)),
        eps=eps,
        decay=1 - lr * weight_decay,
        sign=sign_of_grad(maximize),
    )


@triton.jit
def ademamix(param, grad, states, constants):
    constants = AdEMAMixConstants(*constants)
    exp_avg, exp_avg_slow, exp_avg_sq = states
    grad = constants.sign * grad
    exp_avg = constants.beta1 * exp_avg + constants.rest1 * grad
    exp_avg_slow = constants.beta3 * exp_avg_slow + constants.rest3 * grad
    exp_avg_sq = constants.beta2 * exp_avg_sq + constants.rest2 * grad * grad
    root = tl.sqrt_rn(exp_avg_sq) * constants.inverse_root2
    direction = quotient(exp_avg * constants.inverse1 + constants.alpha * exp_avg_slow, root, constants.eps)
    return param * constants.decay - constants.lr * direction, (exp_avg, exp_avg_slow, exp_avg_sq)


RULES = {"ademamix": Functions(ademamix_constants, AdEMAMixConstants, ademamix)}
