// Lion (Chen et al., 2023).
#pragma once

#include "rules/caution.h"

namespace opt8bit {
namespace {

struct Lion : WithoutNorms {
  static constexpr const char* kName = "lion";
  OPT8BIT_HYPER(lr, beta1, beta2, weight_decay, maximize);
  static constexpr int kStates = 1;  // exp_avg
  static constexpr bool kSigned[] = {true};

  Floats negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay;

  Lion(const Hyper& hyper, double, const double*) {
    const double sign_of_grad = hyper.maximize != 0 ? -1 : 1;
    negative_lr = constant(-hyper.lr);
    beta1 = constant(hyper.beta1);
    one_minus_beta1 = constant(sign_of_grad * (1 - hyper.beta1));
    beta2 = constant(hyper.beta2);
    one_minus_beta2 = constant(sign_of_grad * (1 - hyper.beta2));
    decay = constant(1 - hyper.lr * hyper.weight_decay);
  }

  Floats direction(Floats grad, Scaled exp_avg) const {
    return sign_of(average_with(exp_avg, beta1, one_minus_beta1, grad));
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Floats& next_exp_avg) const {
    const Floats step = direction(grad, exp_avg);
    next_exp_avg = average_with(exp_avg, beta2, one_minus_beta2, grad);
    param = Simd::fma(negative_lr, step, param * decay);
  }
};

struct LionCautious : Lion {
  static constexpr const char* kName = "lion_cautious";
  static constexpr bool kHasNorms = true;

  Caution caution;

  LionCautious(const Hyper& hyper, double step, const double* norms)
      : Lion(hyper, step, norms), caution(hyper.maximize, norms) {}

  void measure(Floats, Floats grad, Scaled exp_avg, Floats (&measured)[2]) const {
    caution.measure(direction(grad, exp_avg), grad, measured);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Floats& next_exp_avg) const {
    const Floats step = direction(grad, exp_avg);
    next_exp_avg = average_with(exp_avg, beta2, one_minus_beta2, grad);
    param = Simd::fma(negative_lr, step * caution.mask(step, grad), param * decay);
  }
};

}  // namespace
}  // namespace opt8bit
