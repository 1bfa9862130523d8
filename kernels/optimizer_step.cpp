#include "optimizer_step.h"

#include <memory>

namespace opt8bit {

BlockView block_view(const Tensor& tensor, const Group& group) {
  constexpr int64_t kFlatBlock = 1024;
  if (tensor.state_bits == 8) return BlockView(tensor.rows, tensor.row_length, group.block_size);
  return BlockView(1, tensor.rows * tensor.row_length, kFlatBlock);
}

bool needs_norms(RuleId rule) { return rule == RuleId::lamb || rule == RuleId::lars || rule == RuleId::lars_momentum; }

float* thread_buffer() {
  struct alignas(64) Buffer {
    float floats[kMaxStates * kBufferStride];
  };
  static thread_local const std::unique_ptr<Buffer> buffer(new Buffer());
  return buffer->floats;
}

}  // namespace opt8bit
