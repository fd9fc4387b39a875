// Compression of gradients, block by block, to the same bytes as on the CPU (core/backend/compressed_format.h,
// cpu_ops_compress.cpp): exact top-k by magnitude, and 8-bit codes. v = grad + residual is what should be sent.
// P pieces of N elements. "Block" is one of the format; top-k has a thread block for each, int8 a warp.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;
constexpr int kTopkThreads = 512, kTopkWarps = kTopkThreads / 32;
constexpr int64_t kSharedElements = 9216;  // of a block whose values are kept in shared memory

__device__ __forceinline__ uint32_t magnitude_of(float value) { return __float_as_uint(value) & kMagnitude; }

// --- top-k: stored values ----------------------------------------------------------------------------------

struct F32Values {
  using Stored = float;
  __device__ __forceinline__ static Stored store(float value) { return value; }
  __device__ __forceinline__ static float load(Stored stored) { return stored; }
};
struct Bf16Values {
  using Stored = uint16_t;
  // The nearest, ties to even; what is finite stays finite.
  __device__ __forceinline__ static Stored store(float value) {
    const uint32_t bits = __float_as_uint(value), magnitude = bits & kMagnitude;
    if (magnitude > kInfinity) return static_cast<uint16_t>((bits >> 16) | 0x40u);  // a quiet NaN
    uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
    if (magnitude < kInfinity) rounded = min(rounded, 0x7f7fu);
    return static_cast<uint16_t>((bits >> 31 << 15) | rounded);
  }
  __device__ __forceinline__ static float load(Stored stored) { return __uint_as_float(uint32_t{stored} << 16); }
};

template <class Launch>
void dispatch_values(DType values, const Launch& launch) {
  DSTRAIN_CHECK(values == DType::f32 || values == DType::bf16,
                std::string("top-k sends f32 or bf16, not ") + dtype_name(values));
  if (values == DType::f32)
    launch.template operator()<F32Values>();
  else
    launch.template operator()<Bf16Values>();
}

// TopkFormat for pieces of n elements, in numbers that a kernel needs.
struct TopkShape {
  int64_t n, blocks, kept_total, payload_stride, payload_bytes;
  int block, kept, kept_last;

  TopkShape(const TopkFormat& format, int64_t elements, const Tensor& payload_PB)
      : n(elements),
        blocks(ceil_div(elements, format.block)),
        kept_total(format.kept_total(elements)),
        payload_stride(payload_PB.row_stride()),
        payload_bytes(payload_PB.size(1)),
        block(static_cast<int>(format.block)),
        kept(static_cast<int>(format.kept(format.block))),
        kept_last(static_cast<int>(format.kept(elements - (blocks - 1) * format.block))) {}

  __device__ __forceinline__ int count_of(int64_t b) const {
    return static_cast<int>(min(int64_t{block}, n - b * block));
  }
  __device__ __forceinline__ int kept_of(int64_t b) const { return b + 1 == blocks ? kept_last : kept; }
};

// Where the values and indices of a block are in the payload of a piece.
template <class Values>
struct TopkPlace {
  typename Values::Stored* values;
  uint16_t* indices;

  __device__ __forceinline__ TopkPlace(const TopkShape& shape, uint8_t* payload_PB, int64_t piece, int64_t b) {
    auto* const all = reinterpret_cast<typename Values::Stored*>(payload_PB + piece * shape.payload_stride);
    values = all + b * shape.kept;
    indices = reinterpret_cast<uint16_t*>(all + shape.kept_total) + b * shape.kept;
  }
};

// --- top-k: selection --------------------------------------------------------------------------------------

// The elements of a block: in shared memory, or, where they do not fit, added up each time.
struct BlockValues {
  const float* shared;
  const float* grad;
  const float* residual;

  __device__ __forceinline__ float sum(int i) const { return residual ? grad[i] + residual[i] : grad[i]; }
  __device__ __forceinline__ float operator[](int i) const { return shared ? shared[i] : sum(i); }
};

// The k elements of largest magnitude are those above `magnitude` and the first `ties` that equal it.
struct Selection {
  uint32_t magnitude = 0;
  int ties = 0;
};

constexpr int kMostBins = 2048;

