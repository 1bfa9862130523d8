#include "c_api.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "dispatch.h"

using namespace opt8bit;

namespace opt8bit {
namespace {

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

TorchFunctions torch_functions(const void* const* addresses) {
  TorchFunctions torch;
  static_assert(sizeof torch == 9 * sizeof *addresses, "one address a function");
  std::memcpy(&torch, addresses, sizeof torch);
  return torch;
}

// Calls function(first_block, last_block) on the runs of blocks that make up a view.
template <class Function>
void parallel_blocks(const BlockView& view, int64_t threads, Function function) {
  const int64_t per_unit = blocks_per_unit(view);
  parallel(units(view), threads,
           [&](int64_t begin, int64_t end) { function(begin * per_unit, std::min(end * per_unit, view.blocks())); });
}

// Calls function(first_row) on the batches of rows of a weight.
template <class Function>
void parallel_rows(const Kernels* kernels, const WeightRounding& layer, int64_t threads, Function function) {
  const int64_t batch = kernels->rows_at_once;
  parallel((layer.rows + batch - 1) / batch, threads, [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) function(index * batch);
  });
}

}  // namespace
}  // namespace opt8bit

const char* opt8bit_instruction_sets() { return instruction_sets(); }

const Kernels* opt8bit_kernels(const char* instruction_set) { return find_kernels(instruction_set); }

void opt8bit_use_torch_threads(TorchParallelFor parallel_for) { use_torch_threads(parallel_for); }

void opt8bit_describe(const void* const* functions, const Objects* objects, int64_t count, int64_t max_dim,
                      int64_t* rows) {
  describe(torch_functions(functions), *objects, count, max_dim, rows);
}

int64_t opt8bit_addresses(const void* const* functions, const Objects* objects, int64_t count, int64_t max_dim,
                          const int64_t* rows, int64_t* result, int64_t threads) {
  return addresses(torch_functions(functions), *objects, count, max_dim, rows, result, static_cast<int>(threads));
}

void opt8bit_sizes(int64_t* sizes) {
  sizes[0] = sizeof(Tensor);
  sizes[1] = sizeof(Group);
}

const char* opt8bit_rules(const Kernels* kernels) {
  static const std::string lines = [&] {
    std::string joined;
    for (const RuleFacts* rule = kernels->rules; rule < kernels->rules + kernels->rule_count; ++rule) {
      joined += std::string(rule->name) + "; " + rule->hyper + ";";
      for (int64_t s = 0; s < rule->states; ++s) joined += rule->is_signed[s] ? " signed" : " unsigned";
      joined += rule->has_norms ? "; whole\n" : ";\n";
    }
    return joined;
  }();
  return lines.c_str();
}

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

void opt8bit_dequantize_blockwise(const Kernels* kernels, const uint8_t* codes, const float* scales, int64_t rows,
                                  int64_t row_length, int64_t block_size, const float* values, int64_t size, void* x,
                                  int64_t dtype, int64_t threads) {
  float table[256] = {};  // for any byte, whatever the size
  std::copy_n(values, size, table);
  const BlockView view(rows, row_length, block_size);
  parallel_blocks(view, threads, [&](int64_t first_block, int64_t last_block) {
    kernels->dequantize(codes, scales, view, table, x, static_cast<DType>(dtype), first_block, last_block);
  });
}

void opt8bit_encode_state(const Kernels* kernels, const float* x, int64_t rows, int64_t row_length, int64_t block_size,
                          int64_t is_signed, uint8_t* codes, float* scales, int64_t threads) {
  const BlockView view(rows, row_length, block_size);
  parallel_blocks(view, threads, [&](int64_t first_block, int64_t last_block) {
    kernels->encode_state(x, view, is_signed != 0, codes, scales, first_block, last_block);
  });
}

void opt8bit_step(const Kernels* kernels, const Tensor* tensors, int64_t count, const Group* groups, int64_t threads) {
  std::vector<BlockView> views;
  std::vector<int64_t> first_unit = {0};  // of each tensor, in one count over all
  for (const Tensor* tensor = tensors; tensor < tensors + count; ++tensor) {
    views.push_back(block_view(*tensor, groups[tensor->group]));
    first_unit.push_back(first_unit.back() + (tensor->step ? units(views.back()) : 0));
  }
  // Calls function(index, first_unit, last_unit) on the units of each tensor in [begin, end).
  const auto for_tensors = [&](int64_t begin, int64_t end, auto function) {
    int64_t index = std::upper_bound(first_unit.begin(), first_unit.end(), begin) - first_unit.begin() - 1;
    for (int64_t unit = begin; unit < end; unit = first_unit[++index]) {
      const int64_t last_unit = std::min(end, first_unit[index + 1]);
      if (unit < last_unit) function(index, unit, last_unit);
    }
  };
  const auto first_block = [&](int64_t index, int64_t unit) {
    return std::min((unit - first_unit[index]) * blocks_per_unit(views[index]), views[index].blocks());
  };
  const auto group_of = [&](int64_t index) -> const Group& { return groups[tensors[index].group]; };
  const auto has_norms = [&](int64_t index) { return kernels->rules[group_of(index).rule].has_norms; };

  // Norms first, where a rule asks for them: unit by unit, as the sum must not depend on the number of threads.
  std::vector<double> norms;
  if (std::any_of(tensors, tensors + count, [&](const Tensor& t) { return has_norms(&t - tensors); })) {
    std::vector<double> squares(first_unit.back() * kNorms);
    parallel(first_unit.back(), threads, [&](int64_t begin, int64_t end) {
      for_tensors(begin, end, [&](int64_t index, int64_t unit, int64_t last_unit) {
        for (; has_norms(index) && unit < last_unit; ++unit)
          kernels->measure(tensors[index], group_of(index), &squares[unit * kNorms], first_block(index, unit),
                           first_block(index, unit + 1));
      });
    });
    norms.resize(count * kNorms);
    for (int64_t index = 0; index < count; ++index)
      for (int k = 0; k < kNorms; ++k) {
        double sum = 0;
        for (int64_t unit = first_unit[index]; unit < first_unit[index + 1]; ++unit) sum += squares[unit * kNorms + k];
        norms[index * kNorms + k] = std::sqrt(sum);
      }
  }
  parallel(first_unit.back(), threads, [&](int64_t begin, int64_t end) {
    for_tensors(begin, end, [&](int64_t index, int64_t unit, int64_t last_unit) {
      kernels->step(tensors[index], group_of(index), norms.empty() ? nullptr : &norms[index * kNorms],
                    first_block(index, unit), first_block(index, last_unit));
    });
  });
  for (const Tensor* tensor = tensors; tensor < tensors + count; ++tensor)
    if (tensor->step) *tensor->step += 1;
}

void opt8bit_fit_grids(const Kernels* kernels, const WeightRounding* layer, int64_t threads) {
  parallel_rows(kernels, *layer, threads, [&](int64_t first) { kernels->fit_grids(*layer, first); });
}

void opt8bit_gptq(const Kernels* kernels, const WeightRounding* layer, int64_t fits, int64_t threads) {
  parallel_rows(kernels, *layer, threads, [&](int64_t first) { kernels->gptq(*layer, first, fits != 0); });
}

void opt8bit_coordinate_descent(const Kernels* kernels, const WeightRounding* layer, int64_t sweeps, int64_t threads) {
  parallel_rows(kernels, *layer, threads, [&](int64_t first) { kernels->coordinate_descent(*layer, first, sweeps); });
}
