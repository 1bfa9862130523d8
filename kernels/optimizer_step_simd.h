// The kernels of optimizer_step.h, for the lanes of one instruction set: one skeleton for the rules of update_rules.h.
#pragma once

#include OPT8BIT_SIMD

#include <cstring>
#include <utility>

#include "access.h"
#include "blockwise.h"
#include "optimizer_step.h"
#include "rounding.h"
#include "transpose.h"
#include "update_rules.h"

namespace opt8bit {
namespace {

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
    grad.open(offset, n);
    (states.open(slot, offset, n), ...);
    update_block(rule, param, grad, n, indices, states...);
    (states.find_largest(), ...);
    if (__builtin_expect((states.has_infinite() || ... || false), 0)) forget_infinite(n, states...);
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
    grad.open(offset, n);
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

template <class Rule>
typename Rule::Hyper hyper_of(const Group& group) {
  typename Rule::Hyper hyper;
  static_assert(sizeof hyper <= sizeof group.hyper, "kMaxHyper is too small");
  std::memcpy(&hyper, group.hyper, sizeof hyper);
  return hyper;
}

// The skeleton of every step: a rule, a type of parameter, and how each state of the rule is stored.
template <class Rule, class T, Rounding rounding, bool kCoded, size_t... s>
void step_blocks(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block, int64_t last_block,
                 std::index_sequence<s...> indices) {
  float* const memory = thread_buffer();
  update_blocks(Rule(hyper_of<Rule>(group), *tensor.step + 1.0, norms), Param<T, rounding>(tensor, group),
                Grad<T>(tensor, group), block_view(tensor, group), first_block, last_block, indices,
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
  measure_blocks(Rule(hyper_of<Rule>(group), *tensor.step + 1.0, nullptr), Param<T, rounding>(tensor, group),
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

// Calls the function of the group's rule.
template <class Work, class... Rules>
void with_rule_of(List<Rules...>, const Work& work, const Tensor& tensor, const Group& group, int64_t first,
                  int64_t last) {
  constexpr void (*kWithRule[])(const Work&, const Tensor&, const Group&, int64_t,
                                int64_t) = {with_rule<Rules, Work>...};
  kWithRule[group.rule](work, tensor, group, first, last);
}

void step_in_order(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block,
                   int64_t last_block) {
  with_rule_of(UpdateRules(), Step{norms}, tensor, group, first_block, last_block);
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
  with_rule_of(UpdateRules(), Measure{squares}, tensor, group, first_block, last_block);
}

template <class Rule>
constexpr RuleFacts facts_of() {
  return {Rule::kName, Rule::kHyper, Rule::kStates, Rule::kSigned, Rule::kHasNorms};
}

template <class Rules>
struct Facts;
template <class... Rules>
struct Facts<List<Rules...>> {
  static constexpr RuleFacts kRules[] = {facts_of<Rules>()...};
};
constexpr const auto& kRuleFacts = Facts<UpdateRules>::kRules;

}  // namespace
}  // namespace opt8bit
