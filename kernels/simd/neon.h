// Eight lanes, as two registers of four: what every ARM processor of 64 bits has (ARMv8-A).
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

#include "codebook.h"
#include "half.h"
#include "simd/lines.h"

namespace opt8bit {
namespace {

struct Simd {
  static constexpr int kLanes = 8;
  static constexpr bool kOverlapsChunks = false;
  struct Floats {
    float32x4_t low, high;
  };
  struct Ints {
    uint32x4_t low, high;
  };
  struct Codes {
    uint64_t v;  // a byte each, the first lowest
  };
  using Mask = Ints;

  // Four entries of a table. Loads into lanes would take their addresses from one register, and an instruction more.
  template <class T>
  static uint32x4_t gather(const T* table, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    static_assert(sizeof(T) == sizeof(uint32_t), "entries of 32 bits");
    const uint32_t* const entries = reinterpret_cast<const uint32_t*>(table);
    const auto entry = [&](uint64_t index) { return uint32x2_t{entries[index], 0}; };
    return vcombine_u32(vzip1_u32(entry(a), entry(b)), vzip1_u32(entry(c), entry(d)));
  }

  static Floats broadcast(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
  static Ints broadcast(int32_t x) { return broadcast_bits(static_cast<uint32_t>(x)); }
  static Ints broadcast_bits(uint32_t x) { return {vdupq_n_u32(x), vdupq_n_u32(x)}; }
  static Floats load(const float* source) { return {vld1q_f32(source), vld1q_f32(source + 4)}; }
  static Floats load(const bfloat16* source) { return floats(bits_of(source)); }
  static Floats load(const float16* source) {
    const float16x8_t halves = vreinterpretq_f16_u16(vld1q_u16(&source->bits));
    return {vcvt_f32_f16(vget_low_f16(halves)), vcvt_high_f32_f16(halves)};
  }
  static Codes load(const uint8_t* source) {
    Codes codes;
    std::memcpy(&codes.v, source, sizeof codes.v);
    return codes;
  }
  static void store(float* target, Floats a) {
    vst1q_f32(target, a.low);
    vst1q_f32(target + 4, a.high);
  }
  static void store(bfloat16* target, Floats a) {
    const Ints x = bits(a), odd = low_bits<1>(shift_right<16>(x));
    const Ints rounded = add(x, add(odd, broadcast(0x7fff)));
    store_high(target, bits(select(is_nan(a), floats(broadcast(0x7fc00000)), floats(rounded))));
  }
  static void store(float16* target, Floats a) {
    const float16x8_t halves = vcvt_high_f16_f32(vcvt_f16_f32(a.low), a.high);
    vst1q_u16(&target->bits, vreinterpretq_u16_f16(halves));
  }

  static Ints load(const int16_t* source) {
    const int16x8_t halves = vld1q_s16(source);
    return {vreinterpretq_u32_s32(vmovl_s16(vget_low_s16(halves))), vreinterpretq_u32_s32(vmovl_high_s16(halves))};
  }
  static void store(int16_t* target, Ints a) {
    vst1q_s16(target, vreinterpretq_s16_u16(vuzp1q_u16(vreinterpretq_u16_u32(a.low), vreinterpretq_u16_u32(a.high))));
  }
  static void store_high(bfloat16* target, Ints a) { vst1q_u16(&target->bits, high_halves(a)); }
  static Ints bits_of(const bfloat16* source) {
    const uint16x8_t halves = vld1q_u16(&source->bits), zero = vdupq_n_u16(0);
    return {vreinterpretq_u32_u16(vzip1q_u16(zero, halves)), vreinterpretq_u32_u16(vzip2q_u16(zero, halves))};
  }
  static uint16x8_t high_halves(Ints a) {
    return vuzp2q_u16(vreinterpretq_u16_u32(a.low), vreinterpretq_u16_u32(a.high));
  }

  static Ints bits(Floats a) { return {vreinterpretq_u32_f32(a.low), vreinterpretq_u32_f32(a.high)}; }
  static Floats floats(Ints a) { return {vreinterpretq_f32_u32(a.low), vreinterpretq_f32_u32(a.high)}; }
  static Ints add(Ints a, Ints b) { return {vaddq_u32(a.low, b.low), vaddq_u32(a.high, b.high)}; }
  static Ints subtract(Ints a, Ints b) { return {vsubq_u32(a.low, b.low), vsubq_u32(a.high, b.high)}; }
  static Ints multiply(Ints a, Ints b) { return {vmulq_u32(a.low, b.low), vmulq_u32(a.high, b.high)}; }
  static Ints exclusive_or(Ints a, Ints b) { return {veorq_u32(a.low, b.low), veorq_u32(a.high, b.high)}; }
  static Ints min(Ints a, Ints b) {
    const auto least = [](uint32x4_t a, uint32x4_t b) {
      return vreinterpretq_u32_s32(vminq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b)));
    };
    return {least(a.low, b.low), least(a.high, b.high)};
  }
  static Ints min_of_halves(Ints a, Ints b) {
    const auto least = [](uint32x4_t a, uint32x4_t b) {
      return vreinterpretq_u32_u16(vminq_u16(vreinterpretq_u16_u32(a), vreinterpretq_u16_u32(b)));
    };
    return {least(a.low, b.low), least(a.high, b.high)};
  }
  template <int kBits>
  static Ints shift_right(Ints a) {
    return {vshrq_n_u32(a.low, kBits), vshrq_n_u32(a.high, kBits)};
  }
  static Ints both(Ints a, Ints b) { return {vandq_u32(a.low, b.low), vandq_u32(a.high, b.high)}; }
  template <int kBits>
  static Ints low_bits(Ints a) {
    return both(a, broadcast((1 << kBits) - 1));
  }
  static Ints high_half(Ints a) { return both(a, broadcast_bits(0xffff0000)); }
  static Ints lane_numbers() { return {uint32x4_t{0, 1, 2, 3}, uint32x4_t{4, 5, 6, 7}}; }
  // Those that bits 16 to 27 of the lanes number.
  static Ints lookup(const uint32_t* table, Floats x) {
    const uint64x2_t halves = vreinterpretq_u64_u16(high_halves(bits(x)));
    const auto four = [&](uint64_t number) {
      constexpr uint64_t kLow = (1 << 12) - 1;
      return gather(table, number & kLow, number >> 16 & kLow, number >> 32 & kLow, number >> 48 & kLow);
    };
    return {four(vgetq_lane_u64(halves, 0)), four(vgetq_lane_u64(halves, 1))};
  }

