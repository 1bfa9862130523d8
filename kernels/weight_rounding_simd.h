// The kernels of weight_rounding.h, for the lanes of one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "weight_rounding.h"
#include OPT8BIT_SIMD

namespace opt8bit {
namespace {
namespace weight_rounding {

constexpr int kRowVectors = Simd::kLanes == 16 ? 4 : 2;  // as many as have room in registers, four columns at a time
constexpr int kRows = kRowVectors * Simd::kLanes;
constexpr int64_t kColumnsAtOnce = 4;
constexpr int64_t kPiece = 32;  // columns that are brought up to date together

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

// targets[c] += sign * sum over k in [from, to) of matrix[c][k] * columns[k], for `count` columns from `target` on.
inline void add_products(float* target, int64_t count, const float* matrix, int64_t stride, const float* columns,
                         int64_t from, int64_t to, float sign) {
  int64_t c = 0;
  const auto run = [&](auto width) {
    constexpr int kWidth = decltype(width)::value;
    Column sums[kWidth];
    for (auto& sum : sums) sum = Column::broadcast(0.0f);
    for (int64_t k = from; k < to; ++k) {
      const Column column = Column::load(columns + k * kRows);
      for (int w = 0; w < kWidth; ++w) {
        const auto factor = Simd::broadcast(matrix[(c + w) * stride + k]);
        for (int i = 0; i < kRowVectors; ++i) sums[w].v[i] = Simd::fma(factor, column.v[i], sums[w].v[i]);
      }
    }
    for (int w = 0; w < kWidth; ++w) {
      float* place = target + (c + w) * kRows;
      const auto add = [&](auto sum, auto old) { return Simd::fma(Simd::broadcast(sign), sum, old); };
      Column::map(add, sums[w], Column::load(place)).store(place);
    }
    c += kWidth;
  };
  while (c + kColumnsAtOnce <= count) run(std::integral_constant<int, kColumnsAtOnce>());
  while (c < count) run(std::integral_constant<int, 1>());
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

// The scales of a batch of rows, one column a group.
class GroupGrids {
 public:
  GroupGrids(const WeightRounding& layer, int64_t first)
      : layer_(layer), first_(first), scale_(layer.groups * kRows), zero_point_(layer.groups * kRows) {}
  void load() {
    load_rows(layer_.scale, layer_.rows, layer_.groups, first_, scale_.data());
    load_rows(layer_.zero_point, layer_.rows, layer_.groups, first_, zero_point_.data());
    for (float& scale : scale_) scale = scale > 0 ? scale : 1;  // of rows beyond the last
  }
  void store() const {
    store_rows(scale_.data(), layer_.rows, layer_.groups, first_, layer_.scale);
    store_rows(zero_point_.data(), layer_.rows, layer_.groups, first_, layer_.zero_point);
  }
  void set(int64_t group, const Grid& grid) {
    grid.scale.store(&scale_[group * kRows]);
    grid.zero_point.store(&zero_point_[group * kRows]);
  }
  Grid of_column(int64_t j) const {
    const int64_t start = layer_.group_of[j] * kRows;
    return {Column::load(&scale_[start]), Column::load(&zero_point_[start])};
  }

 private:
  const WeightRounding& layer_;
  int64_t first_;
  std::vector<float> scale_, zero_point_;
};

// Where the group that starts at column j ends, if columns go group by group.
inline int64_t group_end(const WeightRounding& layer, int64_t j) {
  int64_t end = j;
  while (end < layer.columns && layer.group_of[end] == layer.group_of[j]) ++end;
  return end;
}

// Fits the grids of rows [first, first + kRows).
void fit_grids(const WeightRounding& layer, int64_t first) {
  std::vector<float> columns(layer.columns * kRows);
  load_rows(layer.weight, layer.rows, layer.columns, first, columns.data());
  GroupGrids grids(layer, first);
  for (int64_t start = 0, end; start < layer.columns; start = end) {
    end = group_end(layer, start);
    const float* importance = layer.importance + start;
    grids.set(layer.group_of[start], fit_group(&columns[start * kRows], end - start, importance, layer));
  }
  grids.store();
}

// GPTQ on rows [first, first + kRows): see ptq/methods/gptq.py. With `fits`, columns go group by group, and a group's
// grid is fitted when its first column is reached.
void gptq(const WeightRounding& layer, int64_t first, bool fits) {
  std::vector<float> columns(layer.columns * kRows), errors(layer.columns * kRows);
  load_rows(layer.weight, layer.rows, layer.columns, first, columns.data());
  GroupGrids grids(layer, first);
  if (!fits) grids.load();
  const auto take = [&](int64_t begin, int64_t end, int64_t from, int64_t to) {  // errors of [from, to)
    add_products(&columns[begin * kRows], end - begin, layer.matrix + begin * layer.columns, layer.columns,
                 errors.data(), from, to, -1.0f);
  };
  for (int64_t start = 0, end; start < layer.columns; start = end) {
    end = fits ? group_end(layer, start) : layer.columns;
    take(start, end, 0, start);
    if (fits)
      grids.set(layer.group_of[start],
                fit_group(&columns[start * kRows], end - start, layer.importance + start, layer));
    for (int64_t piece = start; piece < end; piece += kPiece) {
      const int64_t piece_end = std::min(piece + kPiece, end);
      take(piece, piece_end, start, piece);
      for (int64_t j = piece; j < piece_end; ++j) {
        take(j, j + 1, piece, j);
        const Column x = Column::load(&columns[j * kRows]);
        const Column value = nearest(x, grids.of_column(j), layer.largest);
        const Simd::Floats diagonal = Simd::broadcast(layer.matrix[j * layer.columns + j]);
        Column::map([&](auto x, auto value) { return (x - value) / diagonal; }, x, value).store(&errors[j * kRows]);
        value.store(&columns[j * kRows]);
      }
    }
  }
  if (fits) grids.store();
  store_rows(columns.data(), layer.rows, layer.columns, first, layer.rounded);
}

// One sweep of coordinate descent over a batch: `difference` is weight - rounded. Returns whether anything changed.
inline bool sweep(const WeightRounding& layer, const GroupGrids& grids, float* rounded, float* difference) {
  bool changed = false;
  std::vector<float> residual(kPiece * kRows);  // [(W - Ŵ) H] of a piece's columns
  for (int64_t start = 0, end; start < layer.columns; start = end) {
    end = std::min(start + kPiece, layer.columns);
    const float* rows = layer.matrix + start * layer.columns;
    std::fill(residual.begin(), residual.end(), 0.0f);
    add_products(residual.data(), end - start, rows, layer.columns, difference, 0, start, 1.0f);
    add_products(residual.data(), end - start, rows, layer.columns, difference, end, layer.columns, 1.0f);
    for (int64_t j = start; j < end; ++j) {
      const float* hessian = layer.matrix + j * layer.columns;
      if (!(hessian[j] > 0)) continue;  // no input reaches this column
      float* own = &residual[(j - start) * kRows];
      add_products(own, 1, hessian, layer.columns, difference, start, end, 1.0f);
      const Simd::Floats inverse = Simd::broadcast(1 / hessian[j]);
      const Column old = Column::load(rounded + j * kRows);
      const Column best =
          Column::map([&](auto old, auto own) { return Simd::fma(own, inverse, old); }, old, Column::load(own));
      const Column value = nearest(best, grids.of_column(j), layer.largest);
      for (int i = 0; i < kRowVectors; ++i)
        changed |= Simd::lanes(Simd::less(value.v[i], old.v[i])) || Simd::lanes(Simd::greater(value.v[i], old.v[i]));
      float* place = difference + j * kRows;
      Column::map([](auto d, auto old, auto value) { return d + (old - value); }, Column::load(place), old, value)
          .store(place);
      value.store(rounded + j * kRows);
    }
  }
  return changed;
}

// Coordinate descent on rows [first, first + kRows): see ptq/methods/quantease.py.
void coordinate_descent(const WeightRounding& layer, int64_t first, int64_t sweeps) {
  std::vector<float> rounded(layer.columns * kRows), difference(layer.columns * kRows);
  load_rows(layer.rounded, layer.rows, layer.columns, first, rounded.data());
  load_rows(layer.weight, layer.rows, layer.columns, first, difference.data());
  for (size_t i = 0; i < difference.size(); ++i) difference[i] -= rounded[i];
  GroupGrids grids(layer, first);
  grids.load();
  while (sweeps-- > 0 && sweep(layer, grids, rounded.data(), difference.data())) {
  }
  store_rows(rounded.data(), layer.rows, layer.columns, first, layer.rounded);
}

}  // namespace weight_rounding
}  // namespace
}  // namespace opt8bit
