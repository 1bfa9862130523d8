#include "torch_tensors.h"

#include <algorithm>
#include <atomic>

#include "parallel.h"

namespace opt8bit {
namespace {

constexpr int64_t kTensorsPerUnit = 1024;  // fewer are not worth waking a thread for
constexpr int64_t kAtOnce = 16;            // tensors whose memory is asked for together
constexpr int kTensorLines = 3;            // of 64 bytes, that hold what a tensor in C++ says of itself
constexpr int kObjectLines = 1;            // that hold an object's type and the pointer to its tensor

// How a tensor lies. Sizes and strides are where torch keeps them.
struct Layout {
  int64_t numbers[kDescribed];
  int64_t *sizes, *strides;
};

// False for a tensor that is not strided or has more than max_dim dimensions.
bool read(const TorchFunctions& torch, const void* tensor, int64_t type, int64_t max_dim, Layout* result) {
  int32_t layout, dtype, device_type, device_index;
  int64_t dim;
  if (torch.get_layout(tensor, &layout) || layout != torch.strided()) return false;
  if (torch.get_dim(tensor, &dim) || dim > max_dim || torch.get_dtype(tensor, &dtype)) return false;
  if (torch.get_device_type(tensor, &device_type) || torch.get_device_index(tensor, &device_index)) return false;
  if (torch.get_sizes(tensor, &result->sizes) || torch.get_strides(tensor, &result->strides)) return false;
  result->numbers[0] = type;
  result->numbers[1] = dtype;
  result->numbers[2] = device_type;
  result->numbers[3] = device_index;
  result->numbers[4] = dim;
  return true;
}

bool is_as_described(const TorchFunctions& torch, const Objects& objects, int64_t i, int64_t max_dim,
                     const int64_t* row) {
  Layout found;
  const int64_t type = objects.type_of(i);
  if (type != row[0] || !read(torch, objects.tensor(i), type, max_dim, &found)) return false;
  if (!std::equal(row, row + kDescribed, found.numbers)) return false;
  const int64_t dim = found.numbers[kDescribed - 1];
  row += kDescribed;
  return std::equal(row, row + dim, found.sizes) && std::equal(row + max_dim, row + max_dim + dim, found.strides);
}

void prefetch(const void* memory, int lines) {
  for (int line = 0; line < lines; ++line) __builtin_prefetch(static_cast<const char*>(memory) + line * 64);
}

}  // namespace

void describe(const TorchFunctions& torch, const Objects& objects, int64_t count, int64_t max_dim, int64_t* rows) {
  const int64_t width = kDescribed + 2 * max_dim;
  for (int64_t i = 0; i < count; ++i) {
    int64_t* row = rows + i * width;
    Layout found;
    if (!read(torch, objects.tensor(i), objects.type_of(i), max_dim, &found)) {
      std::fill_n(row, width, -1);
      continue;
    }
    std::fill_n(row, width, 0);
    row = std::copy_n(found.numbers, kDescribed, row);
    const int64_t dim = found.numbers[kDescribed - 1];
    std::copy_n(found.sizes, dim, row);
    std::copy_n(found.strides, dim, row + max_dim);
  }
}

bool addresses(const TorchFunctions& torch, const Objects& objects, int64_t count, int64_t max_dim, const int64_t* rows,
               int64_t* addresses, int threads) {
  const int64_t width = kDescribed + 2 * max_dim;
  std::atomic<bool> is_alike{true};
  parallel((count + kTensorsPerUnit - 1) / kTensorsPerUnit, threads, [&](int64_t begin, int64_t end) {
    const int64_t last = std::min(count, end * kTensorsPerUnit);
    for (int64_t first = begin * kTensorsPerUnit; first < last; first += kAtOnce) {
      const int64_t next = std::min(last, first + kAtOnce);
      const int64_t after = std::min(last, next + kAtOnce);
      for (int64_t i = after; i < std::min(last, after + kAtOnce); ++i) prefetch(objects.at[i], kObjectLines);
      for (int64_t i = next; i < after; ++i) {
        const bool is_tensor = objects.type_of(i) == rows[i * width];
        if (is_tensor) prefetch(*static_cast<const void* const*>(objects.tensor(i)), kTensorLines);
      }
      for (int64_t i = first; i < next; ++i) {
        if (!is_as_described(torch, objects, i, max_dim, rows + i * width)) is_alike = false;
      }
      if (!is_alike) return;
      // On their own, as each waits for memory: the processor then waits for several at once.
      for (int64_t i = first; i < next; ++i) {
        void* data = nullptr;
        if (torch.get_data_ptr(objects.tensor(i), &data)) is_alike = false;
        addresses[i] = reinterpret_cast<int64_t>(data);
      }
    }
  });
  return is_alike;
}

}  // namespace opt8bit
