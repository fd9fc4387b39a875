// 8-bit codes of gradients, block by block, to the same bytes as on the CPU (core/backend/compressed_format.h,
// cpu_ops_compress.cpp). v = grad + residual is what should be sent. P pieces of N elements. A warp has a block of
// the format.
#include "cuda/compress.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kInt8Warps = 8;   // of a thread block
constexpr int kRow = 4;         // neighbouring elements of a lane
constexpr int kTile = 2 * 32 * kRow;  // elements that a warp holds at once

struct Int8Shape {
  int64_t n, blocks, payload_stride, payload_bytes;
  int block;
  bool aligned;  // four neighbours can be read as 16 bytes, and their codes as 4

  Int8Shape(const Int8Format& format, int64_t elements, const Tensor& payload_PB, int64_t rows, const float* x,
            const float* y)
      : n(elements),
        blocks(format.blocks(elements)),
        payload_stride(payload_PB.row_stride()),
        payload_bytes(payload_PB.size(1)),
        block(static_cast<int>(format.block)) {
    aligned = format.block % kRow == 0 && (rows <= 1 || elements % kRow == 0) &&
              (reinterpret_cast<uintptr_t>(x) | reinterpret_cast<uintptr_t>(y)) % 16 == 0 &&
              reinterpret_cast<uintptr_t>(payload_PB.raw()) % 4 == 0 && (rows <= 1 || payload_stride % 4 == 0);
  }
  __device__ __forceinline__ int count_of(int64_t b) const {
    return static_cast<int>(min(int64_t{block}, n - b * block));
  }
};

// The scales of a piece, then its codes.
struct Int8Place {
  float* scale;
  int8_t* codes;

  __device__ __forceinline__ Int8Place(const Int8Shape& shape, uint8_t* payload_PB, int64_t piece, int64_t b) {
    uint8_t* const payload = payload_PB + piece * shape.payload_stride;
    scale = reinterpret_cast<float*>(payload) + b;
    codes = reinterpret_cast<int8_t*>(payload + shape.blocks * 4) + b * shape.block;
  }
};

// Four neighbours from i on, of which only those before n are there; the others are 0 and not written.
__device__ __forceinline__ void load_row(const float* from, int i, int n, bool aligned, float (&x)[kRow]) {
  if (aligned && i + kRow <= n) {
    const float4 row = *reinterpret_cast<const float4*>(from + i);
    x[0] = row.x, x[1] = row.y, x[2] = row.z, x[3] = row.w;
    return;
  }
#pragma unroll
  for (int c = 0; c < kRow; ++c) x[c] = i + c < n ? from[i + c] : 0.0f;
}
__device__ __forceinline__ void store_row(const float (&x)[kRow], int i, int n, bool aligned, float* to) {
  if (aligned && i + kRow <= n) {
    *reinterpret_cast<float4*>(to + i) = make_float4(x[0], x[1], x[2], x[3]);
    return;
  }
#pragma unroll
  for (int c = 0; c < kRow; ++c)
    if (i + c < n) to[i + c] = x[c];
}
__device__ __forceinline__ void load_codes(const int8_t* from, int i, int n, bool aligned, char4& codes) {
  if (aligned && i + kRow <= n) {
    codes = *reinterpret_cast<const char4*>(from + i);
    return;
  }
  codes = {};
  if (i < n) codes.x = from[i];
  if (i + 1 < n) codes.y = from[i + 1];
  if (i + 2 < n) codes.z = from[i + 2];
  if (i + 3 < n) codes.w = from[i + 3];
}
__device__ __forceinline__ void store_codes(char4 codes, int i, int n, bool aligned, int8_t* to) {
  if (aligned && i + kRow <= n) {
    *reinterpret_cast<char4*>(to + i) = codes;
    return;
  }
  if (i < n) to[i] = codes.x;
  if (i + 1 < n) to[i + 1] = codes.y;
  if (i + 2 < n) to[i + 2] = codes.z;
  if (i + 3 < n) to[i + 3] = codes.w;
}

// Element i of a tile for row j of a lane.
__device__ __forceinline__ int place_in_tile(int j) { return (j * 32 + static_cast<int>(threadIdx.x) % 32) * kRow; }

// v of one tile of a block, from its element `first` on.
__device__ __forceinline__ void load_tile(const float* grad, const float* residual, int first, int n, bool aligned,
                                          float (&v)[2][kRow]) {
  float old[2][kRow] = {};
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    load_row(grad, first + place_in_tile(j), n, aligned, v[j]);
    if (residual) load_row(residual, first + place_in_tile(j), n, aligned, old[j]);
  }
  if (!residual) return;
#pragma unroll
  for (int j = 0; j < 2; ++j)
#pragma unroll
    for (int c = 0; c < kRow; ++c) v[j][c] += old[j][c];
}

// The scale of a block, cut to 16 bits of precision as on the CPU. NaN if an element is not finite.
__device__ __forceinline__ float int8_scale(uint32_t largest) {
  if (largest >= kInfinity) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(__float_as_uint(__fdiv_rn(__uint_as_float(largest), 127.0f)) & ~0xffu);
}

__device__ __forceinline__ float code_of(float value, float scale) {
  return fminf(fmaxf(rintf(__fdiv_rn(value, scale)), -127.0f), 127.0f);
}

