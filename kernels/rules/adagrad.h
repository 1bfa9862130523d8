// Adagrad (Duchi, Hazan, Singer, 2011).
#pragma once

#include "rules/rule.h"

namespace opt8bit {
namespace {

struct Adagrad : WithoutNorms {
  static constexpr int kStates = 1;  // sum
  static constexpr bool kSigned[] = {false};

  Floats negative_lr, eps, weight_decay, sign;
  bool has_weight_decay;

  Adagrad(const double* hyper, double step, const double*)
      : negative_lr(constant(-hyper[0] / (1 + (step - 1) * hyper[1]))),
        eps(constant(hyper[2])),
        weight_decay(constant(hyper[3])),
        sign(constant(hyper[4] != 0 ? -1 : 1)),
        has_weight_decay(hyper[3] != 0) {}

  void update(Floats& param, Floats grad, Scaled sum, Floats& next_sum) const {
    grad = grad * sign;
    if (has_weight_decay) grad = Simd::fma(weight_decay, param, grad);
    next_sum = Simd::fma(grad, grad, sum);
    param = Simd::fma(negative_lr, grad / (Simd::sqrt(next_sum) + eps), param);
  }
};

}  // namespace
}  // namespace opt8bit
