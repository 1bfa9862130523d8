// LARS (You, Gitman, Ginsburg, 2017): gradient descent whose step is in proportion to the parameter's norm.
#pragma once

#include "rules/rule.h"

namespace opt8bit {
namespace {

struct Lars {
  static constexpr const char* kName = "lars";
  OPT8BIT_HYPER(lr, momentum, weight_decay, trust_coefficient, eps, nesterov, adapt, maximize);
  static constexpr bool kHasNorms = true;  // of the parameter, of its gradient
  static constexpr int kStates = 0;
  static constexpr bool kSigned[] = {false};

  Floats sign, weight_decay, local_lr;

  Lars(const Hyper& hyper, double, const double* norms)
      : sign(constant(hyper.maximize != 0 ? -1 : 1)), weight_decay(constant(hyper.weight_decay)) {
    const bool is_adapted = norms && hyper.adapt != 0 && norms[0] != 0 && norms[1] != 0;
    local_lr = constant(
        hyper.lr *
        (is_adapted ? hyper.trust_coefficient * norms[0] / (norms[1] + hyper.weight_decay * norms[0] + hyper.eps) : 1));
  }

  Floats scaled(Floats grad, Floats param) const { return local_lr * Simd::fma(weight_decay, param, grad * sign); }
  void measure(Floats param, Floats grad, Floats (&measured)[2]) const {
    measured[0] = param;
    measured[1] = grad;
  }
  void update(Floats& param, Floats grad) const { param = param - scaled(grad, param); }
};

struct LarsMomentum : Lars {
  static constexpr const char* kName = "lars_momentum";
  static constexpr int kStates = 1;  // momentum_buffer
  static constexpr bool kSigned[] = {true};

  Floats momentum;
  bool nesterov;

  LarsMomentum(const Hyper& hyper, double step, const double* norms)
      : Lars(hyper, step, norms), momentum(constant(hyper.momentum)), nesterov(hyper.nesterov != 0) {}

  void measure(Floats param, Floats grad, Scaled, Floats (&measured)[2]) const { Lars::measure(param, grad, measured); }
  void update(Floats& param, Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    const Floats step = scaled(grad, param);
    next_momentum_buffer = Simd::fma(momentum * momentum_buffer.scale, momentum_buffer.value, step);
    param = param - (nesterov ? Simd::fma(momentum, next_momentum_buffer, step) : next_momentum_buffer);
  }
};

}  // namespace
}  // namespace opt8bit
