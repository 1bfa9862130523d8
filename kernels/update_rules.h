// One functor per optimizer: a step of one vector of elements in float32, in the order of its paper. A rule
// knows neither how its states are stored nor the number of lanes. Included after one of simd/*.h.
//
// Hyper-parameters come as doubles, in the order of `Rule.hyper` of the Python rule of the same name. A rule that has
// norms names two quantities in `measure`, and is then made with the norms of both over the whole tensor.
#pragma once

#include <cmath>
#include <utility>

namespace opt8bit {
namespace {

using Floats = Simd::Floats;

// A state before the step: `value * scale`, where the scale is one number for a whole block, so that a rule which
// multiplies a state by a constant need not pay for the scale as well.
struct Scaled {
  Floats value, scale;
  operator Floats() const { return value * scale; }
};

inline Floats constant(double x) { return Simd::broadcast(static_cast<float>(x)); }

inline Floats sign_of(Floats x) {
  const Floats zero = constant(0);
  const Floats one_or_zero = Simd::select(Simd::greater(x, zero), constant(1), zero);
  return Simd::select(Simd::less(x, zero), constant(-1), one_or_zero);
}

// An exponential moving average: beta * average + (1 - beta) * x.
inline Floats average_with(Scaled average, Floats beta, Floats one_minus_beta, Floats x) {
  return Simd::fma(beta * average.scale, average.value, one_minus_beta * x);
}

struct WithoutNorms {
  static constexpr bool kHasNorms = false;
};

// Adam (Kingma & Ba, 2015), with weight decay added to the gradient.
struct Adam : WithoutNorms {
  static constexpr int kStates = 2;  // exp_avg, exp_avg_sq
  static constexpr bool kSigned[] = {true, false};

  Floats weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root_correction2, eps,
      negative_step_size;
  bool has_weight_decay;

  Adam(const double* hyper, double step, const double*) {
    const double lr = hyper[0], b1 = hyper[1], b2 = hyper[2];
    const double sign = hyper[5] != 0 ? -1 : 1;  // of the gradient, multiplied into whatever it meets
    weight_decay = constant(sign * hyper[4]);
    has_weight_decay = hyper[4] != 0;
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    inverse_root_correction2 = constant(1 / std::sqrt(1 - std::pow(b2, step)));
    eps = constant(hyper[3]);
    negative_step_size = constant(-lr / (1 - std::pow(b1, step)));
  }

  Floats decayed(Floats grad, Floats param) const {
    return has_weight_decay ? Simd::fma(weight_decay, param, grad) : grad;
  }
  Floats first_moment(Floats grad, Scaled exp_avg) const { return average_with(exp_avg, beta1, one_minus_beta1, grad); }
  Floats second_moment(Floats grad, Scaled exp_avg_sq) const {
    return Simd::fma(beta2 * exp_avg_sq.scale, exp_avg_sq.value, one_minus_beta2 * grad * grad);
  }
  Floats descend(Floats param, Floats exp_avg, Floats exp_avg_sq) const {
    const Floats denominator = Simd::fma(Simd::sqrt(exp_avg_sq), inverse_root_correction2, eps);
    return Simd::fma(negative_step_size, exp_avg / denominator, param);
  }

  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Floats& next_exp_avg,
              Floats& next_exp_avg_sq) const {
    grad = decayed(grad, param);
    next_exp_avg = first_moment(grad, exp_avg);
    next_exp_avg_sq = second_moment(grad, exp_avg_sq);
    param = descend(param, next_exp_avg, next_exp_avg_sq);
  }
};

struct AdamAmsgrad : Adam {
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr bool kSigned[] = {true, false, false};
  using Adam::Adam;

  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Scaled max_exp_avg_sq,
              Floats& next_exp_avg, Floats& next_exp_avg_sq, Floats& next_max_exp_avg_sq) const {
    grad = decayed(grad, param);
    next_exp_avg = first_moment(grad, exp_avg);
    next_exp_avg_sq = second_moment(grad, exp_avg_sq);
    next_max_exp_avg_sq = Simd::maximum(next_exp_avg_sq, max_exp_avg_sq);
    param = descend(param, next_exp_avg, next_max_exp_avg_sq);
  }
};

// AdamW (Loshchilov & Hutter, 2019): weight decay beside the gradient.
template <class Base>
struct Decoupled : Base {
  Floats decay;

  Decoupled(const double* hyper, double step, const double* norms)
      : Base(hyper, step, norms), decay(constant(1 - hyper[0] * hyper[4])) {
    this->has_weight_decay = false;
  }

