// RMSprop (Hinton, 2012). The centered one (Graves, 2013) divides by the root of the mean square less the squared
// mean. It keeps that variance itself: the difference of two rounded numbers could be negative.
#pragma once

#include "rules/rule.h"

namespace opt8bit {
namespace {

template <bool kCentered, bool kMomentum>
struct RmsProp : WithoutNorms {
  static constexpr const char* kName = kCentered ? (kMomentum ? "rmsprop_centered_momentum" : "rmsprop_centered")
                                                 : (kMomentum ? "rmsprop_momentum" : "rmsprop");
  OPT8BIT_HYPER(lr, alpha, eps, weight_decay, momentum, maximize);
  static constexpr int kStates = 1 + kCentered + kMomentum;  // square_avg or variance, grad_avg, momentum_buffer
  static constexpr bool kSigned[] = {false, true, true};

  Floats negative_lr, alpha, one_minus_alpha, alpha_times_one_minus, eps, weight_decay, momentum, sign;
  bool has_weight_decay;

  RmsProp(const Hyper& hyper, double, const double*) {
    const double sign_of_grad = hyper.maximize != 0 ? -1 : 1;
    negative_lr = constant(-hyper.lr);
    alpha = constant(hyper.alpha);
    one_minus_alpha = constant(1 - hyper.alpha);
    alpha_times_one_minus = constant(hyper.alpha * (1 - hyper.alpha));
    eps = constant(hyper.eps);
    weight_decay = constant(hyper.weight_decay);
    has_weight_decay = hyper.weight_decay != 0;
    momentum = constant(hyper.momentum);
    sign = constant(sign_of_grad);
  }

  Floats decayed(Floats grad, Floats param) const {
    grad = grad * sign;
    return has_weight_decay ? Simd::fma(weight_decay, param, grad) : grad;
  }
  Floats direction(Floats grad, Floats mean_square) const { return grad / (Simd::sqrt(mean_square) + eps); }
  Floats mean_square(Floats grad, Scaled square_avg) const {
    return average_with(square_avg, alpha, one_minus_alpha * grad, grad);
  }
  Floats variance(Floats grad, Scaled variance, Scaled grad_avg) const {
    const Floats deviation = grad - grad_avg;
    return average_with(variance, alpha, alpha_times_one_minus * deviation, deviation);
  }

  void update(Floats& param, Floats grad, Scaled square_avg, Floats& next_square_avg) const {
    grad = decayed(grad, param);
    next_square_avg = mean_square(grad, square_avg);
    param = Simd::fma(negative_lr, direction(grad, next_square_avg), param);
  }
  void update(Floats& param, Floats grad, Scaled first, Scaled second, Floats& next_first, Floats& next_second) const {
    grad = decayed(grad, param);
    Floats step = grad;
    if constexpr (kCentered) {
      next_first = variance(grad, first, second);
      next_second = average_with(second, alpha, one_minus_alpha, grad);
      step = direction(grad, next_first);
    } else {
      next_first = mean_square(grad, first);
      next_second = step = Simd::fma(momentum * second.scale, second.value, direction(grad, next_first));
    }
    param = Simd::fma(negative_lr, step, param);
  }
  void update(Floats& param, Floats grad, Scaled old_variance, Scaled grad_avg, Scaled momentum_buffer,
              Floats& next_variance, Floats& next_grad_avg, Floats& next_momentum_buffer) const {
    grad = decayed(grad, param);
    next_variance = variance(grad, old_variance, grad_avg);
    next_grad_avg = average_with(grad_avg, alpha, one_minus_alpha, grad);
    next_momentum_buffer =
        Simd::fma(momentum * momentum_buffer.scale, momentum_buffer.value, direction(grad, next_variance));
    param = Simd::fma(negative_lr, next_momentum_buffer, param);
  }
};

}  // namespace
}  // namespace opt8bit
