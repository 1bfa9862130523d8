#include "torch_tensors.h"

#include <algorithm>

#include "parallel.h"

namespace opt8bit {
namespace {

constexpr int64_t kTensorsPerUnit = 256;

bool describe_one(const TorchFunctions& torch, const void* tensor, int64_t max_dim, int64_t* row) {
  int32_t layout, dtype, device_type, device_index;
  int64_t dim, *sizes, *strides;
  void* data;
  if (torch.get_layout(tensor, &layout) || layout != torch.strided()) return false;
  if (torch.get_dim(tensor, &dim) || dim > max_dim) return false;
  if (torch.get_data_ptr(tensor, &data) || torch.get_dtype(tensor, &dtype)) return false;
  if (torch.get_device_type(tensor, &device_type) || torch.get_device_index(tensor, &device_index)) return false;
  if (torch.get_sizes(tensor, &sizes) || torch.get_strides(tensor, &strides)) return false;
  const int64_t described[kDescribed] = {reinterpret_cast<int64_t>(data), dtype, device_type, device_index, dim};
  row = std::copy_n(described, kDescribed, row);
  std::copy_n(sizes, dim, row);
  std::copy_n(strides, dim, row + max_dim);
  return true;
}

}  // namespace

void describe(const TorchFunctions& torch, const void* const* tensors, int64_t count, int64_t max_dim, int64_t* rows,
              int threads) {
  const int64_t width = kDescribed + 2 * max_dim;
  parallel((count + kTensorsPerUnit - 1) / kTensorsPerUnit, threads, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(count, end * kTensorsPerUnit);
    for (int64_t i = begin * kTensorsPerUnit; i < last; ++i) {
      int64_t* const row = rows + i * width;
      std::fill_n(row, width, 0);
      // A tensor in C++ is one pointer, so the place of that pointer is the handle that torch's functions take.
      if (!describe_one(torch, tensors + i, max_dim, row)) std::fill_n(row, width, -1);
    }
  });
}

}  // namespace opt8bit
