// The loops of an AdamW step on float32 parameters with 8-bit states, marked for llvm-mca: see arm_cycles.py.
#define OPT8BIT_SIMD "simd/neon.h"
#include "optimizer_step_simd.h"

namespace opt8bit {

// Decoding both moments, the rule, and the stores into the buffers that are encoded: 8 elements.
void update_loop(const Tensor& tensor, const Group& group, int64_t n, float* memory) {
  const AdamW rule(hyper_of<AdamW>(group), *tensor.step + 1.0, nullptr);
  Param<float, Rounding::nearest> param(tensor, group);
  Grad<float> grad(tensor, group);
  CodedState<true> exp_avg(tensor, 0, memory);
  CodedState<false> exp_avg_sq(tensor, 1, memory + kBufferStride);
  const auto open = [&](auto&... states) { (states.open_run(0, 0, n), ...), (states.open(0, 0, n), ...); };
  open(exp_avg, exp_avg_sq);
  param.open(0);
  grad.open(0, n);
  for (int64_t i = 0; i < n; i += Simd::kLanes) {
    asm volatile("# LLVM-MCA-BEGIN update 8");
    __builtin_prefetch(param.ahead(i), 1);
    __builtin_prefetch(grad.ahead(i), 0);
    Simd::Floats p = param.load(i), next_exp_avg, next_exp_avg_sq;
    rule.update(p, grad.load(i), exp_avg.load(i), exp_avg_sq.load(i), next_exp_avg, next_exp_avg_sq);
    param.store(i, p);
    exp_avg.store(i, next_exp_avg);
    exp_avg_sq.store(i, next_exp_avg_sq);
    asm volatile("# LLVM-MCA-END update 8");
  }
  const auto close = [&](auto&... states) { (states.find_largest(), ...), (states.close(0, n), ...); };
  close(exp_avg, exp_avg_sq);
}

// A chunk of 32 elements, as encode_blocks encodes them.
bool encode_signed_loop(const float* values, int64_t n, float scale, uint8_t* codes) {
  const Simd::Lines<true> lines(*dynamic_map(true).dynamic);
  const Simd::Floats reciprocal = reciprocal_of(scale);
  bool is_uncertain = false;
  for (int64_t i = 0; i < n; i += kChunk) {
    asm volatile("# LLVM-MCA-BEGIN encode_signed 32");
    bool has_zero;
    const Chunk chunk = find_lines<true>(values + i, reciprocal, lines);
    is_uncertain |= encode_chunk<true>(values + i, chunk, lines, scale < 0, codes + i, has_zero);
    asm volatile("# LLVM-MCA-END encode_signed 32");
  }
  return is_uncertain;
}

bool encode_unsigned_loop(const float* values, int64_t n, float scale, uint8_t* codes) {
  const Simd::Lines<false> lines(*dynamic_map(false).dynamic);
  const Simd::Floats reciprocal = reciprocal_of(scale);
  bool is_uncertain = false;
  for (int64_t i = 0; i < n; i += kChunk) {
    asm volatile("# LLVM-MCA-BEGIN encode_unsigned 32");
    bool has_zero = false;
    const Chunk chunk = find_lines<false>(values + i, reciprocal, lines);
    is_uncertain |= encode_chunk<false>(values + i, chunk, lines, false, codes + i, has_zero);
    is_uncertain |= has_zero;
    asm volatile("# LLVM-MCA-END encode_unsigned 32");
  }
  return is_uncertain;
}

}  // namespace opt8bit
