// How the update loop reads and writes what is not the parameter: states, which are coded in runs of blocks, and
// gradients. Included after one of simd/*.h.
#pragma once

#include <type_traits>

#include "blockwise.h"
#include "optimizer_step.h"
#include "rules/rule.h"
#include "simd/first_lanes.h"

namespace opt8bit {
namespace {

// Blocks that are updated one after another before any is encoded: short blocks by the dozen, so that the time from
// a block's last element to its first code is spent on others. Runs of float32 are shorter: their steps wait for the
// memory, which idles while a run is encoded.
template <class T>
constexpr int64_t kRunElements = sizeof(T) == sizeof(float) ? 512 : 2048;
constexpr int64_t kMaxRun = 16;
constexpr int64_t run_length(int64_t block_length, int64_t elements) {
  const int64_t blocks = elements / (block_length < 1 ? 1 : block_length);
  return blocks < 1 ? 1 : blocks > kMaxRun ? kMaxRun : blocks;
}

// How the update loop reads and writes a state that is stored as codes: vectors of float32 come out of the codes and
// go into a buffer, which is encoded when the blocks' new scales are known.
template <bool kSigned>
class CodedState {
 public:
  CodedState(const Tensor& tensor, int s, float* memory)
      : tensor_codes_(static_cast<uint8_t*>(tensor.states[s])),
        tensor_scales_(tensor.scales[s]),
        decode_(dynamic_map(kSigned)),
        memory_(memory) {}

  void open_run(int64_t block, int64_t offset, int64_t block_length) {
    run_codes_ = tensor_codes_ + offset;
    run_scales_ = tensor_scales_ + block;
    stride_ = (block_length + kChunk - 1) / kChunk * kChunk;
  }
  void open(int64_t slot, int64_t offset, int64_t n) {
    constexpr int64_t kLine = 64;
    codes_ = tensor_codes_ + offset;
    for (int64_t i = 0; i < n; i += kLine) __builtin_prefetch(codes_ + i + kAhead / 4, 1);
    buffer_ = memory_ + slot * stride_;
    scale_ = Simd::broadcast(run_scales_[slot]);
    highest_ = lowest_ = Simd::broadcast(0.0f);
  }
  void prefetch(int64_t) const {}  // a block at a time, as a vector takes a part of a line only
  Scaled load(int64_t i) const { return {decode_(Simd::load(codes_ + i)), scale_}; }
  Scaled load_tail(int64_t i, int64_t n) const { return {decode_(load_first(codes_ + i, n - i)), scale_}; }
  void store(int64_t i, Simd::Floats x) {
    Simd::store(buffer_ + i, x);
    highest_ = Simd::max_of_results(x, highest_);
    if (kSigned) lowest_ = Simd::min_of_results(x, lowest_);
  }
  void store_tail(int64_t i, int64_t n, Simd::Floats x) { store(i, keep_first(x, n - i)); }
  void find_largest() {  // of the block, without its sign
    largest_ = Simd::horizontal_max(kSigned ? Simd::max(highest_, Simd::broadcast(0.0f) - lowest_) : highest_);
  }
  bool has_infinite() const { return largest_ > __FLT_MAX__; }
  bool is_infinite(int64_t i) const { return __builtin_isinf(buffer_[i]); }
  void clear(int64_t i) {
    buffer_[i] = 0;
    largest_ = __builtin_inff();  // to be found again
  }
  // The block's new scale is its largest element. Of a and -a it is the first one, whatever the lanes.
  void close(int64_t slot, int64_t n) {
    float scale = finite_absmax(largest_, buffer_, n);
    if (kSigned) {
      const Simd::Floats magnitude = Simd::broadcast(scale);
      const bool has_positive = Simd::lanes(Simd::equal(highest_, magnitude)) != 0;
      const bool has_negative = Simd::lanes(Simd::equal(Simd::broadcast(0.0f) - lowest_, magnitude)) != 0;
      if (__builtin_expect(has_positive == has_negative, 0)) scale = first_of_magnitude(scale, buffer_, n);
      else scale = float_from_bits(bits_from_float(scale) ^ uint32_t{has_negative} << 31);  // a branch would be a guess
    }
    run_scales_[slot] = scale;
  }
  void close_run(const int64_t* lengths, int64_t count) {
    // Steps divide by the root of a state without signs: beside a first moment that is not zero, a second one that had
    // become zero would leave them eps alone to divide by.
    encode_blocks<kSigned, !kSigned>(memory_, stride_, lengths, run_scales_, count, run_codes_);
  }

