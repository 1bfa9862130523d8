// Stochastic gradient descent.
#pragma once

#include "rules/caution.h"

namespace opt8bit {
namespace {

struct Sgd : WithoutNorms {
  static constexpr const char* kName = "sgd";
  OPT8BIT_HYPER(lr, momentum, dampening, weight_decay, nesterov, maximize);
  static constexpr int kStates = 0;
  static constexpr bool kSigned[] = {false};

  double sign;  // of the gradient, multiplied into whatever it meets
  Floats weight_decay, negative_lr;
  bool has_weight_decay;

  Sgd(const Hyper& hyper, double, const double*)
      : sign(hyper.maximize != 0 ? -1 : 1),
        weight_decay(constant(sign * hyper.weight_decay)),
        negative_lr(constant(-hyper.lr)),
        has_weight_decay(hyper.weight_decay != 0) {}

  Floats decayed(Floats grad, Floats param) const {
    return has_weight_decay ? Simd::fma(weight_decay, param, grad) : grad;
  }
  void update(Floats& param, Floats grad) const {
    param = Simd::fma(constant(sign) * negative_lr, decayed(grad, param), param);
  }
};

// With momentum, as torch.optim has it: the first step takes the gradient undampened.
struct SgdMomentum : Sgd {
  static constexpr const char* kName = "sgd_momentum";
  static constexpr int kStates = 1;  // momentum_buffer
  static constexpr bool kSigned[] = {true};

  Floats momentum, one_minus_dampening;
  bool nesterov;

  SgdMomentum(const Hyper& hyper, double step, const double* norms)
      : Sgd(hyper, step, norms),
        momentum(constant(hyper.momentum)),
        one_minus_dampening(constant(sign * (step == 1 ? 1 : 1 - hyper.dampening))),
        nesterov(hyper.nesterov != 0) {}

  // Of the gradient with its decay.
  Floats direction(Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    next_momentum_buffer =
        Simd::fma(momentum * momentum_buffer.scale, momentum_buffer.value, one_minus_dampening * grad);
    return nesterov ? Simd::fma(momentum, next_momentum_buffer, constant(sign) * grad) : next_momentum_buffer;
  }
  void update(Floats& param, Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    grad = decayed(grad, param);
    param = Simd::fma(negative_lr, direction(grad, momentum_buffer, next_momentum_buffer), param);
  }
};

struct SgdMomentumCautious : SgdMomentum {
  static constexpr const char* kName = "sgd_momentum_cautious";
  static constexpr bool kHasNorms = true;

  Caution caution;

  SgdMomentumCautious(const Hyper& hyper, double step, const double* norms)
      : SgdMomentum(hyper, step, norms), caution(hyper.maximize, norms) {}

  void measure(Floats param, Floats grad, Scaled momentum_buffer, Floats (&measured)[2]) const {
    Floats next_momentum_buffer;
    grad = decayed(grad, param);
    caution.measure(direction(grad, momentum_buffer, next_momentum_buffer), grad, measured);
  }
  void update(Floats& param, Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    grad = decayed(grad, param);
    const Floats step = direction(grad, momentum_buffer, next_momentum_buffer);
    param = Simd::fma(negative_lr, step * caution.mask(step, grad), param);
  }
};

}  // namespace
}  // namespace opt8bit