  template <class... Moments>
  void update(Floats& param, Floats grad, Moments&&... moments) const {
    param = param * decay;
    Base::update(param, grad, std::forward<Moments>(moments)...);
  }
};
using AdamW = Decoupled<Adam>;
using AdamWAmsgrad = Decoupled<AdamAmsgrad>;

// Stochastic gradient descent.
struct Sgd : WithoutNorms {
  static constexpr int kStates = 0;
  static constexpr bool kSigned[] = {false};

  double sign;  // of the gradient, multiplied into whatever it meets
  Floats weight_decay, negative_lr;
  bool has_weight_decay;

  Sgd(const double* hyper, double, const double*)
      : sign(hyper[5] != 0 ? -1 : 1),
        weight_decay(constant(sign * hyper[3])),
        negative_lr(constant(-hyper[0])),
        has_weight_decay(hyper[3] != 0) {}

  Floats decayed(Floats grad, Floats param) const {
    return has_weight_decay ? Simd::fma(weight_decay, param, grad) : grad;
  }
  void update(Floats& param, Floats grad) const {
    param = Simd::fma(constant(sign) * negative_lr, decayed(grad, param), param);
  }
};

// With momentum, as torch.optim has it: the first step takes the gradient undampened.
struct SgdMomentum : Sgd {
  static constexpr int kStates = 1;  // momentum_buffer
  static constexpr bool kSigned[] = {true};

  Floats momentum, one_minus_dampening;
  bool nesterov;

  SgdMomentum(const double* hyper, double step, const double* norms)
      : Sgd(hyper, step, norms),
        momentum(constant(hyper[1])),
        one_minus_dampening(constant(sign * (step == 1 ? 1 : 1 - hyper[2]))),
        nesterov(hyper[4] != 0) {}

  void update(Floats& param, Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    grad = decayed(grad, param);
    next_momentum_buffer =
        Simd::fma(momentum * momentum_buffer.scale, momentum_buffer.value, one_minus_dampening * grad);
    const Floats direction =
        nesterov ? Simd::fma(momentum, next_momentum_buffer, constant(sign) * grad) : next_momentum_buffer;
    param = Simd::fma(negative_lr, direction, param);
  }
};

// RMSprop (Hinton, 2012). The centered one (Graves, 2013) divides by the root of the mean square less the squared
// mean. It keeps that variance itself: the difference of two rounded numbers could be negative.
template <bool kCentered, bool kMomentum>
struct RmsProp : WithoutNorms {
  static constexpr int kStates = 1 + kCentered + kMomentum;  // square_avg or variance, grad_avg, momentum_buffer
  static constexpr bool kSigned[] = {false, true, true};

  Floats negative_lr, alpha, one_minus_alpha, alpha_times_one_minus, eps, weight_decay, momentum, sign;
  bool has_weight_decay;