// Finds, from the largest on, the bin in which the wanted-th element falls; `wanted` becomes its place in the bin.
// One warp. The result is in every lane.
__device__ __forceinline__ int find_bin(const int32_t* bins, int count, int& wanted) {
  const int lane = threadIdx.x % 32;
  for (int top = count - 1;; top -= 32) {
    const int own = bins[top - lane];
    int sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int before = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += before;
    }
    const unsigned reached = __ballot_sync(kAllLanes, sum >= wanted);
    if (reached != 0) {
      const int first = __ffs(static_cast<int>(reached)) - 1;
      wanted -= __shfl_sync(kAllLanes, sum - own, first);
      return top - first;
    }
    wanted -= __shfl_sync(kAllLanes, sum, 31);
  }
}

// The 31 bits of a magnitude are decided from the highest on, 11, 10 and 10 at a time.
__device__ __forceinline__ Selection select_topk(const BlockValues& v, int n, int k, int32_t* bins, int32_t* found) {
  if (k == n) return {0, n};
  uint32_t prefix = 0;
  int wanted = k;
#pragma unroll 1
  for (int shift = 20; shift >= 0; shift -= 10) {
    const int bits = shift == 20 ? 11 : 10, count = 1 << bits;
    for (int i = threadIdx.x; i < count; i += kTopkThreads) bins[i] = 0;
    __syncthreads();
#pragma unroll 4
    for (int i = threadIdx.x; i < n; i += kTopkThreads) {
      const uint32_t magnitude = magnitude_of(v[i]) >> shift;
      if (magnitude >> bits == prefix) atomicAdd(&bins[magnitude & (count - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      const int bin = find_bin(bins, count, wanted);
      if (threadIdx.x == 0) {
        found[0] = bin;
        found[1] = wanted;
      }
    }
    __syncthreads();
    prefix = prefix << bits | static_cast<uint32_t>(found[0]);
    wanted = found[1];
  }
  return {prefix, wanted};
}

// How many elements of a run are above the threshold, and how many equal it.
struct Above {
  int larger = 0, equal = 0;
};

template <class Values>
__global__ void __launch_bounds__(kTopkThreads)
    topk_compress_kernel(const float* __restrict__ grad_PN, float* residual_PN, TopkShape shape, bool in_shared,
                         uint8_t* payload_PB) {
  extern __shared__ float shared_values[];
  __shared__ int32_t bins[kMostBins], found[2], larger[kTopkWarps], equal[kTopkWarps];
  const int64_t piece = blockIdx.x / shape.blocks, b = blockIdx.x % shape.blocks;
  const int64_t begin = piece * shape.n + b * shape.block;
  const int n = shape.count_of(b), lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* const residual = residual_PN ? residual_PN + begin : nullptr;
  const BlockValues v{in_shared ? shared_values : nullptr, grad_PN + begin, residual};
  if (in_shared) {
#pragma unroll 8
    for (int i = threadIdx.x; i < n; i += kTopkThreads) shared_values[i] = v.sum(i);
    __syncthreads();
  }
  const Selection selection = select_topk(v, n, shape.kept_of(b), bins, found);

  // Each warp has a part of the block, and learns how many elements before it are sent.
  const int part = (n + kTopkThreads - 1) / kTopkThreads * 32;
  const int first = warp * part, end = min(first + part, n);
  Above own;
  for (int i = first + lane; i - lane < end; i += 32) {
    const uint32_t magnitude = i < end ? magnitude_of(v[i]) : 0u;
    own.larger += __popc(__ballot_sync(kAllLanes, i < end && magnitude > selection.magnitude));
    own.equal += __popc(__ballot_sync(kAllLanes, i < end && magnitude == selection.magnitude));
  }
  if (lane == 0) {
    larger[warp] = own.larger;
    equal[warp] = own.equal;
  }
  __syncthreads();
  Above before;
  for (int w = 0; w < warp; ++w) {
    before.larger += larger[w];
    before.equal += equal[w];
  }

  const TopkPlace<Values> place(shape, payload_PB, piece, b);
  const unsigned lower_lanes = (1u << lane) - 1u;
  for (int i = first + lane; i - lane < end; i += 32) {
    const float value = i < end ? v[i] : 0.0f;
    const uint32_t magnitude = magnitude_of(value);
    const unsigned above = __ballot_sync(kAllLanes, i < end && magnitude > selection.magnitude);
    const unsigned same = __ballot_sync(kAllLanes, i < end && magnitude == selection.magnitude);
    const int rank_above = before.larger + __popc(above & lower_lanes);
    const int rank_same = before.equal + __popc(same & lower_lanes);
    before.larger += __popc(above);
    before.equal += __popc(same);
    if (i >= end) continue;
    const bool sent = (above >> lane & 1u) || ((same >> lane & 1u) && rank_same < selection.ties);
    float kept_back = value;
    if (sent) {
      const int at = rank_above + min(rank_same, selection.ties);
      const auto stored = Values::store(value);
      place.values[at] = stored;
      place.indices[at] = static_cast<uint16_t>(i);
      kept_back = value - Values::load(stored);
    }
    if (residual && magnitude < kInfinity) residual[i] = kept_back;
  }
  if (b + 1 == shape.blocks) {
    const int64_t used = shape.kept_total * static_cast<int64_t>(sizeof(typename Values::Stored) + 2);
    if (used + threadIdx.x < shape.payload_bytes)
      payload_PB[piece * shape.payload_stride + used + threadIdx.x] = 0;
  }
}

// --- top-k: sum --------------------------------------------------------------------------------------------

// A few of the elements that a piece sends for a block, read ahead of their use.
template <class Values>
struct Sent {
  static constexpr int kCount = 2;  // a thread
  typename Values::Stored value[kCount];
  uint16_t index[kCount];

  __device__ __forceinline__ void load(const TopkPlace<Values>& place, int batch, int kept) {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = (batch * kCount + j) * kTopkThreads + threadIdx.x;
      if (at < kept) {
        value[j] = place.values[at];
        index[j] = place.indices[at];
      }
    }
  }
  // The first is stored, not added to zero, so that -0 stays what it is.
  __device__ __forceinline__ void add_to(float* sum, bool first, int batch, int kept, int n) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      const int at = (batch * kCount + j) * kTopkThreads + threadIdx.x;
      if (at >= kept || index[j] >= n) continue;
      const float sent = Values::load(value[j]);
      sum[index[j]] = first ? sent : sum[index[j]] + sent;
    }
  }
};