__global__ void __launch_bounds__(32 * kInt8Warps)
    int8_compress_kernel(const float* __restrict__ grad_PN, float* residual_PN, Int8Shape shape, int64_t all_blocks,
                         uint8_t* payload_PB) {
  const int64_t at = int64_t{blockIdx.x} * kInt8Warps + threadIdx.x / 32;
  if (at >= all_blocks) return;
  const int64_t piece = at / shape.blocks, b = at % shape.blocks;
  const int64_t begin = piece * shape.n + b * shape.block;
  const int n = shape.count_of(b), lane = threadIdx.x % 32;
  const float* const grad = grad_PN + begin;
  float* const residual = residual_PN ? residual_PN + begin : nullptr;
  float v[2][kRow];
  uint32_t largest = 0;
  for (int first = 0; first < n; first += kTile) {
    load_tile(grad, residual, first, n, shape.aligned, v);
#pragma unroll
    for (int j = 0; j < 2; ++j)
#pragma unroll
      for (int c = 0; c < kRow; ++c) largest = max(largest, magnitude_of(v[j][c]));
  }
  largest = __reduce_max_sync(kAllLanes, largest);
  const float scale = int8_scale(largest);
  const Int8Place place(shape, payload_PB, piece, b);
  if (lane == 0) *place.scale = scale;
  if (b + 1 == shape.blocks && lane < 4) {
    const int64_t used = shape.blocks * 4 + shape.n + lane;
    if (used < shape.payload_bytes) payload_PB[piece * shape.payload_stride + used] = 0;
  }

  for (int first = 0; first < n; first += kTile) {
    if (n > kTile) load_tile(grad, residual, first, n, shape.aligned, v);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const int i = first + place_in_tile(j);
      float codes[kRow], kept_back[kRow];
#pragma unroll
      for (int c = 0; c < kRow; ++c) {
        // A block of zeros, or too small for a scale, is kept back whole.
        codes[c] = scale > 0.0f ? code_of(v[j][c], scale) : 0.0f;
        kept_back[c] = scale > 0.0f ? v[j][c] - codes[c] * scale : v[j][c];
      }
      store_codes(make_char4(static_cast<signed char>(codes[0]), static_cast<signed char>(codes[1]),
                             static_cast<signed char>(codes[2]), static_cast<signed char>(codes[3])),
                  i, n, shape.aligned, place.codes);
      if (!residual) continue;
      if (largest >= kInfinity) {  // elements that are not finite keep their own residual
        float old[kRow];
        load_row(residual, i, n, shape.aligned, old);
#pragma unroll
        for (int c = 0; c < kRow; ++c) kept_back[c] = magnitude_of(v[j][c]) < kInfinity ? v[j][c] : old[c];
      }
      store_row(kept_back, i, n, shape.aligned, residual);
    }
  }
}

__global__ void __launch_bounds__(32 * kInt8Warps)
    int8_sum_kernel(uint8_t* payload_PB, int64_t pieces, Int8Shape shape, bool add, float* sum_N) {
  constexpr int kAtOnce = 4;  // pieces whose codes are read together
  const int64_t b = int64_t{blockIdx.x} * kInt8Warps + threadIdx.x / 32;
  if (b >= shape.blocks) return;
  const int n = shape.count_of(b);
  for (int i = place_in_tile(0); i < n; i += 32 * kRow) {
    float sum[kRow] = {};
    if (add) load_row(sum_N + b * shape.block, i, n, shape.aligned, sum);
    for (int64_t first = 0; first < pieces; first += kAtOnce) {
      char4 codes[kAtOnce];
      float scale[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j >= pieces) continue;
        const Int8Place place(shape, payload_PB, first + j, b);
        load_codes(place.codes, i, n, shape.aligned, codes[j]);
        scale[j] = *place.scale;
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        if (first + j >= pieces) continue;
        sum[0] += static_cast<float>(codes[j].x) * scale[j];
        sum[1] += static_cast<float>(codes[j].y) * scale[j];
        sum[2] += static_cast<float>(codes[j].z) * scale[j];
        sum[3] += static_cast<float>(codes[j].w) * scale[j];
      }
    }
    store_row(sum, i, n, shape.aligned, sum_N + b * shape.block);
  }
}

unsigned blocks_of_warps(int64_t warps) { return static_cast<unsigned>(ceil_div(warps, kInt8Warps)); }

}  // namespace

void CudaOps::int8_compress(Stream& stream, const Tensor& grad_PN, const Int8Format& format,
                            const Tensor& residual_PN, const Tensor& payload_PB) {
  const int64_t P = grad_PN.size(0), n = grad_PN.size(1);
  expect_block("int8_compress", format.block);
  expect_pieces("int8_compress", grad_PN, residual_PN, payload_PB, format.payload_bytes(n));
  if (P == 0 || n == 0) return;
  const Int8Shape shape(format, n, payload_PB, P, pointer<const float>(grad_PN), pointer<const float>(residual_PN));
  const int64_t blocks = P * shape.blocks;
  int8_compress_kernel<<<blocks_of_warps(blocks), 32 * kInt8Warps, 0, cuda(stream)>>>(
      pointer<const float>(grad_PN), pointer<float>(residual_PN), shape, blocks, pointer<uint8_t>(payload_PB));
  check_launch("int8_compress");
}

void CudaOps::int8_sum(Stream& stream, const Tensor& payload_PB, const Int8Format& format, Accumulate accumulate,
                       const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  expect_block("int8_sum", format.block);
  expect_sum("int8_sum", payload_PB, sum_N, format.payload_bytes(n));
  if (n == 0) return;
  const Int8Shape shape(format, n, payload_PB, P, pointer<const float>(sum_N), nullptr);
  int8_sum_kernel<<<blocks_of_warps(shape.blocks), 32 * kInt8Warps, 0, cuda(stream)>>>(
      pointer<uint8_t>(payload_PB), P, shape, accumulate == Accumulate::add, pointer<float>(sum_N));
  check_launch("int8_sum");
}

}  // namespace dstrain
