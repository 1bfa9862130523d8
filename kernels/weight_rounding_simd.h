// The kernels of weight_rounding.h, for the lanes of one instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>
#include <vector>

#include "weight_grid_simd.h"

namespace opt8bit {
namespace {
namespace weight_rounding {

constexpr int64_t kColumnsAtOnce = 4;
constexpr int64_t kPiece = 32;  // columns that are brought up to date together

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

// GPTQ on rows [first, first + kRows): see ptq/rounding/error_feedback.py. With `fits`, columns go group by group, and
// a group's grid is fitted when its first column is reached.
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

// Coordinate descent on rows [first, first + kRows): see ptq/rounding/coordinate_descent.py.
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
