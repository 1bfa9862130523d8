// What a step works on, as the C interface hands it over, and the functions that each instruction set provides.
#pragma once

#include <cstdint>

#include "codebook.h"
#include "half.h"
#include "weight_rounding.h"

namespace opt8bit {

enum class Rounding : int64_t { nearest, stochastic, compensated };  // of a bfloat16 parameter

constexpr int kMaxStates = 4;
constexpr int kMaxHyper = 12;
constexpr int kNorms = 2;  // those that a rule may ask for, over a whole tensor, before its step
constexpr int64_t kMaxBlockSize = 16384;

// One parameter with its gradient, both dense in the same order, and its states, always in the logical order of the
// elements: that of the memory of the parameter, unless there its channels come last.
struct Tensor {
  void* param;
  const void* grad;
  float* step;                // how many steps were taken; a step adds 1. Null where there is no gradient
  void* states[kMaxStates];   // uint8 codes, or float32 values where state_bits is 32
  float* scales[kMaxStates];  // (rows, blocks of a row), row by row; unused where state_bits is 32
  int16_t* compensation;      // of the parameter's shape; unused unless the rounding is compensated
  int64_t rows;
  int64_t row_length;
  DType dtype;         // of param
  DType grad_dtype;    // the same where channels come last
  int64_t state_bits;  // 8 or 32
  int64_t group;       // index into the groups
  int64_t number;      // of the parameter in its optimizer: tells streams of random bits apart
  int64_t first;       // index of the first element in the whole parameter, where this is a shard of one
  int64_t positions;   // height * width of a channel, if a row is (positions, channels) in memory; else 0
  int64_t param_away;  // bytes from param, and from grad, to the memory that is read next, where they are copies
  int64_t grad_away;
};

// What the tensors of one batch share: Python cuts a parameter group into batches of one kind.
struct Group {
  int64_t rule;  // its number in UpdateRules
  int64_t block_size;
  double hyper[kMaxHyper];  // in the order that the rule declares
  double grad_scale;        // gradients are this many times too large
  Rounding rounding;
  int64_t seed;
};

// How a tensor is cut: rows of blocks where states have 8 bits, else one row of any blocks.
struct BlockView {
  int64_t rows, row_length, block_size, blocks_per_row;

  BlockView(int64_t rows, int64_t row_length, int64_t block_size)
      : rows(rows),
        row_length(row_length),
        block_size(block_size),
        blocks_per_row((row_length + block_size - 1) / block_size) {}
  int64_t blocks() const { return rows * blocks_per_row; }

  // Calls function(block, offset, length) for each block of [first, last).
  template <class Function>
  void for_each(int64_t first, int64_t last, Function function) const {
    if (first >= last) return;
    int64_t in_row = first % blocks_per_row;
    int64_t offset = first / blocks_per_row * row_length + in_row * block_size;
    for (int64_t block = first; block < last; ++block) {
      const bool is_last = in_row + 1 == blocks_per_row;
      const int64_t length = is_last ? row_length - in_row * block_size : block_size;
      function(block, offset, length);
      offset += length;
      in_row = is_last ? 0 : in_row + 1;
    }
  }
};

BlockView block_view(const Tensor& tensor, const Group& group);

// Room for the states of one block, kMaxStates times kBufferStride floats, and for its gradients behind them, of the
// calling thread. The stride keeps equal offsets into two states apart modulo 4096, where a load would wait for a
// store.
constexpr int64_t kBufferStride = kMaxBlockSize + 336;
float* thread_buffer();
void* row_buffer(int64_t bytes);  // of the calling thread, for rows of a parameter and of its gradient

// Bytes of a parameter that are fetched ahead of their use: encoding a block leaves the memory idle otherwise, and
// the processor's own prefetching stops at the end of a page.
constexpr int64_t kAhead = 2048;

// What a rule says of itself.
struct RuleFacts {
  const char* name;
  const char* hyper;  // names of its hyper-parameters
  int64_t states;
  const bool* is_signed;  // of each state, whether it can be negative
  bool has_norms;         // it asks for norms
};

struct Kernels {
  const char* name;
  const RuleFacts* rules;  // by their numbers; the same for every set
  int64_t rule_count;
  // `norms`, kNorms numbers, is null for a rule that asks for none.
  void (*step)(const Tensor& tensor, const Group& group, const double* norms, int64_t first_block, int64_t last_block);
  // Writes what the blocks contribute to the squares of the norms that a rule asks for, the same for every set.
  void (*measure)(const Tensor& tensor, const Group& group, double* squares, int64_t first_block, int64_t last_block);
  void (*quantize)(const void* x, DType dtype, const BlockView& view, const Codebook& codebook, uint8_t* codes,
                   float* absmax, int64_t first_block, int64_t last_block);
  void (*dequantize)(const uint8_t* codes, const float* scales, const BlockView& view, const float* values, void* x,
                     DType dtype, int64_t first_block, int64_t last_block);
  // A state's codes, of a dynamic map, and scales, as a step stores them.
  void (*encode_state)(const float* x, const BlockView& view, bool is_signed, uint8_t* codes, float* scales,
                       int64_t first_block, int64_t last_block);

  // Each on the batch of `rows_at_once` rows that starts at `first`.
  int64_t rows_at_once;
  void (*fit_grids)(const WeightRounding& layer, int64_t first);
  void (*gptq)(const WeightRounding& layer, int64_t first, bool fits);
  void (*coordinate_descent)(const WeightRounding& layer, int64_t first, int64_t sweeps);
};

}  // namespace opt8bit
