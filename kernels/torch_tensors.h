// Where torch's tensors lie and how, read of thousands at once: their objects are spread over the memory, and fetching
// them one after another through Python takes longer than a step of small parameters does.
#pragma once

#include <cstdint>

namespace opt8bit {

// Functions of torch's stable C interface (torch/csrc/inductor/aoti_torch/c/shim.h), handed over by their addresses.
// Each reads one property of a tensor and returns 0, or an error.
struct TorchFunctions {
  int32_t (*get_layout)(const void* tensor, int32_t* layout);
  int32_t (*get_data_ptr)(const void* tensor, void** data);
  int32_t (*get_dtype)(const void* tensor, int32_t* dtype);
  int32_t (*get_device_type)(const void* tensor, int32_t* type);
  int32_t (*get_device_index)(const void* tensor, int32_t* index);
  int32_t (*get_dim)(const void* tensor, int64_t* dim);
  int32_t (*get_sizes)(const void* tensor, int64_t** sizes);
  int32_t (*get_strides)(const void* tensor, int64_t** strides);
  int32_t (*strided)();  // the layout of dense tensors
};

constexpr int64_t kDescribed = 4;  // dtype, device type, device index, dim; then sizes and strides

// Row i of `rows`, kDescribed + 2 * max_dim numbers, describes the tensor whose only pointer is tensors[i]. Sizes and
// strides beyond its own are 0. All are -1 for a tensor that is not strided or has more than max_dim dimensions.
void describe(const TorchFunctions& torch, const void* const* tensors, int64_t count, int64_t max_dim, int64_t* rows);

// Where the data of each tensor lie; false if some tensor is not as `rows` describe it.
bool addresses(const TorchFunctions& torch, const void* const* tensors, int64_t count, int64_t max_dim,
               const int64_t* rows, int64_t* addresses, int threads);

}  // namespace opt8bit
