"""AdEMAMix (Pagliardini, Ablin, Grangier, 2024): AdamW with a second, slower average of the gradient."""

import triton
import triton.language as tl

from opt8bit.backends.triton.rules.rule import power, quotient, sign_of_grad


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
