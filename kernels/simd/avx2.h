// Eight lanes: AVX2, FMA and F16C (Intel Haswell, AMD Zen and later).
#pragma once

#include <immintrin.h>

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
    __m256 v;
  };
  struct Ints {
    __m256i v;
  };
  struct Codes {
    __m128i v;
  };
  using Mask = __m256;

  struct Table8 {
    __m256 entries;
  };
  static Table8 table8(const float* entries) { return {_mm256_loadu_ps(entries)}; }
  // By the low 3 bits. Faster than a gather.
  static Floats lookup(Table8 table, Ints index) { return {_mm256_permutevar8x32_ps(table.entries, index.v)}; }

  static Floats broadcast(float x) { return {_mm256_set1_ps(x)}; }
  static Ints broadcast(int32_t x) { return {_mm256_set1_epi32(x)}; }
  static Floats load(const float* source) { return {_mm256_loadu_ps(source)}; }
  static Floats load(const bfloat16* source) {
    const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(source));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16))};
  }
  static Floats load(const float16* source) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
  }
  static Codes load(const uint8_t* source) { return {_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))}; }
  static void store(float* target, Floats a) { _mm256_storeu_ps(target, a.v); }
  static void store(bfloat16* target, Floats a) {
    const __m256i x = _mm256_castps_si256(a.v);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(x, 16), _mm256_set1_epi32(1));
    const __m256i rounded = _mm256_add_epi32(x, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
    const __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
    const __m256i result = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), is_nan);
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(result), _mm256_extracti128_si256(result, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), halves);
  }
  static void store(float16* target, Floats a) {
    const __m128i halves = _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), halves);
  }

  static Ints load(const int16_t* source) {
    return {_mm256_cvtepi16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)))};
  }
  static void store(int16_t* target, Ints a) {
    const __m256i low = _mm256_and_si256(a.v, _mm256_set1_epi32(0xffff));
    const __m128i halves = _mm_packus_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target), halves);
  }
  static void store_high(bfloat16* target, Ints a) {
    store(reinterpret_cast<int16_t*>(target), {_mm256_srli_epi32(a.v, 16)});
  }
  static Ints bits_of(const bfloat16* source) { return bits(load(source)); }

  static Ints bits(Floats a) { return {_mm256_castps_si256(a.v)}; }
  static Ints add(Ints a, Ints b) { return {_mm256_add_epi32(a.v, b.v)}; }
  static Ints subtract(Ints a, Ints b) { return {_mm256_sub_epi32(a.v, b.v)}; }
  static Ints multiply(Ints a, Ints b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
  static Ints exclusive_or(Ints a, Ints b) { return {_mm256_xor_si256(a.v, b.v)}; }
  static Ints min(Ints a, Ints b) { return {_mm256_min_epi32(a.v, b.v)}; }
  static Ints min_unsigned(Ints a, Ints b) { return {_mm256_min_epu32(a.v, b.v)}; }
  static Ints min_of_halves(Ints a, Ints b) { return {_mm256_min_epu16(a.v, b.v)}; }
  template <int kBits>
  static Ints shift_right(Ints a) {
    return {_mm256_srli_epi32(a.v, kBits)};
  }
  template <int kBits>
  static Ints low_bits(Ints a) {
    return {_mm256_and_si256(a.v, _mm256_set1_epi32((1 << kBits) - 1))};
  }
  static Ints high_half(Ints a) { return {_mm256_and_si256(a.v, _mm256_set1_epi32(INT32_C(-0x10000)))}; }
  static Ints lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
  static Floats floats(Ints bits) { return {_mm256_castsi256_ps(bits.v)}; }
  static Ints add_where(Mask mask, Ints a, Ints b) {
    return add(a, {_mm256_and_si256(_mm256_castps_si256(mask), b.v)});
  }
  static Ints exponent(Floats a) { return {_mm256_srli_epi32(_mm256_castps_si256(a.v), 23)}; }
  // a * kNumerator / 2^16, rounded down; both have 16 bits.
  template <int kNumerator>
  static Ints times_fraction(Ints a) {
    return {_mm256_mulhi_epu16(a.v, _mm256_set1_epi32(kNumerator))};
  }

  static Floats fma(Floats a, Floats b, Floats c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
  static Floats sqrt(Floats a) { return {_mm256_sqrt_ps(a.v)}; }
  static Floats abs(Floats a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
  static Floats min(Floats a, Floats b) { return {_mm256_min_ps(a.v, b.v)}; }
  static Floats max(Floats a, Floats b) { return {_mm256_max_ps(a.v, b.v)}; }
  static Floats min_of_results(Floats a, Floats b) { return min(a, b); }
  static Floats max_of_results(Floats a, Floats b) { return max(a, b); }
  static Floats maximum(Floats a, Floats b) {
    const __m256 is_nan = _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q);
    return {_mm256_blendv_ps(_mm256_max_ps(a.v, b.v), a.v, is_nan)};
  }
  static Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
  static Mask greater(Floats a, Floats b) { return _mm256_cmp_ps(a.v, b.v, _CMP_GT_OQ); }
  static Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
  static Mask less(Ints a, Ints b) { return _mm256_castsi256_ps(_mm256_cmpgt_epi32(b.v, a.v)); }
  static Mask is_nan(Floats a) { return _mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q); }
  static Floats select(Mask mask, Floats a, Floats b) { return {_mm256_blendv_ps(b.v, a.v, mask)}; }
  static void add_squares(double* sums, Floats a) {
    const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128(a.v));
    const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps(a.v, 1));
    _mm256_storeu_pd(sums, _mm256_add_pd(_mm256_loadu_pd(sums), _mm256_mul_pd(low, low)));
    _mm256_storeu_pd(sums + 4, _mm256_add_pd(_mm256_loadu_pd(sums + 4), _mm256_mul_pd(high, high)));
  }
  static uint32_t lanes(Mask mask) { return static_cast<uint32_t>(_mm256_movemask_ps(mask)); }

  static float horizontal_max(Floats a) {
    __m128 x = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    x = _mm_max_ps(x, _mm_movehl_ps(x, x));
    return _mm_cvtss_f32(_mm_max_ss(x, _mm_movehdup_ps(x)));
  }

  static void store_third_bytes(uint8_t* target, const Ints (&a)[4]) { store_bytes(target, third_bytes(a)); }
  static void store_signed_bytes(uint8_t* target, const Ints (&a)[4], const float* values, bool is_mirrored) {
    const __m256i bytes = third_bytes(a), mirror = _mm256_set1_epi8(static_cast<char>(-is_mirrored));
    Ints x[4];
    for (int i = 0; i < 4; ++i) x[i] = bits(load(values + i * kLanes));
    // Packing saturates, which keeps the sign.
    const __m256i signs = _mm256_packs_epi16(_mm256_packs_epi32(x[0].v, x[1].v), _mm256_packs_epi32(x[2].v, x[3].v));
    const __m256i negated = _mm256_sub_epi8(_mm256_setzero_si256(), _mm256_min_epu8(bytes, _mm256_set1_epi8(127)));
    store_bytes(target, _mm256_blendv_epi8(bytes, negated, _mm256_xor_si256(signs, mirror)));
  }
  static __m256i third_bytes(const Ints (&a)[4]) {
    Ints bytes[4];
    for (int i = 0; i < 4; ++i) bytes[i] = low_bits<8>(shift_right<16>(a[i]));
    return _mm256_packus_epi16(_mm256_packus_epi32(bytes[0].v, bytes[1].v),
                               _mm256_packus_epi32(bytes[2].v, bytes[3].v));
  }
  static void copy(void* target, const void* source, int64_t bytes) { std::memcpy(target, source, bytes); }
  static void store_bytes(uint8_t* target, __m256i packed) {
    // Packing interleaves 128-bit lanes: dword 4 * lane + vector is wanted at 2 * vector + lane.
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(target), _mm256_permutevar8x32_epi32(packed, order));
  }

  template <bool kSigned>
  using Lines = NarrowLines<Simd, kSigned>;

  // The map's own arithmetic, as in avx512.h.
  template <bool kSigned>
  struct Decoder {
    Table8 slope, intercept;
    __m256 scale, offset;
    explicit Decoder(const Codebook& codebook) {
      const DynamicDecoder& decoder = codebook.dynamic->decoder;
      slope = {_mm256_mul_ps(_mm256_loadu_ps(decoder.slope), _mm256_set1_ps(1 / decoder.scale))};
      // The line of one is entry 0, as zero's is.
      if (kSigned) slope.entries = _mm256_xor_ps(slope.entries, _mm256_setr_ps(-0.0f, 0, 0, 0, 0, 0, 0, 0));
      intercept = table8(decoder.intercept);
      scale = _mm256_set1_ps(decoder.scale);
      offset = _mm256_set1_ps(kSigned ? 0 : decoder.scale * decoder.code_offset);
    }
    Floats operator()(Codes codes) const {
      const __m256i code = kSigned ? _mm256_cvtepi8_epi32(codes.v) : _mm256_cvtepu8_epi32(codes.v);
      const Floats c = {_mm256_fmadd_ps(_mm256_cvtepi32_ps(code), scale, offset)};
      const Ints line = exponent(c);
      Floats start = lookup(intercept, line);
      if (kSigned) start.v = _mm256_xor_ps(start.v, _mm256_and_ps(_mm256_set1_ps(-0.0f), c.v));
      return fma(lookup(slope, line), c, start);
    }
  };
};

inline Simd::Floats operator+(Simd::Floats a, Simd::Floats b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Simd::Floats operator-(Simd::Floats a, Simd::Floats b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Simd::Floats operator*(Simd::Floats a, Simd::Floats b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Simd::Floats operator/(Simd::Floats a, Simd::Floats b) { return {_mm256_div_ps(a.v, b.v)}; }

}  // namespace
}  // namespace opt8bit
