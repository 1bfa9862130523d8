// Blocks of codes: decode, the largest magnitude, encode. Included after one of simd/*.h.
#pragma once

#include <cmath>
#include <cstring>

#include "codebook.h"

#define OPT8BIT_INLINE inline __attribute__((always_inline))
#define OPT8BIT_NOINLINE __attribute__((noinline))

namespace opt8bit {
namespace {

// Codes are read and written in chunks of this many; buffers of floats are padded to a whole number of chunks.
constexpr int kChunk = 4 * Simd::kLanes;

// The largest finite magnitude of values[0 .. n).
inline float largest_finite(const float* values, int64_t n) {
  float largest = 0;
  for (int64_t i = 0; i < n; ++i) {
    const float magnitude = __builtin_fabsf(values[i]);
    if (magnitude > largest && magnitude <= __FLT_MAX__) largest = magnitude;
  }
  return largest;
}

// `largest` is the maximum of the magnitudes that are not NaN.
inline float finite_absmax(float largest, const float* values, int64_t n) {
  return largest <= __FLT_MAX__ ? largest : largest_finite(values, n);
}

struct EncoderTables {
  Simd::Table32 line_end;
  Simd::Table16 slope, intercept;
  int16_t bias;

  explicit EncoderTables(const DynamicEncoder& encoder)
      : line_end(Simd::table32(encoder.line_end)),
        slope(Simd::table16(encoder.slope)),
        intercept(Simd::table16(encoder.intercept)),
        bias(encoder.bias) {}
};

// Codes of one vector, counted from zero, by the arithmetic of codebook.h. A lane whose `fraction` is under
// kEncoderSlack may be one off.
template <bool kSigned>
OPT8BIT_INLINE Simd::Ints encode_vector(Simd::Floats x, Simd::Floats reciprocal, const EncoderTables& tables,
                                        Simd::Floats* fraction) {
  const Simd::Floats ratio = x * reciprocal, smallest = Simd::broadcast(kSmallestNormalized);
  const Simd::Floats normalized = kSigned ? Simd::max_abs(ratio, smallest) : Simd::max(ratio, smallest);
  const Simd::Floats line_end = Simd::lookup(tables.line_end, Simd::exponent(normalized));
  const Simd::Ints line =
      Simd::add_where(Simd::greater(normalized, line_end), Simd::bits(line_end), Simd::broadcast(-1));
  const Simd::Floats intercept = Simd::lookup(tables.intercept, line);
  const Simd::Floats t = Simd::fma(normalized, Simd::lookup(tables.slope, line), intercept);
  *fraction = Simd::fraction(t);
  const Simd::Floats c = Simd::min(t, intercept * Simd::broadcast(kCapOfIntercept));
  return Simd::truncate(kSigned ? Simd::times_sign_of(x, c) : c);
}

inline uint32_t uncertain_lanes(Simd::Floats fraction) {
  return Simd::lanes(Simd::less(fraction, Simd::broadcast(kEncoderSlack)));
}

// Encodes one chunk; says whether some code may be one off.
template <bool kSigned>
OPT8BIT_INLINE bool encode_chunk(const float* values, Simd::Floats reciprocal, const EncoderTables& tables,
                                 uint8_t* codes) {
  Simd::Ints c[4];
  Simd::Floats fraction[4];
  for (int k = 0; k < 4; ++k)
    c[k] = encode_vector<kSigned>(Simd::load(values + k * Simd::kLanes), reciprocal, tables, &fraction[k]);
  Simd::store_codes(codes, c, tables.bias);
  return uncertain_lanes(Simd::min(Simd::min(fraction[0], fraction[1]), Simd::min(fraction[2], fraction[3]))) != 0;
}

// Searches the codes of a chunk that are not certain.
template <bool kSigned>
OPT8BIT_NOINLINE void decide_chunk(const float* values, float absmax, uint8_t* codes) {
  const Codebook& codebook = dynamic_map(kSigned);
  const EncoderTables tables(codebook.dynamic->encoder);
  for (int k = 0; k < kChunk; k += Simd::kLanes) {
    Simd::Floats fraction;
    encode_vector<kSigned>(Simd::load(values + k), Simd::broadcast(1 / absmax), tables, &fraction);
    for (uint32_t lanes = uncertain_lanes(fraction); lanes; lanes &= lanes - 1) {
      const int lane = k + __builtin_ctz(lanes);
      codes[lane] = nearest_code_from(codes[lane], values[lane], absmax, codebook);
    }
  }
}

// codes[0 .. n) = the nearest codes of values[0 .. n), behind which there is room up to a whole chunk. No value is
// larger than absmax in magnitude; a NaN is coded as zero.
template <bool kSigned>
OPT8BIT_INLINE void encode_block(const float* values, int64_t n, float absmax, const EncoderTables& tables,
                                 uint8_t* codes) {
  const bool has_good_reciprocal = absmax >= 0x1p-100f && absmax <= 0x1p100f;
  if (!has_good_reciprocal) {
    for (int64_t i = 0; i < n; ++i) codes[i] = nearest_code(values[i], absmax, dynamic_map(kSigned));
    return;
  }
  const Simd::Floats reciprocal = Simd::broadcast(1 / absmax);
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk)
    if (__builtin_expect(encode_chunk<kSigned>(values + i, reciprocal, tables, codes + i), 0))
      decide_chunk<kSigned>(values + i, absmax, codes + i);
  if (i < n) {
    alignas(64) uint8_t tail[kChunk];
    if (encode_chunk<kSigned>(values + i, reciprocal, tables, tail)) decide_chunk<kSigned>(values + i, absmax, tail);
    std::memcpy(codes + i, tail, n - i);
  }
}

// The same for blocks whose codes follow each other, and whose values begin `stride` after each other's.
template <bool kSigned>
OPT8BIT_NOINLINE void encode_blocks(const float* values, int64_t stride, const int64_t* lengths, const float* absmax,
                                    int64_t count, uint8_t* codes) {
  const EncoderTables tables(dynamic_map(kSigned).dynamic->encoder);
  for (int64_t block = 0; block < count; ++block) {
    encode_block<kSigned>(values + block * stride, lengths[block], absmax[block], tables, codes);
    codes += lengths[block];
  }
}

}  // namespace
}  // namespace opt8bit
