// The kernels of optimizer_step.h, for the lanes of one instruction set: one skeleton for the rules of update_rules.h.
#pragma once

#include OPT8BIT_SIMD

#include <utility>

#include "blockwise.h"
#include "optimizer_step.h"
#include "rounding.h"
#include "transpose.h"
#include "update_rules.h"

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
    highest_ = Simd::max(x, highest_);
    if (kSigned) lowest_ = Simd::min(x, lowest_);
  }
  void store_tail(int64_t i, int64_t n, Simd::Floats x) { store(i, keep_first(x, n - i)); }
  bool is_infinite() {
    largest_ = Simd::horizontal_max(kSigned ? Simd::max(highest_, Simd::broadcast(0.0f) - lowest_) : highest_);
    return largest_ > __FLT_MAX__;
  }
  bool is_infinite(int64_t i) const { return __builtin_isinf(buffer_[i]); }
  void clear(int64_t i) {
    buffer_[i] = 0;
    largest_ = __builtin_inff();  // to be found again
  }
  // The scale is the largest element. Of a and -a it is the first one, whatever the lanes.
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
  bool is_infinite() const { return false; }
  bool is_infinite(int64_t) const { return false; }
  void clear(int64_t) {}
  void close(int64_t, int64_t) {}
  void close_run(const int64_t*, int64_t) {}

 private:
  float* const tensor_values_;
  float* values_;
};

// Gradients, made as large as they are meant to be.
template <class T>
class Grad {
 public:
  Grad(const Tensor& tensor, const Group& group)
      : tensor_(static_cast<const T*>(tensor.grad)),
        ahead_(kAhead + tensor.grad_away),
        scale_(Simd::broadcast(static_cast<float>(1 / group.grad_scale))),
        is_scaled_(group.grad_scale != 1) {}

  void open(int64_t offset) { values_ = tensor_ + offset; }
  Simd::Floats load(int64_t i) const { return scaled(Simd::load(values_ + i)); }
  Simd::Floats load_tail(int64_t i, int64_t n) const { return scaled(load_first(values_ + i, n - i)); }
  const char* ahead(int64_t i) const { return reinterpret_cast<const char*>(values_ + i) + ahead_; }

 private:
  Simd::Floats scaled(Simd::Floats x) const { return is_scaled_ ? x * scale_ : x; }

  const T* const tensor_;
  const T* values_;
  const int64_t ahead_;
  const Simd::Floats scale_;
  const bool is_scaled_;
};

// One pass over a block: p, g and the states in, p and the states out.
template <class Rule, class Param, class Grad, size_t... s, class... States>
OPT8BIT_INLINE void update_block(const Rule& rule, Param& param, const Grad& grad, int64_t n, std::index_sequence<s...>,
                                 States&... states) {
  Simd::Floats x[sizeof...(s) + 1];
  int64_t i = 0;
  for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
    __builtin_prefetch(param.ahead(i), 1);
    __builtin_prefetch(grad.ahead(i), 0);
    (states.prefetch(i), ...);
    Simd::Floats p = param.load(i);
    rule.update(p, grad.load(i), states.load(i)..., x[s]...);
    param.store(i, p);
    (states.store(i, x[s]), ...);
  }
  if (i < n) {
    Simd::Floats p = param.load_tail(i, n);
    rule.update(p, grad.load_tail(i, n), states.load_tail(i, n)..., x[s]...);
    param.store_tail(i, n, p);
    (states.store_tail(i, n, x[s]), ...);
  }
}

// An element of which a coded state is infinite begins anew, with zeros: an infinity, as the largest of its block,
// would weigh on the others from then on, and a second moment of zero beside a first that is not would make a step
// enormous.
template <class... States>
void forget_infinite(int64_t n, States&... states) {
  for (int64_t i = 0; i < n; ++i)
    if ((states.is_infinite(i) || ...)) (states.clear(i), ...);
}

template <class Rule, class Param, class T, size_t... s, class... States>
void update_blocks(const Rule rule, Param param, Grad<T> grad, const BlockView& view, int64_t first_block,
                   int64_t last_block, std::index_sequence<s...> indices, States... states) {
  const int64_t block_length = view.row_length < view.block_size ? view.row_length : view.block_size;
  const int64_t run = run_length(block_length, kRunElements<T>);
  int64_t lengths[kMaxRun], slot = 0;
  view.for_each(first_block, last_block, [&](int64_t block, int64_t offset, int64_t n) {
    if (slot == 0) (states.open_run(block, offset, block_length), ...);
    param.open(offset);
    grad.open(offset);
    (states.open(slot, offset, n), ...);
    update_block(rule, param, grad, n, indices, states...);
    if (__builtin_expect((states.is_infinite() | ... | false), 0)) forget_infinite(n, states...);
    (states.close(slot, n), ...);
    lengths[slot++] = n;
    if (slot == run || block + 1 == last_block) {
      (states.close_run(lengths, slot), ...);
      slot = 0;
    }
  });
}

