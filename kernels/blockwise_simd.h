// The kernels that quantize and dequantize whole tensors, for the lanes of one instruction set.
#pragma once

#include OPT8BIT_SIMD

#include "blockwise.h"
#include "optimizer_step.h"
#include "simd/first_lanes.h"

namespace opt8bit {
namespace {

constexpr int64_t kPiece = 1024;  // elements converted to float32 at a time

template <class T>
void load_padded(const T* x, int64_t n, float* values) {
  int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store(values + i, Simd::load(x + i));
  if (i < n) Simd::store(values + i, load_first(x + i, n - i));
}

template <class T>
void store_prefix(T* x, int64_t n, const float* values) {
  int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store(x + i, Simd::load(values + i));
  if (i < n) store_first(x + i, n - i, Simd::load(values + i));
}

int64_t piece_length(int64_t begin, int64_t n) { return n - begin < kPiece ? n - begin : kPiece; }

// Calls function(values, length, begin) on pieces of a block, as float32, with zeros of a chunk behind them.
template <class T, class Function>
void for_pieces(const T* x, int64_t n, Function function) {
  alignas(64) float values[kPiece + kChunk];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = piece_length(begin, n);
    load_padded(x + begin, length, values);
    for (int64_t i = length; i < length + kChunk; ++i) values[i] = 0;
    function(values, length, begin);
  }
}

// Infinities are coded as the largest value, and what is below the map as the least.
inline void clip(float* values, int64_t n, float least, float largest) {
  for (int64_t i = 0; i < n; ++i) values[i] = values[i] > largest ? largest : values[i] < least ? least : values[i];
}

// Of a tensor without signs, negative values do not count.
template <class T>
float absmax_of(const T* x, int64_t n, bool is_signed = true) {
  float largest = 0;
  for_pieces(x, n, [&](float* values, int64_t length, int64_t) {
    if (!is_signed) clip(values, length, 0, __builtin_inff());
    Simd::Floats magnitudes = Simd::broadcast(0.0f);
    int64_t i = 0;
    for (; i + Simd::kLanes <= length; i += Simd::kLanes)
      magnitudes = Simd::max(Simd::abs(Simd::load(values + i)), magnitudes);
    float piece_largest = Simd::horizontal_max(magnitudes);
    for (; i < length; ++i)
      piece_largest = __builtin_fabsf(values[i]) > piece_largest ? __builtin_fabsf(values[i]) : piece_largest;
    piece_largest = finite_absmax(piece_largest, values, length);
    if (piece_largest > largest) largest = piece_largest;
  });
  return largest;
}

template <class T>
void dequantize_block(const uint8_t* codes, int64_t n, float scale, const float* table, T* x) {
  alignas(64) float values[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = piece_length(begin, n);
    for (int64_t i = 0; i < length; ++i) values[i] = table[codes[begin + i]] * scale;
    store_prefix(x + begin, length, values);
  }
}

template <bool kSigned>
void quantize_piece(float* values, int64_t n, float absmax, uint8_t* codes) {
  clip(values, n, kSigned ? -absmax : 0.0f, absmax);
  encode_blocks<kSigned>(values, 0, &n, &absmax, 1, codes);
  if (kSigned)
    for (int64_t i = 0; i < n; ++i) codes[i] = static_cast<uint8_t>(codes[i] + kSignedZeroCode);
}

template <class T>
void quantize_typed(const T* x, const BlockView& view, const Codebook& codebook, uint8_t* codes, float* absmax,
                    int64_t first_block, int64_t last_block) {
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    const float largest = absmax[block] = absmax_of(x + offset, n);
    for_pieces(x + offset, n, [&](float* values, int64_t length, int64_t begin) {
      uint8_t* const target = codes + offset + begin;
      if (!codebook.dynamic)
        for (int64_t i = 0; i < length; ++i) target[i] = nearest_code(values[i], largest, codebook);
      else if (codebook.dynamic->is_signed) quantize_piece<true>(values, length, largest, target);
      else quantize_piece<false>(values, length, largest, target);
    });
  });
}

void quantize(const void* x, DType dtype, const BlockView& view, const Codebook& codebook, uint8_t* codes,
              float* absmax, int64_t first_block, int64_t last_block) {
  switch (dtype) {
    case DType::float32:
      return quantize_typed(static_cast<const float*>(x), view, codebook, codes, absmax, first_block, last_block);
    case DType::bfloat16:
      return quantize_typed(static_cast<const bfloat16*>(x), view, codebook, codes, absmax, first_block, last_block);
    case DType::float16:
      return quantize_typed(static_cast<const float16*>(x), view, codebook, codes, absmax, first_block, last_block);
  }
}

template <class T>
void dequantize_typed(const uint8_t* codes, const float* scales, const BlockView& view, const float* values, T* x,
                      int64_t first_block, int64_t last_block) {
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    dequantize_block(codes + offset, n, scales[block], values, x + offset);
  });
}

void dequantize(const uint8_t* codes, const float* scales, const BlockView& view, const float* values, void* x,
                DType dtype, int64_t first_block, int64_t last_block) {
  switch (dtype) {
    case DType::float32:
      return dequantize_typed(codes, scales, view, values, static_cast<float*>(x), first_block, last_block);
    case DType::bfloat16:
      return dequantize_typed(codes, scales, view, values, static_cast<bfloat16*>(x), first_block, last_block);
    case DType::float16:
      return dequantize_typed(codes, scales, view, values, static_cast<float16*>(x), first_block, last_block);
  }
}

template <bool kSigned>
void encode_state_of_sign(const float* x, const BlockView& view, uint8_t* codes, float* scales, int64_t first_block,
                          int64_t last_block) {
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    const float absmax = absmax_of(x + offset, n, kSigned);
    const float scale = kSigned ? first_of_magnitude(absmax, x + offset, n) : absmax;
    scales[block] = scale;
    for_pieces(x + offset, n, [&](float* values, int64_t length, int64_t begin) {
      clip(values, length, kSigned ? -absmax : 0.0f, absmax);
      encode_blocks<kSigned, !kSigned>(values, 0, &length, &scale, 1, codes + offset + begin);
    });
  });
}

void encode_state(const float* x, const BlockView& view, bool is_signed, uint8_t* codes, float* scales,
                  int64_t first_block, int64_t last_block) {
  const auto encode = is_signed ? encode_state_of_sign<true> : encode_state_of_sign<false>;
  encode(x, view, codes, scales, first_block, last_block);
}

}  // namespace
}  // namespace opt8bit