  static Floats fma(Floats a, Floats b, Floats c) {
    return {vfmaq_f32(c.low, a.low, b.low), vfmaq_f32(c.high, a.high, b.high)};
  }
  static Floats sqrt(Floats a) { return {vsqrtq_f32(a.low), vsqrtq_f32(a.high)}; }
  static Floats abs(Floats a) { return {vabsq_f32(a.low), vabsq_f32(a.high)}; }
  static Floats min_of_results(Floats a, Floats b) { return {vminnmq_f32(a.low, b.low), vminnmq_f32(a.high, b.high)}; }
  static Floats max_of_results(Floats a, Floats b) { return {vmaxnmq_f32(a.low, b.low), vmaxnmq_f32(a.high, b.high)}; }
  static Floats min(Floats a, Floats b) { return select(less(a, b), a, b); }
  static Floats max(Floats a, Floats b) { return select(greater(a, b), a, b); }
  static Floats maximum(Floats a, Floats b) { return select(is_nan(a), a, max(a, b)); }
  static Mask equal(Floats a, Floats b) { return {vceqq_f32(a.low, b.low), vceqq_f32(a.high, b.high)}; }
  static Mask greater(Floats a, Floats b) { return {vcgtq_f32(a.low, b.low), vcgtq_f32(a.high, b.high)}; }
  static Mask less(Floats a, Floats b) { return greater(b, a); }
  static Mask less(Ints a, Ints b) {
    const auto is_less = [](uint32x4_t a, uint32x4_t b) {
      return vcltq_s32(vreinterpretq_s32_u32(a), vreinterpretq_s32_u32(b));
    };
    return {is_less(a.low, b.low), is_less(a.high, b.high)};
  }
  static Mask is_nan(Floats a) { return {vmvnq_u32(vceqq_f32(a.low, a.low)), vmvnq_u32(vceqq_f32(a.high, a.high))}; }
  static Floats select(Mask mask, Floats a, Floats b) {
    return {vbslq_f32(mask.low, a.low, b.low), vbslq_f32(mask.high, a.high, b.high)};
  }
  static void add_squares(double* sums, Floats a) {
    const auto add_two = [](double* sums, float64x2_t x) {
      vst1q_f64(sums, vaddq_f64(vld1q_f64(sums), vmulq_f64(x, x)));
    };
    add_two(sums, vcvt_f64_f32(vget_low_f32(a.low)));
    add_two(sums + 2, vcvt_high_f64_f32(a.low));
    add_two(sums + 4, vcvt_f64_f32(vget_low_f32(a.high)));
    add_two(sums + 6, vcvt_high_f64_f32(a.high));
  }
  static uint32_t lanes(Mask mask) {
    const uint16x8_t lane_bits = {1, 2, 4, 8, 16, 32, 64, 128};
    return vaddvq_u16(vandq_u16(high_halves(mask), lane_bits));
  }

