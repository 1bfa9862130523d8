// Adam and AdamW, each with AMSGrad or without.
#pragma once

#include <cmath>
#include <utility>

#include "rules/caution.h"

namespace opt8bit {
namespace {

// Adam (Kingma & Ba, 2015), with weight decay added to the gradient.
struct Adam : WithoutNorms {
  static constexpr const char* kName = "adam";
  OPT8BIT_HYPER(lr, beta1, beta2, eps, weight_decay, maximize);
  static constexpr int kStates = 2;  // exp_avg, exp_avg_sq
  static constexpr bool kSigned[] = {true, false};

  Floats weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root_correction2, eps,
      negative_step_size;
  bool has_weight_decay;

  Adam(const Hyper& hyper, double step, const double*) {
    const double lr = hyper.lr, b1 = hyper.beta1, b2 = hyper.beta2;
    const double sign = hyper.maximize != 0 ? -1 : 1;  // of the gradient, multiplied into whatever it meets
    weight_decay = constant(sign * hyper.weight_decay);
    has_weight_decay = hyper.weight_decay != 0;
    beta1 = constant(b1);
    one_minus_beta1 = constant(sign * (1 - b1));
    beta2 = constant(b2);
    one_minus_beta2 = constant(1 - b2);
    inverse_root_correction2 = constant(1 / std::sqrt(1 - std::pow(b2, step)));
    eps = constant(hyper.eps);
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
  static constexpr const char* kName = "adam_amsgrad";
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

struct AdamCautious : Adam {
  static constexpr const char* kName = "adam_cautious";
  static constexpr bool kHasNorms = true;

  Caution caution;

  AdamCautious(const Hyper& hyper, double step, const double* norms)
      : Adam(hyper, step, norms), caution(hyper.maximize, norms) {}

  void measure(Floats param, Floats grad, Scaled exp_avg, Scaled, Floats (&measured)[2]) const {
    grad = decayed(grad, param);
    caution.measure(first_moment(grad, exp_avg), grad, measured);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Floats& next_exp_avg,
              Floats& next_exp_avg_sq) const {
    grad = decayed(grad, param);
    next_exp_avg = first_moment(grad, exp_avg);
    next_exp_avg_sq = second_moment(grad, exp_avg_sq);
    param = descend(param, next_exp_avg * caution.mask(next_exp_avg, grad), next_exp_avg_sq);
  }
};

struct AdamAmsgradCautious : AdamAmsgrad {
  static constexpr const char* kName = "adam_amsgrad_cautious";
  static constexpr bool kHasNorms = true;

  Caution caution;

  AdamAmsgradCautious(const Hyper& hyper, double step, const double* norms)
      : AdamAmsgrad(hyper, step, norms), caution(hyper.maximize, norms) {}

  void measure(Floats param, Floats grad, Scaled exp_avg, Scaled, Scaled, Floats (&measured)[2]) const {
    grad = decayed(grad, param);
    caution.measure(first_moment(grad, exp_avg), grad, measured);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Scaled max_exp_avg_sq,
              Floats& next_exp_avg, Floats& next_exp_avg_sq, Floats& next_max_exp_avg_sq) const {
    grad = decayed(grad, param);
    next_exp_avg = first_moment(grad, exp_avg);
    next_exp_avg_sq = second_moment(grad, exp_avg_sq);
    next_max_exp_avg_sq = Simd::maximum(next_exp_avg_sq, max_exp_avg_sq);
    param = descend(param, next_exp_avg * caution.mask(next_exp_avg, grad), next_max_exp_avg_sq);
  }
};

// AdamW (Loshchilov & Hutter, 2019): weight decay beside the gradient.
template <class Base>
struct Decoupled : Base {
  Floats decay;

  Decoupled(const typename Base::Hyper& hyper, double step, const double* norms)
      : Base(hyper, step, norms), decay(constant(1 - hyper.lr * hyper.weight_decay)) {
    this->has_weight_decay = false;
  }

  template <class... Moments>
  void update(Floats& param, Floats grad, Moments&&... moments) const {
    param = param * decay;
    Base::update(param, grad, std::forward<Moments>(moments)...);
  }
};

struct AdamW : Decoupled<Adam> {
  static constexpr const char* kName = "adamw";
  using Decoupled::Decoupled;
};

struct AdamWAmsgrad : Decoupled<AdamAmsgrad> {
  static constexpr const char* kName = "adamw_amsgrad";
  using Decoupled::Decoupled;
};

struct AdamWCautious : Decoupled<AdamCautious> {
  static constexpr const char* kName = "adamw_cautious";
  using Decoupled::Decoupled;
};

struct AdamWAmsgradCautious : Decoupled<AdamAmsgradCautious> {
  static constexpr const char* kName = "adamw_amsgrad_cautious";
  using Decoupled::Decoupled;
};

}  // namespace
}  // namespace opt8bit
