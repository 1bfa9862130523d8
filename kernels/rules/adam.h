// Adam and AdamW, each with AMSGrad or without, and cautious or not.
#pragma once

#include <cmath>
#include <utility>

#include "rules/caution.h"

namespace opt8bit {
namespace {

// What the forms of Adam (Kingma & Ba, 2015) share.
struct AdamMoments : WithoutNorms {
  OPT8BIT_HYPER(lr, beta1, beta2, eps, weight_decay, maximize);

  Floats weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_root_correction2, eps,
      negative_step_size;
  bool has_weight_decay;

  AdamMoments(const Hyper& hyper, double step, const double*) {
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

  // Weight decay is added to the gradient.
  Floats decayed(Floats grad, Floats param) const {
    return has_weight_decay ? Simd::fma(weight_decay, param, grad) : grad;
  }
  Floats first_moment(Floats grad, Scaled exp_avg) const { return average_with(exp_avg, beta1, one_minus_beta1, grad); }
  Floats second_moment(Floats grad, Scaled exp_avg_sq) const {
    return Simd::fma(beta2 * exp_avg_sq.scale, exp_avg_sq.value, one_minus_beta2 * grad * grad);
  }
  Floats direction(Floats exp_avg, Floats) const { return exp_avg; }
  Floats descend(Floats param, Floats direction, Floats exp_avg_sq) const {
    const Floats denominator = Simd::fma(Simd::sqrt(exp_avg_sq), inverse_root_correction2, eps);
    return Simd::fma(negative_step_size, direction / denominator, param);
  }
};

struct CautiousMoments : AdamMoments {
  static constexpr bool kHasNorms = true;

  Caution caution;

  CautiousMoments(const Hyper& hyper, double step, const double* norms)
      : AdamMoments(hyper, step, norms), caution(hyper.maximize, norms) {}

  Floats direction(Floats exp_avg, Floats grad) const { return exp_avg * caution.mask(exp_avg, grad); }

  void measure_agreement(Floats param, Floats grad, Scaled exp_avg, Floats (&measured)[2]) const {
    grad = decayed(grad, param);
    caution.measure(first_moment(grad, exp_avg), grad, measured);
  }
};

template <class Moments>
struct AdamOf : Moments {
  static constexpr int kStates = 2;  // exp_avg, exp_avg_sq
  static constexpr bool kSigned[] = {true, false};
  using Moments::Moments;

  void measure(Floats param, Floats grad, Scaled exp_avg, Scaled, Floats (&measured)[2]) const {
    this->measure_agreement(param, grad, exp_avg, measured);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Floats& next_exp_avg,
              Floats& next_exp_avg_sq) const {
    grad = this->decayed(grad, param);
    next_exp_avg = this->first_moment(grad, exp_avg);
    next_exp_avg_sq = this->second_moment(grad, exp_avg_sq);
    param = this->descend(param, this->direction(next_exp_avg, grad), next_exp_avg_sq);
  }
};

// AMSGrad (Reddi et al., 2018): divides by the largest second moment so far.
template <class Moments>
struct AmsgradOf : Moments {
  static constexpr int kStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
  static constexpr bool kSigned[] = {true, false, false};
  using Moments::Moments;

  void measure(Floats param, Floats grad, Scaled exp_avg, Scaled, Scaled, Floats (&measured)[2]) const {
    this->measure_agreement(param, grad, exp_avg, measured);
  }
  void update(Floats& param, Floats grad, Scaled exp_avg, Scaled exp_avg_sq, Scaled max_exp_avg_sq,
              Floats& next_exp_avg, Floats& next_exp_avg_sq, Floats& next_max_exp_avg_sq) const {
    grad = this->decayed(grad, param);
    next_exp_avg = this->first_moment(grad, exp_avg);
    next_exp_avg_sq = this->second_moment(grad, exp_avg_sq);
    next_max_exp_avg_sq = Simd::maximum(next_exp_avg_sq, max_exp_avg_sq);
    param = this->descend(param, this->direction(next_exp_avg, grad), next_max_exp_avg_sq);
  }
};

struct Adam : AdamOf<AdamMoments> {
  static constexpr const char* kName = "adam";
  using AdamOf::AdamOf;
};

struct AdamAmsgrad : AmsgradOf<AdamMoments> {
  static constexpr const char* kName = "adam_amsgrad";
  using AmsgradOf::AmsgradOf;
};

struct AdamCautious : AdamOf<CautiousMoments> {
  static constexpr const char* kName = "adam_cautious";
  using AdamOf::AdamOf;
};

struct AdamAmsgradCautious : AmsgradOf<CautiousMoments> {
  static constexpr const char* kName = "adam_amsgrad_cautious";
  using AmsgradOf::AmsgradOf;
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
