#include "c_api.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "dispatch.h"

using namespace opt8bit;

namespace opt8bit {
namespace {

constexpr const char* kRuleNames[] = {"adam", "adam_amsgrad", "adamw", "adamw_amsgrad", "sgd", "sgd_momentum"};

// Threads take whole units: runs of blocks of one tensor with about this many elements.
constexpr int64_t kUnitElements = 1 << 14;

int64_t blocks_per_unit(const BlockView& view) {
  const int64_t block_length = std::max<int64_t>(1, std::min(view.block_size, view.row_length));
  return std::max<int64_t>(1, kUnitElements / block_length);
}

int64_t units(const BlockView& view) {
  const int64_t per_unit = blocks_per_unit(view);
  return (view.blocks() + per_unit - 1) / per_unit;
}

// Calls function(first_block, last_block) on the runs of blocks that make up a view.
template <class Function>
void parallel_blocks(const BlockView& view, int64_t threads, Function function) {
  const int64_t per_unit = blocks_per_unit(view);
  parallel(units(view), threads,
           [&](int64_t begin, int64_t end) { function(begin * per_unit, std::min(end * per_unit, view.blocks())); });
}

}  // namespace
}  // namespace opt8bit

const char* opt8bit_instruction_sets() { return instruction_sets(); }

const Kernels* opt8bit_kernels(const char* instruction_set) { return find_kernels(instruction_set); }

void opt8bit_use_torch_threads(TorchParallelFor parallel_for) { use_torch_threads(parallel_for); }

void opt8bit_describe(const void* const* functions, const void* const* tensors, int64_t count, int64_t max_dim,
                      int64_t* rows, int64_t threads) {
  TorchFunctions torch;
  static_assert(sizeof torch == 9 * sizeof *functions, "one address a function");
  std::memcpy(&torch, functions, sizeof torch);
  describe(torch, tensors, count, max_dim, rows, static_cast<int>(threads));
}

int64_t opt8bit_rule(const char* name) {
  for (const char* const& known : kRuleNames)
    if (std::strcmp(known, name) == 0) return &known - kRuleNames;
  return -1;
}

int64_t opt8bit_max_block_size() { return kMaxBlockSize; }

void opt8bit_dynamic_map(int64_t is_signed, float* values) {
  std::copy_n(dynamic_map(is_signed != 0).values, 256, values);
}

void opt8bit_quantize_blockwise(const Kernels* kernels, const void* x, int64_t dtype, int64_t rows, int64_t row_length,
                                int64_t block_size, const float* values, int64_t size, uint8_t* codes, float* absmax,
                                int64_t threads) {
  Codebook codebook(values, static_cast<int>(size));
  for (bool is_signed : {false, true})
    if (std::memcmp(codebook.values, dynamic_map(is_signed).values, sizeof codebook.values) == 0)
      codebook.dynamic = dynamic_map(is_signed).dynamic;
  const BlockView view(rows, row_length, block_size);
  parallel_blocks(view, threads, [&](int64_t first_block, int64_t last_block) {
    kernels->quantize(x, static_cast<DType>(dtype), view, codebook, codes, absmax, first_block, last_block);
  });
}

void opt8bit_dequantize_blockwise(const Kernels* kernels, const uint8_t* codes, const float* absmax, int64_t rows,
                                  int64_t row_length, int64_t block_size, const float* values, int64_t size, void* x,
                                  int64_t dtype, int64_t threads) {
  const Codebook codebook(values, static_cast<int>(size));
  const BlockView view(rows, row_length, block_size);
  parallel_blocks(view, threads, [&](int64_t first_block, int64_t last_block) {
    kernels->dequantize(codes, absmax, view, codebook, x, static_cast<DType>(dtype), first_block, last_block);
  });
}

void opt8bit_step(const Kernels* kernels, const Tensor* tensors, int64_t count, const Group* groups, int64_t threads) {
  std::vector<BlockView> views;
  std::vector<int64_t> first_unit = {0};  // of each tensor, in one count over all
  for (const Tensor* tensor = tensors; tensor < tensors + count; ++tensor) {
    views.push_back(block_view(*tensor, groups[tensor->group]));
    first_unit.push_back(first_unit.back() + units(views.back()));
  }
  parallel(first_unit.back(), threads, [&](int64_t begin, int64_t end) {
    int64_t index = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (int64_t unit = begin; unit < end; unit = first_unit[++index]) {
      const int64_t per_unit = blocks_per_unit(views[index]);
      const int64_t last_unit = std::min(end, first_unit[index + 1]);
      const int64_t first_block = (unit - first_unit[index]) * per_unit;
      const int64_t last_block = std::min((last_unit - first_unit[index]) * per_unit, views[index].blocks());
      if (first_block < last_block)
        kernels->step(tensors[index], groups[tensors[index].group], first_block, last_block);
    }
  });
  for (const Tensor* tensor = tensors; tensor < tensors + count; ++tensor) *tensor->step += 1;
}