// Adds to `squares` what a rule measures. The squares of elements whose index in their block is the same modulo 16
// are added up first, so that the order is the same for every number of lanes.
template <class Rule, class Param, class Grad, class... States>
void measure_blocks(const Rule rule, Param param, Grad grad, const BlockView& view, double* squares,
                    int64_t first_block, int64_t last_block, States... states) {
  constexpr int64_t kSums = 16;
  double sums[kNorms][kSums] = {};
  Simd::Floats x[kNorms];
  view.for_each(first_block, last_block, [&]([[maybe_unused]] int64_t block, int64_t offset, int64_t n) {
    (states.open_run(block, offset, n), ...);
    param.open(offset);
    grad.open(offset);
    (states.open(0, offset, n), ...);
    int64_t i = 0;
    for (; i + Simd::kLanes <= n; i += Simd::kLanes) {
      rule.measure(param.load(i), grad.load(i), states.load(i)..., x);
      for (int k = 0; k < kNorms; ++k) Simd::add_squares(sums[k] + i % kSums, x[k]);
    }
    if (i < n) {
      rule.measure(param.load_tail(i, n), grad.load_tail(i, n), states.load_tail(i, n)..., x);
      for (int k = 0; k < kNorms; ++k) Simd::add_squares(sums[k] + i % kSums, keep_first(x[k], n - i));
    }
  });
  for (int k = 0; k < kNorms; ++k) {
    squares[k] = 0;
    for (double sum : sums[k]) squares[k] += sum;
  }
}

template <bool kCoded, bool kSigned>
struct StateType {
  using type = PlainState;
};
template <bool kSigned>
struct StateType<true, kSigned> {
  using type = CodedState<kSigned>;
};

// The skeleton of every step: a rule, a type of parameter, and how each state of the rule is stored.
template <class Rule, class T, Rounding rounding, bool kCoded, size_t... s>
void step_blocks(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block, int64_t last_block,
                 std::index_sequence<s...> indices) {
  float* const memory = thread_buffer();
  update_blocks(Rule(group.hyper, *tensor.step + 1.0, norms), Param<T, rounding>(tensor, group), Grad<T>(tensor, group),
                block_view(tensor, group), first_block, last_block, indices,
                typename StateType<kCoded, Rule::kSigned[s]>::type(tensor, s, memory + s * kBufferStride)...);
}

struct Step {
  const double* norms;
  template <class Rule, class T, Rounding rounding, bool kCoded>
  void run(const Tensor& tensor, const Group& group, int64_t first_block, int64_t last_block) const {
    step_blocks<Rule, T, rounding, kCoded>(tensor, group, norms, first_block, last_block,
                                           std::make_index_sequence<Rule::kStates>());
  }
};

template <class Rule, class T, Rounding rounding, bool kCoded, size_t... s>
void measure_blocks(const Tensor& tensor, const Group& group, double* squares, int64_t first_block, int64_t last_block,
                    std::index_sequence<s...>) {
  measure_blocks(Rule(group.hyper, *tensor.step + 1.0, nullptr), Param<T, rounding>(tensor, group),
                 Grad<T>(tensor, group), block_view(tensor, group), squares, first_block, last_block,
                 typename StateType<kCoded, Rule::kSigned[s]>::type(tensor, s, nullptr)...);
}

struct Measure {
  double* squares;
  template <class Rule, class T, Rounding rounding, bool kCoded>
  void run(const Tensor& tensor, const Group& group, int64_t first_block, int64_t last_block) const {
    if constexpr (Rule::kHasNorms)
      measure_blocks<Rule, T, rounding, kCoded>(tensor, group, squares, first_block, last_block,
                                                std::make_index_sequence<Rule::kStates>());
  }
};

template <class Rule, class T, Rounding rounding, class Work>
void with_states(const Work& work, const Tensor& tensor, const Group& group, int64_t first_block, int64_t last_block) {
  if (tensor.state_bits == 8) work.template run<Rule, T, rounding, true>(tensor, group, first_block, last_block);
  else work.template run<Rule, T, rounding, false>(tensor, group, first_block, last_block);
}

template <class Rule, class Work>
void with_rule(const Work& work, const Tensor& tensor, const Group& group, int64_t first, int64_t last) {
  constexpr Rounding kNearest = Rounding::nearest;
  switch (tensor.dtype) {
    case DType::float32: return with_states<Rule, float, kNearest>(work, tensor, group, first, last);
    case DType::float16: return with_states<Rule, float16, kNearest>(work, tensor, group, first, last);
    case DType::bfloat16: break;
  }
  switch (group.rounding) {
    case kNearest: return with_states<Rule, bfloat16, kNearest>(work, tensor, group, first, last);
    case Rounding::stochastic:
      return with_states<Rule, bfloat16, Rounding::stochastic>(work, tensor, group, first, last);
    case Rounding::compensated:
      return with_states<Rule, bfloat16, Rounding::compensated>(work, tensor, group, first, last);
  }
}

