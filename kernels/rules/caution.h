// Cautious Optimizers (Liang et al., 2024): a step leaves out the elements that it would move against their gradients,
// and is scaled by one over the share of the others in the whole parameter.
#pragma once

#include <cmath>

#include "rules/rule.h"

namespace opt8bit {
namespace {

// The norms are the roots of how many elements agree, and of how many there are.
struct Caution {
  Floats sign, scale;

  Caution(double maximize, const double* norms)
      : sign(constant(maximize != 0 ? -1 : 1)),
        scale(constant(norms ? 1 / std::fmax(norms[0] * norms[0] / (norms[1] * norms[1]), 1e-3) : 1)) {}

  // `number` where a direction and the gradient have the same sign, else 0.
  Floats where_agreed(Floats direction, Floats grad, Floats number) const {
    const Floats zero = constant(0);
    return Simd::select(Simd::greater(sign_of(direction) * sign_of(sign * grad), zero), number, zero);
  }
  Floats mask(Floats direction, Floats grad) const { return where_agreed(direction, grad, scale); }
  void measure(Floats direction, Floats grad, Floats (&measured)[2]) const {
    measured[0] = where_agreed(direction, grad, constant(1));
    measured[1] = constant(1);
  }
};

}  // namespace
}  // namespace opt8bit