 private:
  uint8_t* const tensor_codes_;
  float* const tensor_scales_;
  const Simd::Decoder<kSigned> decode_;
  float* const memory_;
  uint8_t* run_codes_;
  float* run_scales_;
  int64_t stride_;
  uint8_t* codes_;
  float* buffer_;
  Simd::Floats scale_, highest_, lowest_;
  float largest_;
};

// The same for a state of float32 values, updated where they are.
class PlainState {
 public:
  PlainState(const Tensor& tensor, int s, float*) : tensor_values_(static_cast<float*>(tensor.states[s])) {}

  void open_run(int64_t, int64_t, int64_t) {}
  void open(int64_t, int64_t offset, int64_t) { values_ = tensor_values_ + offset; }
  void prefetch(int64_t i) const { __builtin_prefetch(reinterpret_cast<const char*>(values_ + i) + kAhead, 1); }
  Scaled load(int64_t i) const { return {Simd::load(values_ + i), Simd::broadcast(1.0f)}; }
  Scaled load_tail(int64_t i, int64_t n) const { return {load_first(values_ + i, n - i), Simd::broadcast(1.0f)}; }
  void store(int64_t i, Simd::Floats x) { Simd::store(values_ + i, x); }
  void store_tail(int64_t i, int64_t n, Simd::Floats x) { store_first(values_ + i, n - i, x); }
  void find_largest() {}
  bool has_infinite() const { return false; }
  bool is_infinite(int64_t) const { return false; }
  void clear(int64_t) {}
  void close(int64_t, int64_t) {}
  void close_run(const int64_t*, int64_t) {}

 private:
  float* const tensor_values_;
  float* values_;
};

// Gradients of parameters of type T, made as large as they are meant to be. Those of another dtype, and those that are
// scaled, are made ready in float32, block by block.
template <class T>
class Grad {
 public:
  Grad(const Tensor& tensor, const Group& group)
      : tensor_(tensor.grad),
        dtype_(tensor.grad_dtype),
        ahead_(kAhead + tensor.grad_away),
        scale_(static_cast<float>(1 / group.grad_scale)) {
    if (dtype_ != tensor.dtype || group.grad_scale != 1) ready_ = thread_buffer() + kMaxStates * kBufferStride;
  }

  void open(int64_t offset, int64_t n) {
    values_ = static_cast<const T*>(tensor_) + offset;
    if (!ready_) return;
    switch (dtype_) {
      case DType::float32: make_ready(static_cast<const float*>(tensor_) + offset, n); break;
      case DType::float16: make_ready(static_cast<const float16*>(tensor_) + offset, n); break;
      case DType::bfloat16: make_ready(static_cast<const bfloat16*>(tensor_) + offset, n); break;
    }
    if constexpr (std::is_same_v<T, float>) values_ = ready_;
  }
  Simd::Floats load(int64_t i) const { return is_elsewhere() ? Simd::load(ready_ + i) : Simd::load(values_ + i); }
  Simd::Floats load_tail(int64_t i, int64_t n) const {
    return is_elsewhere() ? load_first(ready_ + i, n - i) : load_first(values_ + i, n - i);
  }
  const char* ahead(int64_t i) const { return reinterpret_cast<const char*>(values_ + i) + ahead_; }

 private:
  bool is_elsewhere() const { return !std::is_same_v<T, float> && ready_; }

  template <class G>
  OPT8BIT_NOINLINE void make_ready(const G* grad, int64_t n) {
    const Simd::Floats scale = Simd::broadcast(scale_);
    int64_t i = 0;
    for (; i + Simd::kLanes <= n; i += Simd::kLanes) Simd::store(ready_ + i, Simd::load(grad + i) * scale);
    if (i < n) Simd::store(ready_ + i, load_first(grad + i, n - i) * scale);
  }

  const void* const tensor_;
  const DType dtype_;
  const T* values_;
  const int64_t ahead_;
  const float scale_;
  float* ready_ = nullptr;  // of the block
};

template <bool kCoded, bool kSigned>
struct StateType {
  using type = PlainState;
};
template <bool kSigned>
struct StateType<true, kSigned> {
  using type = CodedState<kSigned>;
};

}  // namespace
}  // namespace opt8bit