// In the order of RuleId.
template <class Work>
constexpr void (*kWithRule[])(const Work&, const Tensor&, const Group&, int64_t, int64_t) = {
    with_rule<Adam, Work>,
    with_rule<AdamAmsgrad, Work>,
    with_rule<AdamW, Work>,
    with_rule<AdamWAmsgrad, Work>,
    with_rule<Sgd, Work>,
    with_rule<SgdMomentum, Work>,
    with_rule<RmsProp<false, false>, Work>,
    with_rule<RmsProp<false, true>, Work>,
    with_rule<RmsProp<true, false>, Work>,
    with_rule<RmsProp<true, true>, Work>,
    with_rule<Adagrad, Work>,
    with_rule<Lion, Work>,
    with_rule<AdEMAMix, Work>,
    with_rule<Lamb, Work>,
    with_rule<Lars, Work>,
    with_rule<LarsMomentum, Work>,
};
static_assert(sizeof kWithRule<Step> / sizeof *kWithRule<Step> == static_cast<size_t>(RuleId::count));

void step_in_order(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block,
                   int64_t last_block) {
  kWithRule<Step>[static_cast<size_t>(group.rule)](Step{norms}, tensor, group, first_block, last_block);
}

// Of a tensor, the rows that begin at `row`, whose blocks follow the first `block`; the parameter and its gradient,
// in the logical order, are elsewhere.
Tensor part(Tensor tensor, int64_t row, int64_t rows, int64_t block, void* param, const void* grad) {
  const int64_t offset = row * tensor.row_length;
  for (int s = 0; s < kMaxStates; ++s) {
    if (tensor.states[s]) tensor.states[s] = static_cast<char*>(tensor.states[s]) + offset * (tensor.state_bits / 8);
    if (tensor.scales[s]) tensor.scales[s] += block;
  }
  if (tensor.compensation) tensor.compensation += offset;
  tensor.first += offset;
  tensor.rows = rows;
  tensor.param = param;
  tensor.grad = grad;
  return tensor;
}

// A few rows at a time: the channels' elements are brought together, updated, and spread out again. A row belongs to
// whoever has its last block.
template <class T>
void step_channels_last(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block,
                        int64_t last_block) {
  constexpr int64_t kElements = 4096;  // which stay in a cache
  const int64_t blocks_per_row = block_view(tensor, group).blocks_per_row;
  const int64_t length = tensor.row_length, positions = tensor.positions, channels = length / positions;
  const int64_t at_once = length < kElements ? kElements / length : 1;
  T* const param = static_cast<T*>(row_buffer(2 * at_once * length * sizeof(T)));
  T* const grad = param + at_once * length;
  const int64_t last_row = last_block / blocks_per_row;
  for (int64_t row = first_block / blocks_per_row; row < last_row; row += at_once) {
    const int64_t rows = at_once < last_row - row ? at_once : last_row - row;
    T* const rows_of_param = static_cast<T*>(tensor.param) + row * length;
    const T* const rows_of_grad = static_cast<const T*>(tensor.grad) + row * length;
    for (int64_t i = 0; i < rows * length; i += length) {
      transpose(rows_of_param + i, positions, channels, param + i);
      transpose(rows_of_grad + i, positions, channels, grad + i);
    }
    const int64_t block = row * blocks_per_row;
    Tensor copy = part(tensor, row, rows, block, param, grad);
    // While these are updated, the next are fetched.
    copy.param_away = reinterpret_cast<char*>(rows_of_param + rows * length) - reinterpret_cast<char*>(param) - kAhead;
    copy.grad_away =
        reinterpret_cast<const char*>(rows_of_grad + rows * length) - reinterpret_cast<char*>(grad) - kAhead;
    step_in_order(copy, group, norms, 0, rows * blocks_per_row);
    for (int64_t i = 0; i < rows * length; i += length) transpose(param + i, channels, positions, rows_of_param + i);
  }
}

void step(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block, int64_t last_block) {
  if (tensor.positions == 0) return step_in_order(tensor, group, norms, first_block, last_block);
  switch (tensor.dtype) {
    case DType::float32: return step_channels_last<float>(tensor, group, norms, first_block, last_block);
    case DType::float16: return step_channels_last<float16>(tensor, group, norms, first_block, last_block);
    case DType::bfloat16: return step_channels_last<bfloat16>(tensor, group, norms, first_block, last_block);
  }
}

void measure(const Tensor& tensor, const Group& group, double* squares, int64_t first_block, int64_t last_block) {
  kWithRule<Measure>[static_cast<size_t>(group.rule)](Measure{squares}, tensor, group, first_block, last_block);
}

}  // namespace
}  // namespace opt8bit
