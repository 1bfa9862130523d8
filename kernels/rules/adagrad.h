// Adagrad (Duchi, Hazan, Singer, 2011).
#pragma once

#include "rules/rule.h"

namespace opt8bit {
namespace {

struct Adagrad : WithoutNorms {
  static constexpr const char* kName = "adagrad";
  OPT8BIT_HYPER(lr, lr_decay, eps, weight_decay, maximize);
  static constexpr int kStates = 1;  // sum
  static constexpr bool kSigned[] = {false};

  Floats negative_lr, eps, weight_decay, sign;
  bool has_weight_decay;

  Adagrad(const Hyper& hyper, double step, const double*)
      : negative_lr(constant(-hyper.lr / (1 + (step - 1) * hyper.lr_decay))),
        eps(constant(hyper.eps)),
        weight_decay(constant(hyper.weight_decay)),
        sign(constant(hyper.maximize != 0 ? -1 : 1)),
        has_weight_decay(hyper.weight_decay != 0) {}

  void update(Floats& param, Floats grad, Scaled sum, Floats& next_sum) const {
    grad = grad * sign;
    if (has_weight_decay) grad = Simd::fma(weight_decay, param, grad);
    next_sum = Simd::fma(grad, grad, sum);
    param = Simd::fma(negative_lr, grad / (Simd::sqrt(next_sum) + eps), param);
  }
};

}  // namespace
}  // namespace opt8bit
