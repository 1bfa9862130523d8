// What the rules share: their states before a step, and arithmetic. Included after one of simd/*.h.
#pragma once

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

// Declares a rule's hyper-parameters, in the order in which they are handed over, and tells their names.
#define OPT8BIT_HYPER(...) \
  struct Hyper {           \
    double __VA_ARGS__;    \
  };                       \
  static constexpr const char* kHyper = #__VA_ARGS__

struct WithoutNorms {
  static constexpr bool kHasNorms = false;
};

}  // namespace
}  // namespace opt8bit