// A block sums its elements in shared memory, or in place where they do not fit, piece after piece. The indices of
// a piece are distinct, so that its elements can be added in any order.
template <class Values>
__global__ void __launch_bounds__(kTopkThreads)
    topk_sum_kernel(uint8_t* payload_PB, int64_t pieces, TopkShape shape, bool in_shared, float* sum_N) {
  extern __shared__ float shared_values[];
  const int64_t b = blockIdx.x;
  const int n = shape.count_of(b), kept = shape.kept_of(b);
  float* const out = sum_N + b * shape.block;
  float* const sum = in_shared ? shared_values : out;
  for (int i = threadIdx.x; i < n; i += kTopkThreads) sum[i] = 0.0f;

  constexpr int kPerBatch = Sent<Values>::kCount * kTopkThreads;
  const int batches = (kept + kPerBatch - 1) / kPerBatch;
  Sent<Values> next;
  if (pieces > 0) next.load(TopkPlace<Values>(shape, payload_PB, 0, b), 0, kept);
  int64_t piece = 0;
  int batch = 0;
  while (piece < pieces) {
    const Sent<Values> sent = next;
    const int next_batch = batch + 1 < batches ? batch + 1 : 0;
    const int64_t next_piece = next_batch == 0 ? piece + 1 : piece;
    if (next_piece < pieces) next.load(TopkPlace<Values>(shape, payload_PB, next_piece, b), next_batch, kept);
    if (batch == 0) __syncthreads();
    sent.add_to(sum, piece == 0, batch, kept, n);
    batch = next_batch;
    piece = next_piece;
  }
  if (!in_shared) return;
  __syncthreads();
  for (int i = threadIdx.x; i < n; i += kTopkThreads) out[i] = shared_values[i];
}

