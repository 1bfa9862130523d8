// The C interface of the shared library: opt8bit/backends/native.py is its only caller, and mirrors it.
#pragma once

#include <cstdint>

#include "optimizer_step.h"
#include "parallel.h"
#include "torch_tensors.h"

#if defined(_WIN32)
#define OPT8BIT_EXPORT extern "C" __declspec(dllexport)
#else
#define OPT8BIT_EXPORT extern "C" __attribute__((visibility("default")))
#endif

// Names of the instruction sets this processor can run, fastest first, separated by spaces.
OPT8BIT_EXPORT const char* opt8bit_instruction_sets();
// The kernels of one of them, to pass to the calls below, or null where this processor cannot run it.
OPT8BIT_EXPORT const opt8bit::Kernels* opt8bit_kernels(const char* instruction_set);
OPT8BIT_EXPORT void opt8bit_use_torch_threads(opt8bit::TorchParallelFor parallel_for);
// See torch_tensors.h; `functions` are the addresses in a TorchFunctions.
OPT8BIT_EXPORT void opt8bit_describe(const void* const* functions, const opt8bit::Objects* objects, int64_t count,
                                     int64_t max_dim, int64_t* rows);
OPT8BIT_EXPORT int64_t opt8bit_addresses(const void* const* functions, const opt8bit::Objects* objects, int64_t count,
                                         int64_t max_dim, const int64_t* rows, int64_t* addresses, int64_t threads);

OPT8BIT_EXPORT void opt8bit_sizes(int64_t* sizes);  // of a Tensor and of a Group, in bytes
// Of each rule, in the order of their numbers, a line: its name; its hyper-parameters, "lr, beta1"; for each state
// "signed" or "unsigned"; and "whole", if it asks for norms over whole parameters.
OPT8BIT_EXPORT const char* opt8bit_rules(const opt8bit::Kernels* kernels);
OPT8BIT_EXPORT void opt8bit_dynamic_map(int64_t is_signed, float* values);

// `threads` is how many to use where torch's pool is not at hand; that pool knows its own number.
OPT8BIT_EXPORT void opt8bit_quantize_blockwise(const opt8bit::Kernels* kernels, const void* x, int64_t dtype,
                                               int64_t rows, int64_t row_length, int64_t block_size,
                                               const float* codebook, int64_t codebook_size, uint8_t* codes,
                                               float* absmax, int64_t threads);
OPT8BIT_EXPORT void opt8bit_dequantize_blockwise(const opt8bit::Kernels* kernels, const uint8_t* codes,
                                                 const float* scales, int64_t rows, int64_t row_length,
                                                 int64_t block_size, const float* codebook, int64_t codebook_size,
                                                 void* x, int64_t dtype, int64_t threads);
OPT8BIT_EXPORT void opt8bit_encode_state(const opt8bit::Kernels* kernels, const float* x, int64_t rows,
                                         int64_t row_length, int64_t block_size, int64_t is_signed, uint8_t* codes,
                                         float* scales, int64_t threads);
OPT8BIT_EXPORT void opt8bit_step(const opt8bit::Kernels* kernels, const opt8bit::Tensor* tensors, int64_t count,
                                 const opt8bit::Group* groups, int64_t threads);

// See weight_rounding.h: grids for every group; GPTQ, with its grids fitted on the way if `fits` is not 0; and at most
// `sweeps` sweeps of coordinate descent.
OPT8BIT_EXPORT void opt8bit_fit_grids(const opt8bit::Kernels* kernels, const opt8bit::WeightRounding* layer,
                                      int64_t threads);
OPT8BIT_EXPORT void opt8bit_gptq(const opt8bit::Kernels* kernels, const opt8bit::WeightRounding* layer, int64_t fits,
                                 int64_t threads);
OPT8BIT_EXPORT void opt8bit_coordinate_descent(const opt8bit::Kernels* kernels, const opt8bit::WeightRounding* layer,
                                               int64_t sweeps, int64_t threads);
