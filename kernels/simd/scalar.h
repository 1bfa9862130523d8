// One lane at a time, in plain C++: the twin that every other lane width must equal bit for bit,
// and what a processor without a vector version of its own runs.
#pragma once

#include <cstdint>
#include <cstring>

#include "codebook.h"
#include "half.h"
#include "simd/lines.h"

namespace opt8bit {
namespace {

struct Simd {
  static constexpr int kLanes = 1;
  static constexpr bool kOverlapsChunks = false;
  struct Floats {
    float v;
  };
  struct Ints {
    int32_t v;
  };
  struct Codes {
    uint8_t v;
  };
  using Mask = bool;

  // The tables of an encoder, as it looks them up.
  struct Table32 {
    const float* entries;
  };
  struct Table16 {
    const float* entries;
  };
  static Table32 table32(const float* entries) { return {entries}; }
  static Table16 table16(const float* entries) { return {entries}; }
  static Floats lookup(Table32 table, Ints index) { return {table.entries[index.v & 31]}; }
  static Floats lookup(Table16 table, Ints index) { return {table.entries[index.v & 15]}; }

  static Floats broadcast(float x) { return {x}; }
  static Ints broadcast(int32_t x) { return {x}; }
  static Floats load(const float* source) { return {*source}; }
  static Floats load(const bfloat16* source) { return {float_from_bfloat16(*source)}; }
  static Floats load(const float16* source) { return {float_from_float16(*source)}; }
  static Codes load(const uint8_t* source) { return {*source}; }
  static void store(float* target, Floats a) { *target = a.v; }
  static void store(bfloat16* target, Floats a) { *target = bfloat16_from_float(a.v); }
  static void store(float16* target, Floats a) { *target = float16_from_float(a.v); }

  // The low and the high half of each integer.
  static Ints load(const int16_t* source) { return {*source}; }
  static void store(int16_t* target, Ints a) { *target = static_cast<int16_t>(a.v); }
  static void store_high(bfloat16* target, Ints a) { target->bits = static_cast<uint32_t>(a.v) >> 16; }
  static Ints bits_of(const bfloat16* source) { return bits(load(source)); }

  static Ints bits(Floats a) {
    int32_t result;
    std::memcpy(&result, &a.v, sizeof result);
    return {result};
  }
  static Ints add(Ints a, Ints b) {
    return {static_cast<int32_t>(static_cast<uint32_t>(a.v) + static_cast<uint32_t>(b.v))};
  }
  static Ints subtract(Ints a, Ints b) {
    return {static_cast<int32_t>(static_cast<uint32_t>(a.v) - static_cast<uint32_t>(b.v))};
  }
  static Ints multiply(Ints a, Ints b) {
    return {static_cast<int32_t>(static_cast<uint32_t>(a.v) * static_cast<uint32_t>(b.v))};
  }
  static Ints exclusive_or(Ints a, Ints b) { return {a.v ^ b.v}; }
  static Ints min(Ints a, Ints b) { return a.v < b.v ? a : b; }
  static Ints min_unsigned(Ints a, Ints b) { return static_cast<uint32_t>(a.v) < static_cast<uint32_t>(b.v) ? a : b; }
  // Of the low and of the high halves, without sign.
  static Ints min_of_halves(Ints a, Ints b) {
    const uint32_t x = static_cast<uint32_t>(a.v), y = static_cast<uint32_t>(b.v);
    const uint32_t low = (x & 0xffff) < (y & 0xffff) ? x & 0xffff : y & 0xffff;
    const uint32_t high = x >> 16 < y >> 16 ? x >> 16 : y >> 16;
    return {static_cast<int32_t>(high << 16 | low)};
  }
  template <int kBits>
  static Ints low_bits(Ints a) {
    return {a.v & ((1 << kBits) - 1)};
  }
  template <int kBits>
  static Ints shift_right(Ints a) {
    return {static_cast<int32_t>(static_cast<uint32_t>(a.v) >> kBits)};
  }
  static Ints high_half(Ints a) { return {static_cast<int32_t>(static_cast<uint32_t>(a.v) & 0xffff0000u)}; }
  static Ints lane_numbers() { return {0}; }
  static Floats floats(Ints bits) {
    Floats result;
    std::memcpy(&result.v, &bits.v, sizeof result.v);
    return result;
  }
  static Ints add_where(Mask mask, Ints a, Ints b) { return mask ? add(a, b) : a; }
  static Ints exponent(Floats a) { return {static_cast<int32_t>(static_cast<uint32_t>(bits(a).v) >> 23)}; }