  static float horizontal_max(Floats a) { return vmaxnmvq_f32(vmaxnmq_f32(a.low, a.high)); }

  static void store_third_bytes(uint8_t* target, const Ints (&a)[4]) {
    for (int i = 0; i < 4; i += 2) vst1q_u8(target + i * kLanes, third_bytes(a[i], a[i + 1]));
  }
  static void store_signed_bytes(uint8_t* target, const Ints (&a)[4], const float* values, bool is_mirrored) {
    const uint8x16_t mirror = vdupq_n_u8(static_cast<uint8_t>(-is_mirrored));
    for (int i = 0; i < 4; i += 2) {
      const uint8x16_t bytes = third_bytes(a[i], a[i + 1]);
      const int8x16_t negated = vnegq_s8(vreinterpretq_s8_u8(vminq_u8(bytes, vdupq_n_u8(127))));
      const uint8x16_t fourth = fourth_bytes(bits(load(values + i * kLanes)), bits(load(values + (i + 1) * kLanes)));
      const uint8x16_t is_negative = vcltzq_s8(vreinterpretq_s8_u8(veorq_u8(fourth, mirror)));
      vst1q_u8(target + i * kLanes, vbslq_u8(is_negative, vreinterpretq_u8_s8(negated), bytes));
    }
  }
  static uint8x16_t third_bytes(Ints a, Ints b) {
    return vuzp1q_u8(vreinterpretq_u8_u16(high_halves(a)), vreinterpretq_u8_u16(high_halves(b)));
  }
  static uint8x16_t fourth_bytes(Ints a, Ints b) {
    return vuzp2q_u8(vreinterpretq_u8_u16(high_halves(a)), vreinterpretq_u8_u16(high_halves(b)));
  }
  static void copy(void* target, const void* source, int64_t bytes) { std::memcpy(target, source, bytes); }

  template <bool kSigned>
  using Lines = TableLines<Simd, kSigned>;

  // Loads of single entries leave the vector units, of which there are two to four, to the rule and the encoder.
  template <bool kSigned>
  struct Decoder {
    const float* values;
    explicit Decoder(const Codebook& codebook) : values(codebook.dynamic->state_values) {}
    Floats operator()(Codes codes) const {
      const auto four = [&](uint64_t code) {
        return gather(values, code & 255, code >> 8 & 255, code >> 16 & 255, code >> 24 & 255);
      };
      return floats({four(codes.v), four(codes.v >> 32)});
    }
  };
};

inline Simd::Floats operator+(Simd::Floats a, Simd::Floats b) {
  return {vaddq_f32(a.low, b.low), vaddq_f32(a.high, b.high)};
}
inline Simd::Floats operator-(Simd::Floats a, Simd::Floats b) {
  return {vsubq_f32(a.low, b.low), vsubq_f32(a.high, b.high)};
}
inline Simd::Floats operator*(Simd::Floats a, Simd::Floats b) {
  return {vmulq_f32(a.low, b.low), vmulq_f32(a.high, b.high)};
}
inline Simd::Floats operator/(Simd::Floats a, Simd::Floats b) {
  return {vdivq_f32(a.low, b.low), vdivq_f32(a.high, b.high)};
}

}  // namespace
}  // namespace opt8bit
