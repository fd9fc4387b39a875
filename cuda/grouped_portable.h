// Products over groups of rows on any GPU, in f32 or bf16, of matrices that may lie anywhere: what
// GroupedGemm does not take. Tensor cores for bf16, plain f32 arithmetic for f32.
#pragma once

#include "cuda/grouped_gemm.h"

namespace dstrain {

// Row r of an operand x (dy) is row x_index[r] (y_index[r]) of its matrix where that is not null.
// Asynchronous on the stream; no scratch. A group without rows gets zeros in dweight (overwrite) or
// nothing (add).
void run_grouped_portable(Stream& stream, GroupedProduct product, DType dtype,
                          const GroupedLinear& linear, const int32_t* x_index_R,
                          const int32_t* y_index_R, Accumulate accumulate);

}  // namespace dstrain
