// Grids of one group for a batch of rows, for the lanes of one instruction set: see opt8bit/quant/uniform.py.
#pragma once

#include <algorithm>
#include <cstdint>

#include "weight_rounding.h"
#include OPT8BIT_SIMD

namespace opt8bit {
namespace {
namespace weight_rounding {

constexpr int kRowVectors = Simd::kLanes == 16 ? 4 : 2;  // as many as have room in registers, four columns at a time
constexpr int kRows = kRowVectors * Simd::kLanes;

// One number for each row of the batch.
struct Column {
  Simd::Floats v[kRowVectors];
  static Column broadcast(float x) {
    Column a;
    for (auto& v : a.v) v = Simd::broadcast(x);
    return a;
  }
  static Column load(const float* source) {
    Column a;
    for (int i = 0; i < kRowVectors; ++i) a.v[i] = Simd::load(source + i * Simd::kLanes);
    return a;
  }
  void store(float* target) const {
    for (int i = 0; i < kRowVectors; ++i) Simd::store(target + i * Simd::kLanes, v[i]);
  }
  // function(x, y ...) of the vectors of several columns.
  template <class Function, class... Columns>
  static Column map(Function function, const Columns&... columns) {
    Column a;
    for (int i = 0; i < kRowVectors; ++i) a.v[i] = function(columns.v[i]...);
    return a;
  }
};

// To the nearest integer, ties to even, as torch.round: adding pushes the fraction out of the significand. Numbers too
// large for that stay large, which is all that a clamp asks.
inline Simd::Floats round(Simd::Floats x) {
  const Simd::Floats magic = Simd::broadcast(12582912.0f);
  return x + magic - magic;
}

struct Grid {
  Column scale, zero_point;
};

inline Column nearest(const Column& x, const Grid& grid, float largest) {
  const Simd::Floats zero = Simd::broadcast(0.0f), top = Simd::broadcast(largest);
  return Column::map(
      [&](auto x, auto scale, auto zero_point) {
        const auto code = Simd::min(Simd::max(round(x / scale) + zero_point, zero), top);
        return (code - zero_point) * scale;
      },
      x, grid.scale, grid.zero_point);
}

// Rows [first, first + kRows) of a matrix (rows, width), and where it ends rows of zeros, as `width` columns.
inline void load_rows(const float* matrix, int64_t rows, int64_t width, int64_t first, float* columns) {
  for (int64_t r = 0; r < kRows; ++r)
    for (int64_t j = 0; j < width; ++j)
      columns[j * kRows + r] = first + r < rows ? matrix[(first + r) * width + j] : 0.0f;
}

inline void store_rows(const float* columns, int64_t rows, int64_t width, int64_t first, float* matrix) {
  for (int64_t r = 0; r < std::min<int64_t>(kRows, rows - first); ++r)
    for (int64_t j = 0; j < width; ++j) matrix[(first + r) * width + j] = columns[j * kRows + r];
}

// The nearest positive scale that a dtype holds.
inline float storable(float scale, DType dtype) {
  if (dtype == DType::bfloat16)
    return std::clamp(float_from_bfloat16(bfloat16_from_float(scale)), 0x1p-126f, 0x1.fep127f);
  if (dtype == DType::float16) return std::clamp(float_from_float16(float16_from_float(scale)), 0x1p-24f, 65504.0f);
  return scale;
}

inline Column storable(const Column& scales, DType dtype) {
  if (dtype == DType::float32) return scales;
  float each[kRows];
  scales.store(each);
  for (float& scale : each) scale = storable(scale, dtype);
  return Column::load(each);
}

inline Grid spanning(const Column& low, const Column& high, float part, const WeightRounding& layer) {
  const Simd::Floats zero = Simd::broadcast(0.0f), one = Simd::broadcast(1.0f), share = Simd::broadcast(part);
  Grid grid;
  grid.scale = Column::map(
      [&](auto low, auto high) {
        const auto scale = (high * share - low * share) / Simd::broadcast(layer.largest);
        return Simd::select(Simd::greater(scale, zero), scale, one);  // a group of zeros
      },
      low, high);
  grid.scale = storable(grid.scale, layer.scale_dtype);
  const Simd::Floats middle = Simd::broadcast((layer.largest + 1) / 2), top = Simd::broadcast(layer.largest);
  grid.zero_point = Column::map(
      [&](auto low, auto scale) {
        return layer.is_symmetric ? middle : Simd::min(round((zero - low * share) / scale), top);
      },
      low, grid.scale);
  return grid;
}

// The sum over a group's columns of importance * (nearest - x)^2. A reciprocal will do for a search.
inline Column search_error(const float* columns, int64_t count, const float* importance, const Grid& grid,
                           float largest) {
  const Simd::Floats zero = Simd::broadcast(0.0f), top = Simd::broadcast(largest);
  const Column inverse = Column::map([](auto scale) { return Simd::broadcast(1.0f) / scale; }, grid.scale);
  Column sum = Column::broadcast(0.0f);
  for (int64_t j = 0; j < count; ++j) {
    const auto weight = Simd::broadcast(importance[j]);
    sum = Column::map(
        [&](auto x, auto inverse, auto scale, auto zero_point, auto sum) {
          const auto code = Simd::min(Simd::max(round(x * inverse) + zero_point, zero), top);
          const auto error = (code - zero_point) * scale - x;
          return Simd::fma(weight * error, error, sum);
        },
        Column::load(columns + j * kRows), inverse, grid.scale, grid.zero_point, sum);
  }
  return sum;
}

// The grid of one group, whose `count` columns start at `columns`.
inline Grid fit_group(const float* columns, int64_t count, const float* importance, const WeightRounding& layer) {
  Column low = Column::broadcast(0.0f), high = low;
  for (int64_t j = 0; j < count; ++j) {
    const Column x = Column::load(columns + j * kRows);
    low = Column::map([](auto a, auto b) { return Simd::min(a, b); }, low, x);
    high = Column::map([](auto a, auto b) { return Simd::max(a, b); }, high, x);
  }
  if (layer.is_symmetric) {
    const Simd::Floats zero = Simd::broadcast(0.0f);
    high = Column::map([&](auto low, auto high) { return Simd::max(high, zero - low); }, low, high);
    low = Column::map([&](auto high) { return zero - high; }, high);
  }
  Grid best = spanning(low, high, 1.0f, layer);
  Column least = Column::broadcast(__builtin_inff());
  for (int64_t f = 0; f < layer.fraction_count; ++f) {
    const Grid grid = spanning(low, high, layer.fractions[f], layer);
    const Column error = search_error(columns, count, importance, grid, layer.largest);
    for (int i = 0; i < kRowVectors; ++i) {
      const auto better = Simd::less(error.v[i], least.v[i]);
      least.v[i] = Simd::select(better, error.v[i], least.v[i]);
      best.scale.v[i] = Simd::select(better, grid.scale.v[i], best.scale.v[i]);
      best.zero_point.v[i] = Simd::select(better, grid.zero_point.v[i], best.zero_point.v[i]);
    }
  }
  return best;
}

}  // namespace weight_rounding
}  // namespace
}  // namespace opt8bit
