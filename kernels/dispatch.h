// The instruction sets: one table of kernels each, and which of them the processor can run.
#pragma once

#include "optimizer_step.h"

namespace opt8bit {

// Names of the instruction sets this processor can run, fastest first, separated by spaces.
const char* instruction_sets();
// Its kernels, or null where this processor cannot run them.
const Kernels* find_kernels(const char* instruction_set);

}  // namespace opt8bit
