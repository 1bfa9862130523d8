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

template <class T, class Encode>
void quantize_block(const T* x, int64_t n, const Encode& encode, uint8_t* codes, float* absmax) {
  alignas(64) float values[kPiece + kChunk] = {};
  float largest = 0;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = piece_length(begin, n);
    load_padded(x + begin, length, values);
    Simd::Floats magnitudes = Simd::broadcast(0.0f);
    int64_t i = 0;
    for (; i + Simd::kLanes <= length; i += Simd::kLanes)
      magnitudes = Simd::max(Simd::abs(Simd::load(values + i)), magnitudes);
    float piece_largest = Simd::horizontal_max(magnitudes);
    for (; i < length; ++i)
      piece_largest = __builtin_fabsf(values[i]) > piece_largest ? __builtin_fabsf(values[i]) : piece_largest;
    piece_largest = finite_absmax(piece_largest, values, length);
    if (piece_largest > largest) largest = piece_largest;
  }
  *absmax = largest;
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = piece_length(begin, n);
    if (n > kPiece) load_padded(x + begin, length, values);
    encode(values, length, largest, codes + begin);
  }
}

template <class T>
void dequantize_block(const uint8_t* codes, int64_t n, float absmax, const Codebook& codebook, T* x) {
  alignas(64) float values[kPiece];
  for (int64_t begin = 0; begin < n; begin += kPiece) {
    const int64_t length = piece_length(begin, n);
    for (int64_t i = 0; i < length; ++i) values[i] = codebook.values[codes[begin + i]] * absmax;
    store_prefix(x + begin, length, values);
  }
}

template <class T, class Encode>
void quantize_blocks(const T* x, const BlockView& view, uint8_t* codes, float* absmax, int64_t first_block,
                     int64_t last_block, const Encode& encode) {
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    quantize_block(x + offset, n, encode, codes + offset, absmax + block);
  });
}

template <class T>
void quantize_typed(const T* x, const BlockView& view, const Codebook& codebook, uint8_t* codes, float* absmax,
                    int64_t first_block, int64_t last_block) {
  const auto encode_by_search = [&](const float* values, int64_t n, float absmax, uint8_t* codes) {
    for (int64_t i = 0; i < n; ++i) codes[i] = nearest_code(values[i], absmax, codebook);
  };
  const auto encode = [&](float* values, int64_t n, float absmax, uint8_t* codes) {
    // Infinities are coded as the largest value, and what is below the map as the least.
    const float least = codebook.dynamic->is_signed ? -absmax : 0.0f;
    for (int64_t i = 0; i < n; ++i) values[i] = values[i] > absmax ? absmax : values[i] < least ? least : values[i];
    const auto encode_blocks_of_sign = codebook.dynamic->is_signed ? encode_blocks<true> : encode_blocks<false>;
    encode_blocks_of_sign(values, 0, &n, &absmax, 1, codes);
  };
  if (codebook.dynamic) quantize_blocks(x, view, codes, absmax, first_block, last_block, encode);
  else quantize_blocks(x, view, codes, absmax, first_block, last_block, encode_by_search);
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
void dequantize_typed(const uint8_t* codes, const float* absmax, const BlockView& view, const Codebook& codebook, T* x,
                      int64_t first_block, int64_t last_block) {
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    dequantize_block(codes + offset, n, absmax[block], codebook, x + offset);
  });
}

void dequantize(const uint8_t* codes, const float* absmax, const BlockView& view, const Codebook& codebook, void* x,
                DType dtype, int64_t first_block, int64_t last_block) {
  switch (dtype) {
    case DType::float32:
      return dequantize_typed(codes, absmax, view, codebook, static_cast<float*>(x), first_block, last_block);
    case DType::bfloat16:
      return dequantize_typed(codes, absmax, view, codebook, static_cast<bfloat16*>(x), first_block, last_block);
    case DType::float16:
      return dequantize_typed(codes, absmax, view, codebook, static_cast<float16*>(x), first_block, last_block);
  }
}

}  // namespace
}  // namespace opt8bit