  RmsProp(const double* hyper, double, const double*) {
    const double sign_of_grad = hyper[5] != 0 ? -1 : 1;
    negative_lr = constant(-hyper[0]);
    alpha = constant(hyper[1]);
    one_minus_alpha = constant(1 - hyper[1]);
    alpha_times_one_minus = constant(hyper[1] * (1 - hyper[1]));
    eps = constant(hyper[2]);
    weight_decay = constant(hyper[3]);
    has_weight_decay = hyper[3] != 0;
    momentum = constant(hyper[4]);
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

// Adagrad (Duchi, Hazan, Singer, 2011).
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

// Lion (Chen et al., 2023).
struct Lion : WithoutNorms {
  static constexpr int kStates = 1;  // exp_avg
  static constexpr bool kSigned[] = {true};

  Floats negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, decay;

  Lion(const double* hyper, double, const double*) {
    const double sign_of_grad = hyper[4] != 0 ? -1 : 1;
    negative_lr = constant(-hyper[0]);
    beta1 = constant(hyper[1]);
    one_minus_beta1 = constant(sign_of_grad * (1 - hyper[1]));
    beta2 = constant(hyper[2]);
    one_minus_beta2 = constant(sign_of_grad * (1 - hyper[2]));
    decay = constant(1 - hyper[0] * hyper[3]);
  }

  void update(Floats& param, Floats grad, Scaled exp_avg, Floats& next_exp_avg) const {
    const Floats direction = sign_of(average_with(exp_avg, beta1, one_minus_beta1, grad));
    next_exp_avg = average_with(exp_avg, beta2, one_minus_beta2, grad);
    param = Simd::fma(negative_lr, direction, param * decay);
  }
};

// AdEMAMix (Pagliardini, Ablin, Grangier, 2024): AdamW with a second, slower average of the gradient.
struct AdEMAMix : WithoutNorms {
  static constexpr int kStates = 3;  // exp_avg, exp_avg_slow, exp_avg_sq
  static constexpr bool kSigned[] = {true, true, false};

  Floats negative_lr, beta1, one_minus_beta1, beta2, one_minus_beta2, beta3, one_minus_beta3, alpha,
      inverse_correction1, inverse_root_correction2, eps, decay;

  AdEMAMix(const double* hyper, double step, const double*) {
    const double lr = hyper[0], b1 = hyper[1], b2 = hyper[2];
    const double sign_of_grad = hyper[9] != 0 ? -1 : 1;
    const double b3 = scheduled_beta3(b1, hyper[3], hyper[6], step);
    negative_lr = constant(-lr);
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign_of_grad * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    beta3 = constant(b3);
    one_minus_beta3 = constant(sign_of_grad * (1 - b3));
    alpha = constant(hyper[5] > 0 ? std::fmin(step / hyper[5], 1) * hyper[4] : hyper[4]);
    inverse_correction1 = constant(1 / (1 - std::pow(b1, step)));
    inverse_root_correction2 = constant(1 / std::sqrt(1 - std::pow(b2, step)));
    eps = constant(hyper[7]);
    decay = constant(1 - lr * hyper[8]);
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

// LAMB (You et al., 2020): Adam whose update is made as long as the parameter, times lr.
struct Lamb {
  static constexpr bool kHasNorms = true;  // of the parameter, of its update
  static constexpr int kStates = 2;        // exp_avg, exp_avg_sq
  static constexpr bool kSigned[] = {true, false};

  Floats beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_correction1, inverse_root_correction2, eps,
      weight_decay, negative_lr;

  Lamb(const double* hyper, double step, const double* norms) {
    const double b1 = hyper[1], b2 = hyper[2], sign_of_grad = hyper[7] != 0 ? -1 : 1;
    const bool is_corrected = hyper[5] != 0, is_adapted = hyper[6] != 0;
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign_of_grad * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    inverse_correction1 = constant(is_corrected ? 1 / (1 - std::pow(b1, step)) : 1);
    inverse_root_correction2 = constant(is_corrected ? 1 / std::sqrt(1 - std::pow(b2, step)) : 1);
    eps = constant(hyper[3]);
    weight_decay = constant(hyper[4]);
    const bool is_zero = norms && (norms[0] == 0 || norms[1] == 0);
    negative_lr = constant(-hyper[0] * (norms && is_adapted && !is_zero ? norms[0] / norms[1] : 1));
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

// LARS (You, Gitman, Ginsburg, 2017): gradient descent whose step is in proportion to the parameter's norm.
struct Lars {
  static constexpr bool kHasNorms = true;  // of the parameter, of its gradient
  static constexpr int kStates = 0;
  static constexpr bool kSigned[] = {false};

  Floats sign, weight_decay, local_lr;

  Lars(const double* hyper, double, const double* norms)
      : sign(constant(hyper[7] != 0 ? -1 : 1)), weight_decay(constant(hyper[2])) {
    const bool is_adapted = norms && hyper[6] != 0 && norms[0] != 0 && norms[1] != 0;
    local_lr =
        constant(hyper[0] * (is_adapted ? hyper[3] * norms[0] / (norms[1] + hyper[2] * norms[0] + hyper[4]) : 1));
  }

  Floats scaled(Floats grad, Floats param) const { return local_lr * Simd::fma(weight_decay, param, grad * sign); }
  void measure(Floats param, Floats grad, Floats (&measured)[2]) const {
    measured[0] = param;
    measured[1] = grad;
  }
  void update(Floats& param, Floats grad) const { param = param - scaled(grad, param); }
};

struct LarsMomentum : Lars {
  static constexpr int kStates = 1;  // momentum_buffer
  static constexpr bool kSigned[] = {true};

  Floats momentum;
  bool nesterov;

  LarsMomentum(const double* hyper, double step, const double* norms)
      : Lars(hyper, step, norms), momentum(constant(hyper[1])), nesterov(hyper[5] != 0) {}

  void measure(Floats param, Floats grad, Scaled, Floats (&measured)[2]) const { Lars::measure(param, grad, measured); }
  void update(Floats& param, Floats grad, Scaled momentum_buffer, Floats& next_momentum_buffer) const {
    const Floats step = scaled(grad, param);
    next_momentum_buffer = Simd::fma(momentum * momentum_buffer.scale, momentum_buffer.value, step);
    param = param - (nesterov ? Simd::fma(momentum, next_momentum_buffer, step) : next_momentum_buffer);
  }
};

}  // namespace
}  // namespace opt8bit
