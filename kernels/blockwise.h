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
  Simd::Table16 slope, intercept, cap;

  explicit EncoderTables(const DynamicEncoder& encoder)
      : line_end(Simd::table32(encoder.line_end)),
        slope(Simd::table16(encoder.slope)),
        intercept(Simd::table16(encoder.intercept)),
        cap(Simd::table16(encoder.cap)) {}
};

// The first half of a chunk's encoding, by the arithmetic of codebook.h: which lines its values are on.
struct Chunk {
  Simd::Floats normalized[4];
  Simd::Ints line[4];
};

template <bool kSigned>
OPT8BIT_INLINE Chunk find_lines(const float* values, Simd::Floats reciprocal, const EncoderTables& tables) {
  const Simd::Floats smallest = Simd::broadcast(kSmallestNormalized);
  Chunk chunk;
  for (int k = 0; k < 4; ++k) {
    const Simd::Floats ratio = Simd::load(values + k * Simd::kLanes) * reciprocal;
    chunk.normalized[k] = kSigned ? Simd::max_abs(ratio, smallest) : Simd::max(ratio, smallest);
    const Simd::Floats line_end = Simd::lookup(tables.line_end, Simd::exponent(chunk.normalized[k]));
    chunk.line[k] =
        Simd::add_where(Simd::greater(chunk.normalized[k], line_end), Simd::bits(line_end), Simd::broadcast(-1));
  }
  return chunk;
}

// The place on its line of each value of one vector: a code and a fraction in fixed point. A value whose fraction is
// under kEncoderSlack may be one code off.
OPT8BIT_INLINE Simd::Ints place(const Chunk& chunk, int k, const EncoderTables& tables) {
  return Simd::bits(Simd::fma(chunk.normalized[k], Simd::lookup(tables.slope, chunk.line[k]),
                              Simd::lookup(tables.intercept, chunk.line[k])));
}
inline Simd::Ints fraction(Simd::Ints place) { return Simd::low_bits<kFractionBits>(place); }
inline uint32_t uncertain_lanes(Simd::Ints fraction) {
  return Simd::lanes(Simd::less(fraction, Simd::broadcast(kEncoderSlack)));
}

// The second half: the codes; says whether some may be one off.
template <bool kSigned>
OPT8BIT_INLINE bool encode_chunk(const float* values, const Chunk& chunk, const EncoderTables& tables, uint8_t* codes) {
  const Simd::Ints zero = Simd::shift_right<kFractionBits>(Simd::bits(Simd::broadcast(kEncoderBase)));
  const Simd::Ints twice_middle = Simd::add(Simd::add(zero, zero), Simd::broadcast(2 * kSignedZeroCode));
  Simd::Ints code[4], least_fraction = Simd::broadcast(INT32_MAX);
  for (int k = 0; k < 4; ++k) {
    const Simd::Ints uncapped = place(chunk, k, tables);
    least_fraction = Simd::min(least_fraction, fraction(uncapped));
    // Floats of one sign compare as their bits do.
    const Simd::Ints capped = Simd::min(uncapped, Simd::bits(Simd::lookup(tables.cap, chunk.line[k])));
    code[k] = Simd::shift_right<kFractionBits>(capped);
    if (kSigned) {
      const Simd::Mask is_negative = Simd::is_negative(Simd::load(values + k * Simd::kLanes));
      code[k] = Simd::max(Simd::select(is_negative, Simd::subtract(twice_middle, code[k]), code[k]), zero);
    }
  }
  Simd::store_low_bytes(codes, code);
  return uncertain_lanes(least_fraction) != 0;
}

// Searches the codes of a chunk that are not certain.
template <bool kSigned>
OPT8BIT_NOINLINE void decide_chunk(const float* values, float absmax, uint8_t* codes) {
  const Codebook& codebook = dynamic_map(kSigned);
  const EncoderTables tables(codebook.dynamic->encoder);
  const Chunk chunk = find_lines<kSigned>(values, Simd::broadcast(1 / absmax), tables);
  for (int k = 0; k < 4; ++k) {
    for (uint32_t lanes = uncertain_lanes(fraction(place(chunk, k, tables))); lanes; lanes &= lanes - 1) {
      const int lane = k * Simd::kLanes + __builtin_ctz(lanes);
      codes[lane] = nearest_code_from(codes[lane], values[lane], absmax, codebook);
    }
  }
}

// codes[0 .. n) = the nearest codes of values[0 .. n), behind which there is room for one more chunk. No value is
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
  // The halves of two chunks alternate, as one alone is a chain that leaves the processor waiting.
  Chunk chunk = find_lines<kSigned>(values, reciprocal, tables);
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    const Chunk next = find_lines<kSigned>(values + i + kChunk, reciprocal, tables);
    if (__builtin_expect(encode_chunk<kSigned>(values + i, chunk, tables, codes + i), 0))
      decide_chunk<kSigned>(values + i, absmax, codes + i);
    chunk = next;
  }
  if (i < n) {
    alignas(64) uint8_t tail[kChunk];
    if (encode_chunk<kSigned>(values + i, chunk, tables, tail)) decide_chunk<kSigned>(values + i, absmax, tail);
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
