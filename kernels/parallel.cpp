#include "parallel.h"

#include <thread>
#include <vector>

namespace opt8bit {
namespace {

TorchParallelFor torch_parallel_for = nullptr;

}  // namespace

void use_torch_threads(TorchParallelFor parallel_for) { torch_parallel_for = parallel_for; }

void parallel_for(int64_t count, int threads, TorchRange range, void* context) {
  if (torch_parallel_for) {
    torch_parallel_for(0, count, 1, range, context);
    return;
  }
  const int64_t workers = count < threads ? count : threads;
  const auto bound = [&](int64_t worker) { return count * worker / workers; };
  std::vector<std::thread> others;
  for (int64_t worker = 1; worker < workers; ++worker)
    others.emplace_back(range, bound(worker), bound(worker + 1), context);
  if (workers > 0) range(0, bound(1), context);
  for (std::thread& other : others) other.join();
}

}  // namespace opt8bit