// --- int8 --------------------------------------------------------------------------------------------------

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
    int8_sum_kernel(uint8_t* payload_PB, int64_t pieces, Int8Shape shape, float* sum_N) {
  constexpr int kAtOnce = 4;  // pieces whose codes are read together
  const int64_t b = int64_t{blockIdx.x} * kInt8Warps + threadIdx.x / 32;
  if (b >= shape.blocks) return;
  const int n = shape.count_of(b);
  for (int i = place_in_tile(0); i < n; i += 32 * kRow) {
    float sum[kRow] = {};
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

// --- checks ------------------------------------------------------------------------------------------------

void expect_pieces(const std::string& op, const Tensor& grad_PN, const Tensor& residual_PN, const Tensor& payload_PB,
                   int64_t payload_bytes) {
  const int64_t P = grad_PN.size(0), N = grad_PN.size(1);
  expect(grad_PN, (op + ": grad_PN").c_str(), DType::f32, {P, N});
  if (residual_PN.defined()) expect(residual_PN, (op + ": residual_PN").c_str(), DType::f32, {P, N});
  expect(payload_PB, (op + ": payload_PB").c_str(), DType::u8, {P, payload_bytes});
}

void expect_sum(const std::string& op, const Tensor& payload_PB, const Tensor& sum_N, int64_t payload_bytes) {
  expect(payload_PB, (op + ": payload_PB").c_str(), DType::u8, {payload_PB.size(0), payload_bytes});
  expect(sum_N, (op + ": sum_N").c_str(), DType::f32, {sum_N.numel()});
}

void expect_block(const char* op, int64_t block) {
  DSTRAIN_CHECK(block > 0 && block <= TopkFormat::kMaxBlock,
                std::string(op) + ": a block of " + std::to_string(block) + " elements; at most " +
                    std::to_string(TopkFormat::kMaxBlock) + " are possible");
}

unsigned blocks_of_warps(int64_t warps) { return static_cast<unsigned>(ceil_div(warps, kInt8Warps)); }

// Shared memory for a block's values, if they are kept there. With the histogram they need no more than the 48 KiB
// that every kernel may use.
static_assert(kSharedElements * sizeof(float) + (kMostBins + 64) * sizeof(int32_t) <= 48 << 10);
size_t shared_bytes(const TopkFormat& format, int64_t n) {
  const int64_t elements = std::min(format.block, n);
  return elements <= kSharedElements ? static_cast<size_t>(elements) * sizeof(float) : 0;
}

}  // namespace

void CudaOps::topk_compress(Stream& stream, const Tensor& grad_PN, const TopkFormat& format,
                            const Tensor& residual_PN, const Tensor& payload_PB) {
  const int64_t P = grad_PN.size(0), n = grad_PN.size(1);
  expect_block("topk_compress", format.block);
  expect_pieces("topk_compress", grad_PN, residual_PN, payload_PB, format.payload_bytes(n));
  if (P == 0 || n == 0) return;
  const TopkShape shape(format, n, payload_PB);
  const size_t bytes = shared_bytes(format, n);
  dispatch_values(format.values, [&]<class Values>() {
    topk_compress_kernel<Values><<<static_cast<unsigned>(P * shape.blocks), kTopkThreads, bytes, cuda(stream)>>>(
        pointer<const float>(grad_PN), pointer<float>(residual_PN), shape, bytes > 0, pointer<uint8_t>(payload_PB));
  });
  check_launch("topk_compress");
}

void CudaOps::topk_sum(Stream& stream, const Tensor& payload_PB, const TopkFormat& format, const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  expect_block("topk_sum", format.block);
  expect_sum("topk_sum", payload_PB, sum_N, format.payload_bytes(n));
  if (n == 0) return;
  const TopkShape shape(format, n, payload_PB);
  const size_t bytes = shared_bytes(format, n);
  dispatch_values(format.values, [&]<class Values>() {
    topk_sum_kernel<Values><<<static_cast<unsigned>(shape.blocks), kTopkThreads, bytes, cuda(stream)>>>(
        pointer<uint8_t>(payload_PB), P, shape, bytes > 0, pointer<float>(sum_N));
  });
  check_launch("topk_sum");
}

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

void CudaOps::int8_sum(Stream& stream, const Tensor& payload_PB, const Int8Format& format, const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  expect_block("int8_sum", format.block);
  expect_sum("int8_sum", payload_PB, sum_N, format.payload_bytes(n));
  if (n == 0) return;
  const Int8Shape shape(format, n, payload_PB, P, pointer<const float>(sum_N), nullptr);
  int8_sum_kernel<<<blocks_of_warps(shape.blocks), 32 * kInt8Warps, 0, cuda(stream)>>>(
      pointer<uint8_t>(payload_PB), P, shape, pointer<float>(sum_N));
  check_launch("int8_sum");
}

}  // namespace dstrain
