#include "cuda/gathered_rows.h"

#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

// One warp per row, of `vectors` times 16 bytes.
constexpr int kWarps = 8, kLoads = 4;
__global__ void __launch_bounds__(kWarps * 32)
    gather_kernel(const int32_t* __restrict__ offsets_E1, int64_t E, int64_t R,
                  const uint4* __restrict__ x, int64_t stride, const int32_t* __restrict__ index_R,
                  int64_t vectors, uint4* __restrict__ out) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (row >= (offsets_E1 ? offsets_E1[E] : R) || (offsets_E1 && row < offsets_E1[0])) return;
  const uint4* const from = x + index_R[row] * stride;
  uint4* const to = out + row * vectors;
  for (int64_t v = threadIdx.x % 32; v < vectors; v += 32 * kLoads) {
    uint4 loaded[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (v + 32 * i < vectors) loaded[i] = from[v + 32 * i];
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
      if (v + 32 * i < vectors) __stcs(to + v + 32 * i, loaded[i]);
  }
}

}  // namespace

void gather_group_rows(Stream& stream, const int32_t* offsets_E1, int64_t E, const Tensor& index_R,
                       int64_t columns, ScratchPieces& scratch, void** matrix, int64_t* stride) {
  if (!index_R.defined()) return;
  constexpr int64_t kPerVector = sizeof(uint4) / sizeof(bf16);
  const int64_t R = index_R.size(0);
  bf16* const out = scratch.take<bf16>(R * columns);
  if (R > 0) {
    gather_kernel<<<static_cast<unsigned>(ceil_div(R, kWarps)), kWarps * 32, 0, cuda(stream)>>>(
        offsets_E1, E, R, static_cast<const uint4*>(*matrix), *stride / kPerVector,
        index_R.data<int32_t>(), columns / kPerVector, reinterpret_cast<uint4*>(out));
    check_launch("gathered rows");
  }
  *matrix = out;
  *stride = columns;
}

int64_t gathered_rows_bytes(const Tensor& index_R, int64_t columns) {
  return index_R.defined()
             ? ScratchPieces::padded(index_R.size(0) * columns * int64_t{sizeof(bf16)})
             : 0;
}

}  // namespace dstrain
