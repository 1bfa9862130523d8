// Work shared between threads: torch's own pool where its C symbols were handed over, else plain threads.
#pragma once

#include <cstdint>

namespace opt8bit {

// torch_parallel_for of torch's stable C interface (torch 2.10 and later).
using TorchRange = void (*)(int64_t begin, int64_t end, void* context);
using TorchParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, TorchRange range, void* context);

void use_torch_threads(TorchParallelFor parallel_for);  // null for plain threads

// Calls range(begin, end, context) on disjoint pieces that cover [0, count). `threads` is how many to use where
// torch's pool is not at hand; that pool knows its own number.
void parallel_for(int64_t count, int threads, TorchRange range, void* context);

template <class Function>
void parallel(int64_t count, int64_t threads, Function function) {
  const auto range = [](int64_t begin, int64_t end, void* context) { (*static_cast<Function*>(context))(begin, end); };
  if (count > 0) parallel_for(count, static_cast<int>(threads), range, &function);
}

}  // namespace opt8bit
