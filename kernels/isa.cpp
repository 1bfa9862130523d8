// The kernels of one instruction set: this file is compiled once for each, with OPT8BIT_SIMD naming the header
// of its lanes and OPT8BIT_KERNELS the table it defines. Everything else in here has internal linkage, so that
// no instruction of one set can end up in the code of another.
#include <iterator>

#include "blockwise_simd.h"
#include "optimizer_step_simd.h"
#include "weight_rounding_simd.h"

namespace opt8bit {

extern const Kernels OPT8BIT_KERNELS;
const Kernels OPT8BIT_KERNELS = {OPT8BIT_NAME,
                                 kRuleFacts,
                                 std::size(kRuleFacts),
                                 step,
                                 measure,
                                 quantize,
                                 dequantize,
                                 encode_state,
                                 weight_rounding::kRows,
                                 weight_rounding::fit_grids,
                                 weight_rounding::gptq,
                                 weight_rounding::coordinate_descent};

}  // namespace opt8bit
