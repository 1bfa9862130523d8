// Parts of vectors, at the ends of blocks, by what every instruction set has. Included after one of simd/*.h.
#pragma once

#include <cstdint>

namespace opt8bit {
namespace {

// The first n of a vector's lanes, 0 < n < kLanes; the others are zero. A set that has masks overloads these.
template <class T>
auto load_first(const T* x, int64_t n) {
  T tail[Simd::kLanes] = {};
  Simd::copy(tail, x, n * sizeof(T));
  return Simd::load(tail);
}
template <class Floats>
Floats keep_first(Floats a, int64_t n) {
  float all[Simd::kLanes];
  Simd::store(all, a);
  return load_first(all, n);
}
template <class T>
void store_first(T* x, int64_t n, Simd::Floats a) {
  T tail[Simd::kLanes];
  Simd::store(tail, a);
  Simd::copy(x, tail, n * sizeof(T));
}

}  // namespace
}  // namespace opt8bit
