// How the update loop reads and writes a parameter: float32 come out of it and go back in, rounded to nearest; or, for
// bfloat16, rounded up or down by chance, or with the bits there is no room for kept beside it. Included after one of
// simd/*.h.
#pragma once

#include "optimizer_step.h"
#include "simd/first_lanes.h"

namespace opt8bit {
namespace {

// The finalizer of splitmix64 (Steele, Lea, Flood, 2014).
inline uint64_t mix64(uint64_t x) {
  x += 0x9e3779b97f4a7c15u;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// 32 random bits per element: a hash of its index in the parameter (modulo 2^32), keyed by seed, step and tensor. No
// state is carried from one element to the next, so they are the same for any order and any number of threads.
class RandomBits {
 public:
  RandomBits(uint64_t seed, uint64_t step, uint64_t number) {
    const uint64_t key = mix64(mix64(mix64(seed) ^ step) ^ number);
    low_key_ = Simd::broadcast(static_cast<int32_t>(key));
    high_key_ = Simd::broadcast(static_cast<int32_t>(key >> 32));
  }
  // Of elements index, index + 1, ...
  Simd::Ints operator()(int64_t index) const {
    Simd::Ints x = Simd::add(Simd::broadcast(static_cast<int32_t>(index)), Simd::lane_numbers());
    x = Simd::exclusive_or(x, low_key_);
    x = Simd::multiply(folded<16>(x), Simd::broadcast(0x21f0aaad));
    x = Simd::add(folded<15>(x), high_key_);
    x = Simd::multiply(x, Simd::broadcast(0x735a2d97));
    return folded<15>(x);
  }

 private:
  template <int kBits>
  static Simd::Ints folded(Simd::Ints x) {
    return Simd::exclusive_or(x, Simd::shift_right<kBits>(x));
  }
  Simd::Ints low_key_, high_key_;
};

template <class T, Rounding rounding>
class Param {
 public:
  Param(const Tensor& tensor, const Group&)
      : tensor_(static_cast<T*>(tensor.param)), ahead_(kAhead + tensor.param_away) {}

  void open(int64_t offset) { values_ = tensor_ + offset; }
  Simd::Floats load(int64_t i) const { return Simd::load(values_ + i); }
  void store(int64_t i, Simd::Floats p) { Simd::store(values_ + i, p); }
  Simd::Floats load_tail(int64_t i, int64_t n) const { return load_first(values_ + i, n - i); }
  void store_tail(int64_t i, int64_t n, Simd::Floats p) { store_first(values_ + i, n - i, p); }
  const char* ahead(int64_t i) const { return reinterpret_cast<const char*>(values_ + i) + ahead_; }

 private:
  T* const tensor_;
  const int64_t ahead_;
  T* values_;
};

// A bfloat16 parameter that is rounded up or down by chance, or that keeps the bits it has no room for.
template <Rounding rounding>
class Bfloat16Param {
 public:
  Bfloat16Param(const Tensor& tensor, const Group& group)
      : tensor_(static_cast<bfloat16*>(tensor.param)),
        tensor_low_(tensor.compensation),
        random_(group.seed, static_cast<uint64_t>(*tensor.step + 1.0), tensor.number),
        first_(tensor.first),
        ahead_(kAhead + tensor.param_away) {}

  void open(int64_t offset) {
    index_ = first_ + offset;
    values_ = tensor_ + offset;
    if (kHasLow) low_ = tensor_low_ + offset;
  }
  Simd::Floats load(int64_t i) const { return load(values_ + i, low_ + (kHasLow ? i : 0)); }
  void store(int64_t i, Simd::Floats p) { store(values_ + i, low_ + (kHasLow ? i : 0), i, p); }
  Simd::Floats load_tail(int64_t i, int64_t n) const {
    if (!kHasLow) return load_first(values_ + i, n - i);
    bfloat16 tail[Simd::kLanes] = {};
    int16_t low_tail[Simd::kLanes] = {};
    Simd::copy(tail, values_ + i, (n - i) * sizeof *tail);
    Simd::copy(low_tail, low_ + i, (n - i) * sizeof *low_tail);
    return load(tail, low_tail);
  }
  void store_tail(int64_t i, int64_t n, Simd::Floats p) {
    bfloat16 tail[Simd::kLanes];
    int16_t low_tail[Simd::kLanes];
    store(tail, low_tail, i, p);
    Simd::copy(values_ + i, tail, (n - i) * sizeof *tail);
    if (kHasLow) Simd::copy(low_ + i, low_tail, (n - i) * sizeof *low_tail);
  }
  const char* ahead(int64_t i) const { return reinterpret_cast<const char*>(values_ + i) + ahead_; }

 private:
  static constexpr bool kHasLow = rounding == Rounding::compensated;

  // The bits of the float32 are those of the bfloat16, moved up by 16, plus the signed number beside it.
  static Simd::Floats load(const bfloat16* values, const int16_t* low) {
    if (!kHasLow) return Simd::load(values);
    return Simd::floats(Simd::add(Simd::bits_of(values), Simd::load(low)));
  }
  void store(bfloat16* values, int16_t* low, int64_t i, Simd::Floats p) const {
    const Simd::Floats nan = Simd::floats(Simd::broadcast(0x7fc00000));
    const Simd::Ints bits = Simd::bits(Simd::select(Simd::is_nan(p), nan, p));
    if (kHasLow) {
      const Simd::Ints nearest = Simd::high_half(Simd::add(bits, Simd::broadcast(0x8000)));
      Simd::store_high(values, nearest);
      Simd::store(low, Simd::subtract(bits, nearest));
    } else {
      Simd::store_high(values, Simd::add(bits, Simd::shift_right<16>(random_(index_ + i))));
    }
  }

  bfloat16* const tensor_;
  int16_t* const tensor_low_;
  const RandomBits random_;
  const int64_t first_, ahead_;
  int64_t index_;  // of the block's first element, in the whole parameter
  bfloat16* values_;
  int16_t* low_ = nullptr;
};

template <>
class Param<bfloat16, Rounding::stochastic> : public Bfloat16Param<Rounding::stochastic> {
  using Bfloat16Param::Bfloat16Param;
};
template <>
class Param<bfloat16, Rounding::compensated> : public Bfloat16Param<Rounding::compensated> {
  using Bfloat16Param::Bfloat16Param;
};

}  // namespace
}  // namespace opt8bit
