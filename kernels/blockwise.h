// Blocks of codes: decode, the largest magnitude, encode. Included after one of simd/*.h.
#pragma once

#include <cmath>

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

// The first of the largest magnitudes of values[0 .. n), with its sign; a zero has none.
OPT8BIT_NOINLINE float first_of_magnitude(float magnitude, const float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i)
    if (__builtin_fabsf(values[i]) == magnitude) return values[i] + 0.0f;
  return 0;
}

inline bool has_good_reciprocal(float magnitude) { return magnitude >= 0x1p-100f && magnitude <= 0x1p100f; }
// Of the magnitude of a scale. Zero, which makes every code that of zero, where it would not be good.
inline Simd::Floats reciprocal_of(float scale) {
  const float magnitude = __builtin_fabsf(scale);
  return Simd::broadcast(has_good_reciprocal(magnitude) ? 1 / magnitude : 0.0f);
}

// The first half of a chunk's encoding, by the arithmetic of codebook.h: which lines its values are on.
struct Chunk {
  Simd::Floats shifted[4];
  Simd::Ints line[4];
};

template <bool kSigned>
OPT8BIT_INLINE Chunk find_lines(const float* values, Simd::Floats reciprocal, const Simd::Lines<kSigned>& lines) {
  Chunk chunk;
#pragma GCC unroll 4  // or a chunk would live in memory
  for (int k = 0; k < 4; ++k) {
    const Simd::Floats value = Simd::load(values + k * Simd::kLanes);
    chunk.shifted[k] = lines.shifted(kSigned ? Simd::abs(value) : value, reciprocal);
    chunk.line[k] = lines.line(chunk.shifted[k]);
  }
  return chunk;
}

inline Simd::Ints fraction(Simd::Ints place) { return Simd::low_bits<kFractionBits>(place); }
inline uint32_t uncertain_lanes(Simd::Ints fraction) {
  return Simd::lanes(Simd::less(fraction, Simd::broadcast(kEncoderSlack)));
}

// The second half: the codes; says whether some may be one off, and in the unsigned map whether one is that of zero.
// `is_mirrored` says whether the block's scale is negative.
template <bool kSigned>
OPT8BIT_INLINE bool encode_chunk(const float* values, const Chunk& chunk, const Simd::Lines<kSigned>& lines,
                                 bool is_mirrored, uint8_t* codes, bool& has_zero) {
  Simd::Ints capped[4], least_fraction = Simd::broadcast(-1);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const Simd::Ints uncapped = lines.place(chunk.shifted[k], chunk.line[k]);
    least_fraction = Simd::min_of_halves(least_fraction, uncapped);
    capped[k] = lines.capped(uncapped, chunk.line[k]);
  }
  if (kSigned) {
    Simd::store_signed_bytes(codes, capped, values, is_mirrored);
  } else {
    Simd::store_third_bytes(codes, capped);
    const Simd::Ints least = Simd::min(Simd::min(capped[0], capped[1]), Simd::min(capped[2], capped[3]));
    has_zero = Simd::lanes(Simd::less(least, Simd::broadcast(kUnsignedCodeOne))) != 0;
  }
  return uncertain_lanes(fraction(least_fraction)) != 0;
}

// Searches the codes of a chunk that are not certain.
template <bool kSigned>
OPT8BIT_NOINLINE void decide_chunk(const float* values, float scale, uint8_t* codes) {
  const Codebook& codebook = dynamic_map(kSigned);
  const Simd::Lines<kSigned> lines(*codebook.dynamic);
  const Chunk chunk = find_lines<kSigned>(values, reciprocal_of(scale), lines);
  for (int k = 0; k < 4; ++k) {
    for (uint32_t lanes = uncertain_lanes(fraction(lines.place(chunk.shifted[k], chunk.line[k]))); lanes;
         lanes &= lanes - 1) {
      const int lane = k * Simd::kLanes + __builtin_ctz(lanes);
      codes[lane] = nearest_state_code_from(codes[lane], values[lane], scale, codebook);
    }
  }
}

// What is positive has at least the code of the least positive value, though zero may be nearer.
OPT8BIT_NOINLINE void keep_positive(const float* values, int64_t n, uint8_t* codes) {
  for (int64_t i = 0; i < n; ++i) codes[i] += (codes[i] == 0) & (values[i] > 0);
}

// The nearest codes of blocks that follow each other, as states hold them: counted from that of zero. Their values
// begin `stride` after each other's, and behind the last there is room for one more chunk. No value is larger than its
// scale in magnitude, or negative where the map has no signs; a NaN is coded as zero. With `kKeepsPositive`, in the
// unsigned map, nothing else but zero is.
template <bool kSigned, bool kKeepsPositive = false>
OPT8BIT_NOINLINE void encode_blocks(const float* values, int64_t stride, const int64_t* lengths, const float* scales,
                                    int64_t count, uint8_t* codes) {
  const Simd::Lines<kSigned> lines(*dynamic_map(kSigned).dynamic);
  // Where registers hold two chunks, their halves alternate, also from one block to the next, as one alone is a chain
  // that leaves the processor waiting.
  Simd::Floats next_reciprocal = reciprocal_of(scales[0]);
  Chunk ahead;
  if (Simd::kOverlapsChunks) ahead = find_lines<kSigned>(values, next_reciprocal, lines);
  for (int64_t block = 0; block < count; ++block, values += stride) {
    const int64_t n = lengths[block];
    const float scale = scales[block];
    const Simd::Floats reciprocal = next_reciprocal;
    if (block + 1 < count) next_reciprocal = reciprocal_of(scales[block + 1]);
    for (int64_t i = 0; i < n; i += kChunk) {
      const Chunk chunk = Simd::kOverlapsChunks ? ahead : find_lines<kSigned>(values + i, reciprocal, lines);
      if (Simd::kOverlapsChunks) {
        const bool is_last = i + kChunk >= n;
        ahead = find_lines<kSigned>(is_last ? values + stride : values + i + kChunk,
                                    is_last ? next_reciprocal : reciprocal, lines);
      }
      alignas(64) uint8_t tail[kChunk];
      uint8_t* const target = i + kChunk <= n ? codes + i : tail;
      bool has_zero = false;
      if (__builtin_expect(encode_chunk<kSigned>(values + i, chunk, lines, scale < 0, target, has_zero), 0)) {
        decide_chunk<kSigned>(values + i, scale, target);
        has_zero = true;  // maybe
      }
      if (kKeepsPositive && __builtin_expect(has_zero, 0) && scale != 0) keep_positive(values + i, kChunk, target);
      if (target == tail) Simd::copy(codes + i, tail, n - i);
    }
    if (scale != 0 && !has_good_reciprocal(__builtin_fabsf(scale))) {
      for (int64_t i = 0; i < n; ++i) codes[i] = nearest_state_code(values[i], scale, dynamic_map(kSigned));
      if (kKeepsPositive) keep_positive(values, n, codes);
    }
    codes += n;
  }
}

}  // namespace
}  // namespace opt8bit
