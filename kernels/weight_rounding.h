// Rounding of weights to evenly spaced grids: what opt8bit/quant/grid.py, ptq/rounding/error_feedback.py and
// quantease.py do column by column, for a batch of rows at a time. Rows do not depend on each other, so that one batch
// stays in the cache from its first column to its last; a column of the batch is kRows neighbours in memory.
#pragma once

#include <cstdint>

#include "half.h"

namespace opt8bit {

// How the kernels that fit grids come by zero points: fitted; in the middle of the codes; or there or one below, in
// each group what errs less, so that the weight of largest magnitude can be a value of the grid.
enum class ZeroPoints : int64_t { kFitted, kMiddle, kEither };

// One weight (rows, columns), in float32 and row-major as everything here.
struct WeightRounding {
  const float* weight;
  int64_t rows, columns;
  const int64_t* group_of;  // (columns), below `groups`
  int64_t groups;
  float* scale;       // (rows, groups): read, or written where a kernel fits
  float* zero_point;  // likewise
  float largest;      // code
  ZeroPoints zero_points;
  DType scale_dtype;       // that fitted scales are rounded to
  const float* fractions;  // of the range to try; none to span it
  int64_t fraction_count;
  const float* importance;  // (columns), of errors in the search
  const float* matrix;      // (columns, columns): the factor's transpose for gptq, the hessian for coordinate_descent
  float* rounded;           // (rows, columns): the result; for coordinate_descent the start, too
};

}  // namespace opt8bit
