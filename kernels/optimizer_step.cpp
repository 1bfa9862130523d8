#include "optimizer_step.h"

#include <memory>
#include <vector>

namespace opt8bit {

BlockView block_view(const Tensor& tensor, const Group& group) {
  constexpr int64_t kFlatBlock = 1024;
  if (tensor.state_bits == 8) return BlockView(tensor.rows, tensor.row_length, group.block_size);
  if (tensor.positions) return BlockView(tensor.rows, tensor.row_length, kFlatBlock);
  return BlockView(1, tensor.rows * tensor.row_length, kFlatBlock);
}

float* thread_buffer() {
  struct alignas(64) Buffer {
    float floats[(kMaxStates + 1) * kBufferStride];
  };
  static thread_local const std::unique_ptr<Buffer> buffer(new Buffer());
  return buffer->floats;
}

void* row_buffer(int64_t bytes) {
  static thread_local std::vector<char> buffer;
  if (static_cast<int64_t>(buffer.size()) < bytes) buffer.resize(bytes);
  return buffer.data();
}

}  // namespace opt8bit
