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

// The scale of a group whose range has so many steps.
inline Column scale_of(const Column& range, float steps, DType dtype) {
  const Simd::Floats zero = Simd::broadcast(0.0f), one = Simd::broadcast(1.0f), count = Simd::broadcast(steps);
  const auto scale = [&](auto range) {
    const auto scale = range / count;
    return Simd::select(Simd::greater(scale, zero), scale, one);  // a group of zeros
  };
  return storable(Column::map(scale, range), dtype);
}

inline float middle_of(const WeightRounding& layer) { return (layer.largest + 1) / 2; }

inline Grid spanning(const Column& low, const Column& high, float part, const WeightRounding& layer) {
  const Simd::Floats zero = Simd::broadcast(0.0f), share = Simd::broadcast(part);
  const auto range = [&](auto low, auto high) { return high * share - low * share; };
  Grid grid;
  grid.scale = scale_of(Column::map(range, low, high), layer.largest, layer.scale_dtype);
  if (layer.zero_points == ZeroPoints::kMiddle) {
    grid.zero_point = Column::broadcast(middle_of(layer));
    return grid;
  }
  const Simd::Floats top = Simd::broadcast(layer.largest);
  grid.zero_point = Column::map(
      [&](auto low, auto scale) { return Simd::min(round((zero - low * share) / scale), top); }, low, grid.scale);
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

// The same of a grid whose zero point is in the middle of the codes or one below, and of its mirror image.
struct EitherError {
  Column grid, mirrored;
};

inline EitherError search_either(const float* columns, int64_t count, const float* importance, const Grid& grid,
                                 float largest) {
  const Simd::Floats zero = Simd::broadcast(0.0f), one = Simd::broadcast(1.0f), top = Simd::broadcast(largest);
  const Column inverse = Column::map([&](auto scale) { return one / scale; }, grid.scale);
  EitherError sum{Column::broadcast(0.0f), Column::broadcast(0.0f)};
  for (int64_t j = 0; j < count; ++j) {
    const auto weight = Simd::broadcast(importance[j]);
    const Column x = Column::load(columns + j * kRows);
    for (int i = 0; i < kRowVectors; ++i) {
      const auto scale = grid.scale.v[i], below = grid.zero_point.v[i], above = top - below;
      const auto steps = round(x.v[i] * inverse.v[i]);
      const auto error = Simd::min(Simd::max(steps, zero - below), above) * scale - x.v[i];
      const auto mirrored = Simd::min(Simd::max(steps, zero - above), below) * scale - x.v[i];
      sum.grid.v[i] = Simd::fma(weight * error, error, sum.grid.v[i]);
      sum.mirrored.v[i] = Simd::fma(weight * mirrored, mirrored, sum.mirrored.v[i]);
    }
  }
  return sum;
}

// The best grid so far of each row, and its error.
struct Search {
  Grid best;
  Column least = Column::broadcast(__builtin_inff());

  void offer(const Grid& grid, const Column& error) {
    for (int i = 0; i < kRowVectors; ++i) {
      const auto better = Simd::less(error.v[i], least.v[i]);
      least.v[i] = Simd::select(better, error.v[i], least.v[i]);
      best.scale.v[i] = Simd::select(better, grid.scale.v[i], best.scale.v[i]);
      best.zero_point.v[i] = Simd::select(better, grid.zero_point.v[i], best.zero_point.v[i]);
    }
  }
};

inline Grid fit_either(const Column& low, const Column& high, const float* columns, int64_t count,
                       const float* importance, const WeightRounding& layer) {
  const Simd::Floats zero = Simd::broadcast(0.0f), one = Simd::broadcast(1.0f), top = Simd::broadcast(layer.largest);
  const float middle = middle_of(layer);
  const Column magnitude = Column::map([&](auto low, auto high) { return Simd::max(high, zero - low); }, low, high);
  const Column zero_point = Column::map(
      [&](auto low, auto high) {
        const auto half = Simd::broadcast(middle);
        return Simd::select(Simd::greater(high, zero - low), half - one, half);
      },
      low, high);
  const Column mirrored = Column::map([&](auto zero_point) { return top - zero_point; }, zero_point);
  Search search{{scale_of(magnitude, middle, layer.scale_dtype), zero_point}};
  for (int64_t f = 0; f < layer.fraction_count; ++f) {
    const Simd::Floats share = Simd::broadcast(layer.fractions[f]);
    const Column range = Column::map([&](auto magnitude) { return magnitude * share; }, magnitude);
    const Grid grid{scale_of(range, middle, layer.scale_dtype), zero_point};
    const EitherError error = search_either(columns, count, importance, grid, layer.largest);
    search.offer(grid, error.grid);
    search.offer({grid.scale, mirrored}, error.mirrored);
  }
  return search.best;
}

// The grid of one group, whose `count` columns start at `columns`.
inline Grid fit_group(const float* columns, int64_t count, const float* importance, const WeightRounding& layer) {
  Column low = Column::broadcast(0.0f), high = low;
  for (int64_t j = 0; j < count; ++j) {
    const Column x = Column::load(columns + j * kRows);
    low = Column::map([](auto a, auto b) { return Simd::min(a, b); }, low, x);
    high = Column::map([](auto a, auto b) { return Simd::max(a, b); }, high, x);
  }
  if (layer.zero_points == ZeroPoints::kEither) return fit_either(low, high, columns, count, importance, layer);
  if (layer.zero_points == ZeroPoints::kMiddle) {
    const Simd::Floats zero = Simd::broadcast(0.0f);
    high = Column::map([&](auto low, auto high) { return Simd::max(high, zero - low); }, low, high);
    low = Column::map([&](auto high) { return zero - high; }, high);
  }
  Search search{spanning(low, high, 1.0f, layer)};
  for (int64_t f = 0; f < layer.fraction_count; ++f) {
    const Grid grid = spanning(low, high, layer.fractions[f], layer);
    search.offer(grid, search_error(columns, count, importance, grid, layer.largest));
  }
  return search.best;
}

}  // namespace weight_rounding
}  // namespace
}  // namespace opt8bit
