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

// Objects of Python's that stand for tensors. A tensor in C++ is one pointer, and its object holds that pointer.
struct Objects {
  const char* const* at;
  int64_t pointer;  // bytes from an object to what it holds
  int64_t type;     // bytes from an object to the address of its type; -1 where it has none

  // What torch's functions take: the place of the pointer.
  const void* tensor(int64_t i) const { return at[i] + pointer; }
  int64_t type_of(int64_t i) const { return type < 0 ? 0 : *reinterpret_cast<const int64_t*>(at[i] + type); }
};

constexpr int64_t kDescribed = 5;  // type, dtype, device type, device index, dim; then sizes and strides

// Row i of `rows`, kDescribed + 2 * max_dim numbers, describes tensor i. Sizes and strides beyond its own are 0. All
// are -1 for a tensor that is not strided or has more than max_dim dimensions.
void describe(const TorchFunctions& torch, const Objects& objects, int64_t count, int64_t max_dim, int64_t* rows);

// Where the data of each tensor lie; false if some tensor is not as `rows` describe it. An object of another type than
// described may be no tensor: no more than its type is looked at.
bool addresses(const TorchFunctions& torch, const Objects& objects, int64_t count, int64_t max_dim, const int64_t* rows,
               int64_t* addresses, int threads);

}  // namespace opt8bit
