#include "torch_tensors.h"

#include <algorithm>
#include <atomic>
#include <vector>

#include "parallel.h"

namespace opt8bit {
namespace {

constexpr int64_t kTensorsPerUnit = 1024;  // fewer are not worth waking a thread for

bool read(const TorchFunctions& torch, const void* tensor, int64_t max_dim, int64_t* row) {
  int32_t layout, dtype, device_type, device_index;
  int64_t dim, *sizes, *strides;
  if (torch.get_layout(tensor, &layout) || layout != torch.strided()) return false;
  if (torch.get_dim(tensor, &dim) || dim > max_dim || torch.get_dtype(tensor, &dtype)) return false;
  if (torch.get_device_type(tensor, &device_type) || torch.get_device_index(tensor, &device_index)) return false;
  if (torch.get_sizes(tensor, &sizes) || torch.get_strides(tensor, &strides)) return false;
  const int64_t described[kDescribed] = {dtype, device_type, device_index, dim};
  row = std::copy_n(described, kDescribed, row);
  std::copy_n(sizes, dim, row);
  std::copy_n(strides, dim, row + max_dim);
  return true;
}

// A tensor in C++ is one pointer, so the place of that pointer is the handle that torch's functions take.
void describe_one(const TorchFunctions& torch, const void* tensor, int64_t max_dim, int64_t* row) {
  const int64_t width = kDescribed + 2 * max_dim;
  std::fill_n(row, width, 0);
  if (!read(torch, tensor, max_dim, row)) std::fill_n(row, width, -1);
}

}  // namespace

void describe(const TorchFunctions& torch, const void* const* tensors, int64_t count, int64_t max_dim, int64_t* rows) {
  for (int64_t i = 0; i < count; ++i) describe_one(torch, tensors + i, max_dim, rows + i * (kDescribed + 2 * max_dim));
}

bool addresses(const TorchFunctions& torch, const void* const* tensors, int64_t count, int64_t max_dim,
               const int64_t* rows, int64_t* addresses, int threads) {
  const int64_t width = kDescribed + 2 * max_dim;
  std::atomic<bool> is_alike{true};
  parallel((count + kTensorsPerUnit - 1) / kTensorsPerUnit, threads, [&](int64_t begin, int64_t end) {
    std::vector<int64_t> row(width);
    const int64_t last = std::min(count, end * kTensorsPerUnit);
    for (int64_t i = begin * kTensorsPerUnit; i < last; ++i) {
      describe_one(torch, tensors + i, max_dim, row.data());
      void* data = nullptr;
      if (!std::equal(row.begin(), row.end(), rows + i * width) || row[0] < 0 || torch.get_data_ptr(tensors + i, &data))
        is_alike = false;
      addresses[i] = reinterpret_cast<int64_t>(data);
    }
  });
  return is_alike;
}

}  // namespace opt8bit
