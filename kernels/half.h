// The dtypes of tensors, and the two of 16 bits as storage: conversions to and from float32, rounding to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace opt8bit {

enum class DType : int64_t { float32, bfloat16, float16 };

struct bfloat16 {
  uint16_t bits;
};
struct float16 {
  uint16_t bits;
};

namespace {

inline float float_from_bits(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

inline uint32_t bits_from_float(float x) {
  uint32_t result;
  std::memcpy(&result, &x, sizeof result);
  return result;
}

inline float float_from_bfloat16(bfloat16 x) { return float_from_bits(uint32_t{x.bits} << 16); }

inline bfloat16 bfloat16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  if (x != x) return {0x7fc0};
  return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float float_from_float16(float16 x) {
  const uint32_t sign = (x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00) {  // infinity, or a NaN, made quiet
    const uint32_t quiet = magnitude > 0x7c00 ? 0x400000 : 0;
    return float_from_bits(sign | 0x7f800000 | quiet | (magnitude & 0x3ff) << 13);
  }
  if (magnitude < 0x400) {  // zero or subnormal: a whole number of 2^-24
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    return float_from_bits(sign | bits_from_float(value));
  }
  return float_from_bits(sign | ((magnitude << 13) + (112u << 23)));
}

inline float16 float16_from_float(float x) {
  const uint32_t bits = bits_from_float(x);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  uint32_t result;
  if (magnitude > 0x7f800000) {
    result = 0x7e00 | ((magnitude >> 13) & 0x3ff);
  } else if (magnitude >= 0x47800000) {  // 2^16 and above
    result = 0x7c00;
  } else if (magnitude < 0x38800000) {  // below 2^-14: adding 2^-1 rounds to a whole number of 2^-24
    result = bits_from_float(float_from_bits(magnitude) + 0.5f) - 0x3f000000;
  } else {
    const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
    result = (rounded - (112u << 23)) >> 13;
  }
  return {static_cast<uint16_t>(sign | result)};
}

}  // namespace
}  // namespace opt8bit
