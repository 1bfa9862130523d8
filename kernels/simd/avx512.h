// Sixteen lanes: AVX-512 F, BW, DQ and VL (Intel Skylake-X, AMD Zen 4 and later).
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "codebook.h"
#include "half.h"
#include "simd/lines.h"

namespace opt8bit {
namespace {

struct Simd {
  static constexpr int kLanes = 16;
  static constexpr bool kOverlapsChunks = true;
  struct Floats {
    __m512 v;
  };
  struct Ints {
    __m512i v;
  };
  struct Codes {
    __m128i v;
  };
  using Mask = __mmask16;

  struct Table32 {
    __m512 low, high;
  };
  struct Table16 {
    __m512 entries;
  };
  static Table32 table32(const float* entries) { return {_mm512_loadu_ps(entries), _mm512_loadu_ps(entries + 16)}; }
  static Table16 table16(const float* entries) { return {_mm512_loadu_ps(entries)}; }
  static Floats lookup(Table32 table, Ints index) { return {_mm512_permutex2var_ps(table.low, index.v, table.high)}; }
  static Floats lookup(Table16 table, Ints index) { return {_mm512_permutexvar_ps(index.v, table.entries)}; }

  static Floats broadcast(float x) { return {_mm512_set1_ps(x)}; }
  static Ints broadcast(int32_t x) { return {_mm512_set1_epi32(x)}; }
  static Floats load(const float* source) { return {_mm512_loadu_ps(source)}; }
  static Floats load(const bfloat16* source) { return floats(bits_of(source)); }
  static Floats load(const float16* source) { return {_mm512_cvtph_ps(words(source))}; }
  static Codes load(const uint8_t* source) { return {_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))}; }
  static void store(float* target, Floats a) { _mm512_storeu_ps(target, a.v); }
  static void store(bfloat16* target, Floats a) {
    const __m512i x = _mm512_castps_si512(a.v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(x, 16), _mm512_set1_epi32(1));
    const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(x, _mm512_set1_epi32(0x7fff)), odd);
    store_high(target, {_mm512_mask_mov_epi32(rounded, is_nan(a), _mm512_set1_epi32(0x7fc00000))});
  }
  static void store(float16* target, Floats a) {
    const __m256i halves = _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), halves);
  }

  static Ints load(const int16_t* source) { return {_mm512_cvtepi16_epi32(words(source))}; }
  static void store(int16_t* target, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm512_cvtepi32_epi16(a.v));
  }
  // Words of 16 bits move between the halves of a vector and the high halves of its integers.
  static void store_high(bfloat16* target, Ints a) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target),
                        _mm512_castsi512_si256(_mm512_permutexvar_epi16(odd_words(), a.v)));
  }
  static __m512i odd_words() {
    return _mm512_add_epi32(_mm512_set1_epi32(0x00030001),
                            _mm512_mullo_epi32(lane_numbers().v, _mm512_set1_epi32(0x00040004)));
  }
  static Ints bits_of(const bfloat16* source) { return high_halves(words(source)); }
  static Ints high_halves(__m256i words) {
    const __m512i order = _mm512_slli_epi32(lane_numbers().v, 16);
    return {_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, order, _mm512_castsi256_si512(words))};
  }
  static __m256i words(const void* source) { return _mm256_loadu_si256(static_cast<const __m256i*>(source)); }

  static Ints bits(Floats a) { return {_mm512_castps_si512(a.v)}; }
  static Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
  static Ints subtract(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
  static Ints multiply(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
  static Ints exclusive_or(Ints a, Ints b) { return {_mm512_xor_si512(a.v, b.v)}; }
  static Ints min(Ints a, Ints b) { return {_mm512_min_epi32(a.v, b.v)}; }
  static Ints min_unsigned(Ints a, Ints b) { return {_mm512_min_epu32(a.v, b.v)}; }
  static Ints min_of_halves(Ints a, Ints b) { return {_mm512_min_epu16(a.v, b.v)}; }
  template <int kBits>
  static Ints shift_right(Ints a) {
    return {_mm512_srli_epi32(a.v, kBits)};
  }
  template <int kBits>
  static Ints low_bits(Ints a) {
    return {_mm512_and_si512(a.v, _mm512_set1_epi32((1 << kBits) - 1))};
  }
  static Ints high_half(Ints a) { return {_mm512_and_si512(a.v, _mm512_set1_epi32(INT32_C(-0x10000)))}; }
  static Ints lane_numbers() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15)}; }
  static Floats floats(Ints bits) { return {_mm512_castsi512_ps(bits.v)}; }
  static Ints add_where(Mask mask, Ints a, Ints b) { return {_mm512_mask_add_epi32(a.v, mask, a.v, b.v)}; }
  static Ints exponent(Floats a) { return {_mm512_srli_epi32(_mm512_castps_si512(a.v), 23)}; }

  static Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats sqrt(Floats a) { return {_mm512_sqrt_ps(a.v)}; }
  static Floats abs(Floats a) { return {_mm512_abs_ps(a.v)}; }
  static Floats min(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
  static Floats min_of_results(Floats a, Floats b) { return min(a, b); }
  static Floats max_of_results(Floats a, Floats b) { return max(a, b); }
  static Floats maximum(Floats a, Floats b) {
    const __mmask16 is_nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
    return {_mm512_mask_mov_ps(_mm512_max_ps(a.v, b.v), is_nan, a.v)};
  }
  static Floats times_sign_of(Floats sign, Floats a) {
    constexpr int kSecondAndThirdXorFirst = 0b01111000;
    return {_mm512_castsi512_ps(_mm512_ternarylogic_epi32(_mm512_castps_si512(a.v), _mm512_castps_si512(sign.v),
                                                          _mm512_set1_epi32(INT32_MIN), kSecondAndThirdXorFirst))};
  }
  static Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
  static Mask greater(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ); }
  static Mask greater_or_nan(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_NLE_UQ); }
  static Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
  static Mask less(Ints a, Ints b) { return _mm512_cmplt_epi32_mask(a.v, b.v); }
  static Mask is_nan(Floats a) { return _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q); }
  static Floats select(Mask mask, Floats a, Floats b) { return {_mm512_mask_mov_ps(b.v, mask, a.v)}; }
  static void add_squares(double* sums, Floats a) {
    const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256(a.v));
    const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps(a.v, 1));
    _mm512_storeu_pd(sums, _mm512_add_pd(_mm512_loadu_pd(sums), _mm512_mul_pd(low, low)));
    _mm512_storeu_pd(sums + 8, _mm512_add_pd(_mm512_loadu_pd(sums + 8), _mm512_mul_pd(high, high)));
  }
  static uint32_t lanes(Mask mask) { return mask; }

  static float horizontal_max(Floats a) { return _mm512_reduce_max_ps(a.v); }

  static void store_third_bytes(uint8_t* target, const Ints (&a)[4]) {
    for (int i = 0; i < 4; i += 2) store_bytes(target + i * kLanes, third_bytes(a[i], a[i + 1]));
  }
  static void store_signed_bytes(uint8_t* target, const Ints (&a)[4], const float* values, bool is_mirrored) {
    const __mmask32 mirror = 0u - is_mirrored;
    for (int i = 0; i < 4; i += 2) {
      const __m256i bytes = third_bytes(a[i], a[i + 1]);
      const __mmask32 signs = _mm512_kunpackw(sign_bits(values + (i + 1) * kLanes), sign_bits(values + i * kLanes));
      const __m256i magnitudes = _mm256_min_epu8(bytes, _mm256_set1_epi8(127));
      store_bytes(target + i * kLanes, _mm256_mask_sub_epi8(bytes, signs ^ mirror, _mm256_setzero_si256(), magnitudes));
    }
  }
  static __m256i third_bytes(Ints a, Ints b) {
    return _mm512_cvtepi16_epi8(_mm512_permutex2var_epi16(a.v, odd_words(), b.v));
  }
  static void copy(void* target, const void* source, int64_t bytes) {  // fewer than 64
    const __mmask64 first = (UINT64_C(1) << bytes) - 1;
    _mm512_mask_storeu_epi8(target, first, _mm512_maskz_loadu_epi8(first, source));
  }
  static void store_bytes(uint8_t* target, __m256i a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), a); }
  static __mmask16 sign_bits(const float* values) { return _mm512_movepi32_mask(_mm512_loadu_si512(values)); }

  template <bool kSigned>
  using Lines = WideLines<Simd, kSigned>;

  // The map's own arithmetic: the exponent of c picks a line from two permutes, one fused multiply-add follows it.
  // Bytes of the signed map are taken as they are with signs. That of one, 128, is the only one which then has the
  // wrong sign, and on its line the slope has, too.
  template <bool kSigned>
  struct Decoder {
    static constexpr int kLineOfOne = 8;
    __m512 slope, intercept, offset;
    __m512i large_bits;
    explicit Decoder(const Codebook& codebook) {
      const DynamicDecoder& decoder = codebook.dynamic->decoder;
      const __m512 inverse_scale = _mm512_set1_ps(1 / decoder.scale);
      slope = _mm512_mul_ps(_mm512_loadu_ps(decoder.slope), inverse_scale);
      if (kSigned) slope = _mm512_mask_sub_ps(slope, 1 << kLineOfOne, _mm512_setzero_ps(), slope);
      intercept = _mm512_loadu_ps(decoder.intercept);
      // A code added to the bits of this float adds `scale` to it for each code.
      const float large = (kSigned ? 0x3p22f : 0x1p23f) * decoder.scale;
      large_bits = _mm512_castps_si512(_mm512_set1_ps(large));
      offset = _mm512_set1_ps(kSigned ? large : large - decoder.scale * decoder.code_offset);
    }
    Floats operator()(Codes codes) const {
      const __m512i code = kSigned ? _mm512_cvtepi8_epi32(codes.v) : _mm512_cvtepu8_epi32(codes.v);
      const Floats c = {_mm512_sub_ps(_mm512_castsi512_ps(_mm512_add_epi32(code, large_bits)), offset)};
      const __m512i line = exponent(c).v;
      Floats start = {_mm512_permutexvar_ps(line, intercept)};
      if (kSigned) start = times_sign_of(c, start);
      return {_mm512_fmadd_ps(_mm512_permutexvar_ps(line, slope), c.v, start.v)};
    }
  };
};

inline Simd::Floats operator+(Simd::Floats a, Simd::Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Simd::Floats operator-(Simd::Floats a, Simd::Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Simd::Floats operator*(Simd::Floats a, Simd::Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Simd::Floats operator/(Simd::Floats a, Simd::Floats b) { return {_mm512_div_ps(a.v, b.v)}; }

// What rounding.h has for every set, by masks.
inline __mmask16 first_lanes(int64_t n) { return static_cast<__mmask16>((1u << n) - 1); }
inline Simd::Floats load_first(const float* x, int64_t n) { return {_mm512_maskz_loadu_ps(first_lanes(n), x)}; }
inline Simd::Floats load_first(const bfloat16* x, int64_t n) {
  return Simd::floats(Simd::high_halves(_mm256_maskz_loadu_epi16(first_lanes(n), x)));
}
inline Simd::Floats load_first(const float16* x, int64_t n) {
  return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), x))};
}
inline Simd::Codes load_first(const uint8_t* x, int64_t n) { return {_mm_maskz_loadu_epi8(first_lanes(n), x)}; }
inline Simd::Floats keep_first(Simd::Floats a, int64_t n) { return {_mm512_maskz_mov_ps(first_lanes(n), a.v)}; }

}  // namespace
}  // namespace opt8bit
