// AdEMAMix (Pagliardini, Ablin, Grangier, 2024): AdamW with a second, slower average of the gradient.
#pragma once

#include <cmath>

#include "rules/rule.h"

namespace opt8bit {
namespace {

struct AdEMAMix : WithoutNorms {
  static constexpr const char* kName = "ademamix";
  OPT8BIT_HYPER(lr, beta1, beta2, beta3, alpha, t_alpha, t_beta3, eps, weight_decay, maximize);
  static constexpr int kStates = 3;  // exp_avg, exp_avg_slow, exp_avg_sq
  static constexpr bool kSigned[] = {true, true, false};

  Floats negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, alpha,
      inverse_correction1, inverse_root_correction2, eps, decay;

  AdEMAMix(const Hyper& hyper, double step, const double*) {
    const double lr = hyper.lr, b1 = hyper.beta1, b2 = hyper.beta2;
    const double sign_of_grad = hyper.maximize != 0 ? -1 : 1;
    const double b3 = scheduled_beta3(b1, hyper.beta3, hyper.t_beta3, step);
    negative_lr = constant(-lr);
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign_of_grad * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    beta3 = constant(b3);
    one_minus_beta3 = constant(sign_of_grad * (1 - b3));
    alpha = constant(hyper.t_alpha > 0 ? std::fmin(step / hyper.t_alpha, 1) * hyper.alpha : hyper.alpha);
    inverse_correction1 = constant(1 / (1 - std::pow(b1, step)));
    inverse_root_correction2 = constant(1 / std::sqrt(1 - std::pow(b2, step)));
    eps = constant(hyper.eps);
    decay = constant(1 - lr * hyper.weight_decay);
  }

  // Rises from beta1 so that the half-life of the average grows linearly over t_beta3 steps.
  static double scheduled_beta3(double beta1, double beta3, double t_beta3, double step) {
    if (step >= t_beta3 || beta3 == 0) return beta3;
    const double ratio = step / t_beta3;
    if (beta1 == 0) return std::pow(beta3, 1 / ratio);  // the limit
    const double log1 = std::log(beta1), log3 = std::log(beta3);
    return std::fmin(std::exp(log1 * log3 / ((1 - ratio) * log3 + ratio * log1)), beta3);
  }

  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_slow, Scaled exp_avg_sq, Floats& next_exp_avg,
              Floats& next_exp_avg_slow, Floats& next_exp_avg_sq) const {
    next_exp_avg = average_with(exp_avg, beta1, one_minus_beta1, grad);
    next_exp_avg_slow = average_with(exp_avg_slow, beta3, one_minus_beta3, grad);
    next_exp_avg_sq = average_with(exp_avg_sq, beta2, one_minus_beta2 * grad, grad);
    const Floats direction = Simd::fma(alpha, next_exp_avg_slow, next_exp_avg * inverse_correction1);
    const Floats denominator = Simd::fma(Simd::sqrt(next_exp_avg_sq), inverse_root_correction2, eps);
    param = Simd::fma(negative_lr, direction / denominator, param * decay);
  }
};

}  // namespace
}  // namespace opt8bit
