// Rows of a bf16 matrix, copied one after the other into scratch memory, for products that want
// them so.
#pragma once

#include <cstdint>

#include "core/tensor/tensor.h"
#include "cuda/cuda_device.h"

namespace dstrain {

// Replaces *matrix, with rows *stride elements apart, by the rows that index_R (i32) names, and
// *stride by `columns`; does nothing where the index is absent. Rows outside of the E groups are
// not copied (offsets_E1 null: all rows are in one), and their index is not read. Rows are aligned
// to 16 bytes. Asynchronous on the stream.
void gather_group_rows(Stream& stream, const int32_t* offsets_E1, int64_t E, const Tensor& index_R,
                       int64_t columns, ScratchPieces& scratch, void** matrix, int64_t* stride);

// What it takes of the scratch memory.
int64_t gathered_rows_bytes(const Tensor& index_R, int64_t columns);

}  // namespace dstrain
