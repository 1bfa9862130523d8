// LAMB (You et al., 2020): Adam whose update is made as long as the parameter, times lr.
#pragma once

#include <cmath>

#include "rules/rule.h"

namespace opt8bit {
namespace {

struct Lamb {
  static constexpr const char* kName = "lamb";
  OPT8BIT_HYPER(lr, beta1, beta2, eps, weight_decay, bias_correction, adapt, maximize);
  static constexpr bool kHasNorms = true;  // of the parameter, of its update
  static constexpr int kStates = 2;        // exp_avg, exp_avg_sq
  static constexpr bool kSigned[] = {true, false};

  Floats beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_correction1, inverse_root_correction2, eps,
      weight_decay, negative_lr;

  Lamb(const Hyper& hyper, double step, const double* norms) {
    const double b1 = hyper.beta1, b2 = hyper.beta2, sign_of_grad = hyper.maximize != 0 ? -1 : 1;
    const bool is_corrected = hyper.bias_correction != 0, is_adapted = hyper.adapt != 0;
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign_of_grad * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    inverse_correction1 = constant(is_corrected ? 1 / (1 - std::pow(b1, step)) : 1);
    inverse_root_correction2 = constant(is_corrected ? 1 / std::sqrt(1 - std::pow(b2, step)) : 1);
    eps = constant(hyper.eps);
    weight_decay = constant(hyper.weight_decay);
    const bool is_zero = norms && (norms[0] == 0 || norms[1] == 0);
    negative_lr = constant(-hyper.lr * (norms && is_adapted && !is_zero ? norms[0] / norms[1] : 1));
  }

  Floats direction(Floats param, Floats exp_avg, Floats exp_avg_sq) const {
    const Floats denominator = Simd::fma(Simd::sqrt(exp_avg_sq), inverse_root_correction2, eps);
    return Simd::fma(weight_decay, param, exp_avg * inverse_correction1 / denominator);
  }
  void measure(Floats param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Floats (&measured)[2]) const {
    const Floats next_exp_avg = average_with(exp_avg, beta1, one_minus_beta1, grad);
    const Floats next_exp_avg_sq = average_with(exp_avg_sq, beta2, one_minus_beta2 * grad, grad);
    measured[0] = param;
    measured[1] = direction(param, next_exp_avg, next_exp_avg_sq);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Floats& next_exp_avg,
              Floats& next_exp_avg_sq) const {
    next_exp_avg = average_with(exp_avg, beta1, one_minus_beta1, grad);
    next_exp_avg_sq = average_with(exp_avg_sq, beta2, one_minus_beta2 * grad, grad);
    param = Simd::fma(negative_lr, direction(param, next_exp_avg, next_exp_avg_sq), param);
  }
};

}  // namespace
}  // namespace opt8bit
