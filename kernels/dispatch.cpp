#include "dispatch.h"

#include <cstring>
#include <string>

namespace opt8bit {

extern const Kernels kernels_scalar;
#ifdef OPT8BIT_X86
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif
#ifdef OPT8BIT_ARM64
extern const Kernels kernels_neon;
#endif

namespace {

struct Candidate {
  const Kernels* kernels;
  bool (*runs_here)();
};

#ifdef OPT8BIT_X86
bool has_avx2() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");  // every such processor has F16C
}
bool has_avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif
bool always() { return true; }

const Candidate kCandidates[] = {
// fastest first
#ifdef OPT8BIT_X86
    {&kernels_avx512, has_avx512},
    {&kernels_avx2, has_avx2},
#endif
#ifdef OPT8BIT_ARM64
    {&kernels_neon, always},  // a part of the architecture
#endif
    {&kernels_scalar, always},
};

}  // namespace

const char* instruction_sets() {
  static const std::string names = [] {
    std::string joined;
    for (const Candidate& candidate : kCandidates)
      if (candidate.runs_here()) joined += (joined.empty() ? "" : " ") + std::string(candidate.kernels->name);
    return joined;
  }();
  return names.c_str();
}

const Kernels* find_kernels(const char* instruction_set) {
  for (const Candidate& candidate : kCandidates)
    if (std::strcmp(candidate.kernels->name, instruction_set) == 0 && candidate.runs_here()) return candidate.kernels;
  return nullptr;
}

}  // namespace opt8bit
