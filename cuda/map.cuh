// Elementwise kernels over rows, for bodies of this form:
//   struct Body {
//     static constexpr int kSize = 8;
//     template <int n> using In = Pack<float, n>;  // what n elements are made of
//     template <int n> __device__ In<n> load(int64_t row, int64_t at) const;
//     template <int n> __device__ void store(int64_t row, int64_t at, const In<n>&) const;
//     __device__ bool skipped() const;
//   };
// They are run on elements at .. at + n - 1 of a row: n is kSize where rows are aligned to 16
// bytes, and 1 elsewhere; on none if they are skipped.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/pack.cuh"

namespace dstrain {

// Tensors of one shape, as rows without gaps: one long row if all are contiguous.
struct MapShape {
  int64_t rows, width;

  explicit MapShape(std::initializer_list<Tensor> tensors) {
    const Tensor& first = *tensors.begin();
    const bool flat =
        std::all_of(tensors.begin(), tensors.end(), [](const Tensor& x) { return x.contiguous(); });
    rows = flat || first.dims() == 0 ? 1 : first.size(0);
    width = flat ? first.numel() : first.row_numel();
  }
  bool empty() const { return rows == 0 || width == 0; }
  // Whether each row of x begins at a multiple of 16 bytes.
  bool aligned(const Tensor& x) const {
    return reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0 &&
           (rows == 1 || x.row_stride() * dtype_bytes(x.dtype()) % 16 == 0);
  }
};

constexpr int kMapThreads = 256;
constexpr int kMapBatch = 4;  // packs that a thread has under way

template <class Body>
__global__ void __launch_bounds__(kMapThreads)
    map_kernel(const Body body, int64_t rows, int64_t width, int64_t packs) {
  constexpr int kSize = Body::kSize;
  constexpr int64_t kBlock = int64_t{kMapThreads} * kMapBatch;
  if (body.skipped()) return;
  // Items of a row: the packs, then the elements that are left over.
  const int64_t items = packs + (width - packs * kSize);
  for (int64_t row = blockIdx.y; row < rows; row += gridDim.y) {
    for (int64_t begin = blockIdx.x * kBlock; begin < items; begin += gridDim.x * kBlock) {
      const int64_t first = begin + threadIdx.x;
      if (begin + kBlock <= packs) {
        typename Body::template In<kSize> in[kMapBatch];
#pragma unroll
        for (int i = 0; i < kMapBatch; ++i)
          in[i] = body.template load<kSize>(row, (first + i * kMapThreads) * kSize);
#pragma unroll
        for (int i = 0; i < kMapBatch; ++i)
          body.template store<kSize>(row, (first + i * kMapThreads) * kSize, in[i]);
        continue;
      }
      for (int64_t item = first; item < min(items, begin + kBlock); item += kMapThreads) {
        if (item < packs) {
          body.template store<kSize>(row, item * kSize,
                                     body.template load<kSize>(row, item * kSize));
        } else {
          const int64_t at = packs * kSize + (item - packs);
          body.template store<1>(row, at, body.template load<1>(row, at));
        }
      }
    }
  }
}

// Queues the body on all elements, in at most `most_blocks` blocks a row.
template <class Body>
void launch_map(Stream& stream, const Body& body, const MapShape& shape, bool aligned,
                const char* op, int64_t most_blocks = 0x7fffffff) {
  if (shape.empty()) return;
  const int64_t packs = aligned ? shape.width / Body::kSize : 0;
  const int64_t items = packs + (shape.width - packs * Body::kSize);
  const int64_t blocks = std::min(most_blocks, ceil_div(items, kMapThreads * kMapBatch));
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>(std::min<int64_t>(shape.rows, 65535)));
  map_kernel<Body><<<grid, kMapThreads, 0, cuda(stream)>>>(body, shape.rows, shape.width, packs);
  check_launch(op);
}

}  // namespace dstrain