  static Floats fma(Floats a, Floats b, Floats c) { return {__builtin_fmaf(a.v, b.v, c.v)}; }
  static Floats sqrt(Floats a) { return {__builtin_sqrtf(a.v)}; }
  static Floats abs(Floats a) { return {__builtin_fabsf(a.v)}; }
  // The smaller and the larger one; `b` where `a` is NaN.
  static Floats min(Floats a, Floats b) { return {a.v < b.v ? a.v : b.v}; }
  static Floats max(Floats a, Floats b) { return {a.v > b.v ? a.v : b.v}; }
  // The same of results of arithmetic, which are no signalling NaNs, where `b` is no NaN and zeros may have any sign.
  static Floats min_of_results(Floats a, Floats b) { return min(a, b); }
  static Floats max_of_results(Floats a, Floats b) { return max(a, b); }
  // NaN if either is NaN, as torch.maximum has it.
  static Floats maximum(Floats a, Floats b) { return {a.v > b.v || a.v != a.v ? a.v : b.v}; }
  static Mask equal(Floats a, Floats b) { return a.v == b.v; }
  static Mask greater(Floats a, Floats b) { return a.v > b.v; }
  static Mask greater_or_nan(Floats a, Floats b) { return !(a.v <= b.v); }
  static Mask less(Floats a, Floats b) { return a.v < b.v; }
  static Mask less(Ints a, Ints b) { return a.v < b.v; }
  static Mask is_nan(Floats a) { return a.v != a.v; }
  static Floats select(Mask mask, Floats a, Floats b) { return mask ? a : b; }
  // sums[0 .. kLanes) += the squares, in double.
  static void add_squares(double* sums, Floats a) { *sums += static_cast<double>(a.v) * a.v; }
  static uint32_t lanes(Mask mask) { return mask; }

  static float horizontal_max(Floats a) { return a.v; }

  static void copy(void* target, const void* source, int64_t bytes) { std::memcpy(target, source, bytes); }

  // Bits 16 to 23 of four vectors of integers.
  static void store_third_bytes(uint8_t* target, const Ints (&a)[4]) {
    for (int i = 0; i < 4; ++i) target[i] = static_cast<uint8_t>(a[i].v >> 16);
  }
  // The same; minus them, and at least -127, where values are negative, or where they are not if `is_mirrored`.
  static void store_signed_bytes(uint8_t* target, const Ints (&a)[4], const float* values, bool is_mirrored) {
    for (int i = 0; i < 4; ++i) {
      const int byte = a[i].v >> 16 & 255;
      const bool is_negative = (__builtin_signbit(values[i]) != 0) != is_mirrored;
      target[i] = static_cast<uint8_t>(is_negative ? -(byte < 127 ? byte : 127) : byte);
    }
  }

  template <bool kSigned>
  using Lines = WideLines<Simd, kSigned>;

  // Values of kLanes codes of a dynamic map, counted from zero's.
  template <bool kSigned>
  struct Decoder {
    const float* values;
    explicit Decoder(const Codebook& codebook) : values(codebook.values) {}
    Floats operator()(Codes codes) const {
      return {values[static_cast<uint8_t>(codes.v + (kSigned ? kSignedZeroCode : 0))]};
    }
  };
};

inline Simd::Floats operator+(Simd::Floats a, Simd::Floats b) { return {a.v + b.v}; }
inline Simd::Floats operator-(Simd::Floats a, Simd::Floats b) { return {a.v - b.v}; }
inline Simd::Floats operator*(Simd::Floats a, Simd::Floats b) { return {a.v * b.v}; }
inline Simd::Floats operator/(Simd::Floats a, Simd::Floats b) { return {a.v / b.v}; }

}  // namespace
}  // namespace opt8bit
