// Rows to experts and back. T tokens, K experts per token, T*K slots, R rows sorted by expert, E experts, D
// columns.
//
// The sort is stable and takes two launches. Slots are cut into runs, the number of which depends on R only; one
// block counts the experts of a run. In the second launch each block adds the counts of all runs and of those
// before its own, so that it knows where its rows of each expert begin, and deals them out slot by slot.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/planning_ops.h"
#include "cuda/rows.cuh"
#include "cuda/scan.cuh"

namespace dstrain {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;

// --- sort ----------------------------------------------------------------------------------------------

// How R slots are cut into runs: at most 128 of them, a multiple of 1024 slots each.
struct SlotRuns {
  int slots = 0, length = 0, count = 0;

  explicit SlotRuns(int64_t all) {
    constexpr int64_t kMostRuns = 128, kUnit = 1024;
    DSTRAIN_CHECK(all <= INT32_MAX - kMostRuns * kUnit, "sort_by_expert: more rows than an i32 can number");
    slots = static_cast<int>(all);
    length = static_cast<int>(kUnit * std::max<int64_t>(1, ceil_div(all, kMostRuns * kUnit)));
    count = static_cast<int>(std::max<int64_t>(1, ceil_div(all, length)));  // offsets are written even without slots
  }
  int64_t scratch_bytes(int64_t E) const { return count * E * static_cast<int64_t>(sizeof(int32_t)); }
};

constexpr int64_t kMostSortedExperts = 4095;  // 3 E + 1 counters in 48 KiB
// Warps of a block that deals out rows: each has E counters, and there are 2 E + 1 more.
int sort_warps(int64_t E) { return static_cast<int>(std::clamp<int64_t>(10240 / std::max<int64_t>(1, E) - 2, 1, 16)); }

__global__ void __launch_bounds__(512)
    count_runs_kernel(const int32_t* __restrict__ expert_of_slot, SlotRuns runs, int E, int32_t* counts) {
  extern __shared__ int32_t run_counts[];
  for (int e = threadIdx.x; e < E; e += blockDim.x) run_counts[e] = 0;
  __syncthreads();
  const int begin = blockIdx.x * runs.length, end = min(begin + runs.length, runs.slots);
  for (int slot = begin + threadIdx.x; slot < end; slot += blockDim.x) {
    const int expert = checked_or_none(expert_of_slot[slot], E);
    if (expert >= 0) atomicAdd(&run_counts[expert], 1);
  }
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) counts[blockIdx.x * E + e] = run_counts[e];
}

// The lanes of this warp whose slot has the same expert; lanes without a slot, or an expert, pass -1.
struct SameExpert {
  unsigned lanes;
  __device__ __forceinline__ explicit SameExpert(int expert) : lanes(__match_any_sync(kAllLanes, expert)) {}
  __device__ __forceinline__ int count() const { return __popc(lanes); }
  __device__ __forceinline__ int before() const { return __popc(lanes & ((1u << threadIdx.x % 32) - 1u)); }
};

__global__ void __launch_bounds__(512)
    deal_rows_kernel(const int32_t* __restrict__ expert_of_slot, const float* __restrict__ weights,
                     const int32_t* __restrict__ counts, SlotRuns runs, int E, int K, int32_t* offsets_E1,
                     int32_t* token_of_row, int32_t* row_of_slot, float* row_weight, int R) {
  extern __shared__ int32_t shared[];
  int32_t* const offset_E1 = shared;             // first row of an expert
  int32_t* const before_E = shared + E + 1;      // its rows in earlier runs
  int32_t* const next_row = shared + 2 * E + 1;  // of a warp and an expert
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, warps = blockDim.x / 32, run = blockIdx.x;
  for (int i = threadIdx.x; i < (2 + warps) * E + 1; i += blockDim.x) shared[i] = 0;
  __syncthreads();

  // Several threads an expert, each with every `sharers`-th run.
  const int sharers = max(1, static_cast<int>(blockDim.x) / E);
  for (int i = threadIdx.x; i < sharers * E; i += blockDim.x) {
    const int e = i % E;
    int all = 0, before = 0;
#pragma unroll 4
    for (int other = i / E; other < runs.count; other += sharers) {
      const int count = counts[other * E + e];
      all += count;
      before += other < run ? count : 0;
    }
    atomicAdd(&offset_E1[e], all);
    atomicAdd(&before_E[e], before);
  }
  // Each warp has a part of the run.
  const int part = (runs.length / 32 + warps - 1) / warps * 32;
  const int begin = run * runs.length + warp * part;
  const int end = min(min(begin + part, (run + 1) * runs.length), runs.slots);
  int32_t* const own_next_row = next_row + warp * E;
  for (int first = begin; first < end; first += 32) {
    const int expert = first + lane < end ? max(expert_of_slot[first + lane], -1) : -1;
    const SameExpert same(expert);
    if (expert >= 0 && same.before() == 0) own_next_row[expert] += same.count();
    __syncwarp();
  }
  __syncthreads();

  if (warp == 0) exclusive_scan(offset_E1, E + 1);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    if (run == 0) offsets_E1[e] = offset_E1[e];
    int row = offset_E1[e] + before_E[e];
    for (int w = 0; w < warps; ++w) {
      const int count = next_row[w * E + e];
      next_row[w * E + e] = row;
      row += count;
    }
  }
  const int used = offset_E1[E];
  if (run == 0 && threadIdx.x == 0) offsets_E1[E] = used;
  if (used > R) __trap();
  for (int row = used + run * blockDim.x + threadIdx.x; row < R; row += gridDim.x * blockDim.x) {
    token_of_row[row] = 0;
    row_weight[row] = 0;
  }
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int slot = first + lane;
    const int expert = slot < end ? max(expert_of_slot[slot], -1) : -1;
    const SameExpert same(expert);
    const int row = expert >= 0 ? own_next_row[expert] + same.before() : 0;
    __syncwarp();
    if (expert >= 0 && same.before() == 0) own_next_row[expert] += same.count();
    __syncwarp();
    if (slot < end) row_of_slot[slot] = expert < 0 ? -1 : row;
    if (expert < 0) continue;
    token_of_row[row] = slot / K;
    row_weight[row] = weights[slot];
  }
}

// --- combine and gather ------------------------------------------------------------------------------------

// What Vec is for rows that cannot be read in vectors.
template <class F>
struct One {
  static constexpr int kSize = 1;
  F at[1];
  __device__ __forceinline__ static One load(const F* from) { return {{*from}}; }
  __device__ __forceinline__ static One stream(const F* from) { return {{__ldcs(from)}}; }
  __device__ __forceinline__ void store(F* to) const { *to = at[0]; }
};

// Threads of one x share a column, those of one y a row.
struct RowBlock {
  dim3 threads;
  int64_t rows;  // of a block

  RowBlock(int64_t columns, int64_t rows_per_thread) {
    constexpr int kThreads = 256;
    int x = 1;
    while (x < columns && x < kThreads) x *= 2;
    threads = dim3(x, kThreads / x);
    rows = kThreads / x * rows_per_thread;
  }
  unsigned blocks(int64_t all_rows) const { return static_cast<unsigned>(ceil_div(all_rows, rows)); }
};

// V is Vec<F> or One<F>. out may be addend.
template <class V, class F>
__global__ void __launch_bounds__(256)
    combine_rows_kernel(Rows<const F> y_RD, int R, Rows<const int32_t> row_of_slot_TK, int K,
                        Rows<const F> addend_TD, int64_t T, int columns, Rows<F> out_TD) {
  constexpr int kAtOnce = 8;  // rows whose loads are under way together
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= T) return;
  const int32_t* const rows = row_of_slot_TK[t];
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    const int d = column * V::kSize;
    float sum[V::kSize] = {};
    const auto add = [&sum](const V& x) {
#pragma unroll
      for (int i = 0; i < V::kSize; ++i) sum[i] += to_float(x.at[i]);
    };
    if (addend_TD.data) add(V::load(addend_TD[t] + d));
    for (int first = 0; first < K; first += kAtOnce) {
      int32_t row[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) row[k] = first + k < K ? rows[first + k] : -1;
      check_indices(row, R);
      V part[kAtOnce] = {};
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k)
        if (row[k] >= 0) part[k] = V::stream(y_RD[row[k]] + d);
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) add(part[k]);
    }
    V out;
#pragma unroll
    for (int i = 0; i < V::kSize; ++i) out.at[i] = from_float<F>(sum[i]);
    out.store(out_TD[t] + d);
  }
}

constexpr int kGatherRows = 4;  // of a thread, whose loads are under way together

// A row is `columns` units of 1 to 16 bytes; strides are in units.
template <class Unit>
__global__ void __launch_bounds__(256)
    gather_rows_kernel(Rows<const Unit> x, int x_rows, const int32_t* __restrict__ index, int64_t R, int columns,
                       Rows<Unit> y) {
  const int64_t first = int64_t{blockIdx.x} * blockDim.y * kGatherRows + threadIdx.y;
  int32_t row[kGatherRows];
#pragma unroll
  for (int i = 0; i < kGatherRows; ++i) row[i] = first + i * blockDim.y < R ? index[first + i * blockDim.y] : -1;
  check_indices(row, x_rows);
  for (int column = threadIdx.x; column < columns; column += blockDim.x) {
    Unit unit[kGatherRows];
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i)
      if (row[i] >= 0) unit[i] = x[row[i]][column];
#pragma unroll
    for (int i = 0; i < kGatherRows; ++i)
      if (row[i] >= 0) y[first + i * blockDim.y][column] = unit[i];
  }
}

template <class Unit>
void gather_units(const Tensor& x_XD, const int32_t* index, int64_t row_bytes, const Tensor& y_RD,
                  cudaStream_t stream) {
  constexpr auto kSize = static_cast<int64_t>(sizeof(Unit));
  const int64_t element = dtype_bytes(x_XD.dtype()), columns = row_bytes / kSize, R = y_RD.size(0);
  const Rows<const Unit> x{pointer<const Unit>(x_XD), x_XD.row_stride() * element / kSize};
  const Rows<Unit> y{pointer<Unit>(y_RD), y_RD.row_stride() * element / kSize};
  const RowBlock block(columns, kGatherRows);
  gather_rows_kernel<Unit><<<block.blocks(R), block.threads, 0, stream>>>(
      x, static_cast<int>(x_XD.size(0)), index, R, static_cast<int>(columns), y);
  check_launch("gather_rows");
}

}  // namespace

void PlanningOps::sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor&, const Tensor& offsets_E1,
                                 const Tensor&, const Tensor&, const Tensor&) {
  note(SlotRuns(indices_TK.numel()).scratch_bytes(offsets_E1.numel() - 1));
}

void CudaOps::sort_by_expert(Stream& stream, const Tensor& indices_TK, const Tensor& weights_TK,
                             const Tensor& offsets_E1, const Tensor& token_of_row_R, const Tensor& row_of_slot_TK,
                             const Tensor& row_weight_R) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), E = offsets_E1.numel() - 1;
  const int64_t R = token_of_row_R.numel();
  expect(indices_TK, "sort_by_expert: indices_TK", DType::i32, {T, K});
  expect(weights_TK, "sort_by_expert: weights_TK", DType::f32, {T, K});
  expect(offsets_E1, "sort_by_expert: offsets_E1", DType::i32, {E + 1});
  expect(token_of_row_R, "sort_by_expert: token_of_row_R", DType::i32, {R});
  expect(row_of_slot_TK, "sort_by_expert: row_of_slot_TK", DType::i32, {T, K});
  expect(row_weight_R, "sort_by_expert: row_weight_R", DType::f32, {R});
  DSTRAIN_CHECK(E >= 1 && E <= kMostSortedExperts,
                "sort_by_expert: " + std::to_string(E) + " experts; the CUDA back end sorts by 1 to " +
                    std::to_string(kMostSortedExperts));
  DSTRAIN_CHECK(R <= INT32_MAX / 2, "sort_by_expert: more rows than an i32 can number");
  const SlotRuns runs(T * K);
  auto* const counts = static_cast<int32_t*>(cuda_stream(stream).scratch(runs.scratch_bytes(E)));
  const auto experts = static_cast<int>(E);
  const auto row_bytes = static_cast<size_t>(E) * sizeof(int32_t);
  count_runs_kernel<<<runs.count, 512, row_bytes, cuda(stream)>>>(pointer<const int32_t>(indices_TK), runs, experts,
                                                                  counts);
  check_launch("sort_by_expert");
  const int warps = sort_warps(E);
  deal_rows_kernel<<<runs.count, 32 * warps, (2 + warps) * row_bytes + sizeof(int32_t), cuda(stream)>>>(
      pointer<const int32_t>(indices_TK), pointer<const float>(weights_TK), counts, runs, experts,
      static_cast<int>(K), pointer<int32_t>(offsets_E1), pointer<int32_t>(token_of_row_R),
      pointer<int32_t>(row_of_slot_TK), pointer<float>(row_weight_R), static_cast<int>(R));
  check_launch("sort_by_expert");
}

void CudaOps::combine_rows(Stream& stream, const Tensor& y_RD, const Tensor& row_of_slot_TK, const Tensor& addend_TD,
                           const Tensor& out_TD) {
  const DType dtype = out_TD.dtype();
  const int64_t T = out_TD.size(0), D = out_TD.size(1), R = y_RD.size(0), K = row_of_slot_TK.size(1);
  expect_strided(y_RD, "combine_rows: y_RD", dtype, {R, D});
  expect_strided(row_of_slot_TK, "combine_rows: row_of_slot_TK", DType::i32, {T, K});
  if (addend_TD.defined()) expect_strided(addend_TD, "combine_rows: addend_TD", dtype, {T, D});
  DSTRAIN_CHECK(R <= INT32_MAX && D <= INT32_MAX, "combine_rows: y_RD is " + y_RD.describe() + ", which is too large");
  if (T == 0 || D == 0) return;
  dispatch_f(dtype, "combine_rows", [&]<class F>() {
    const auto fits = [D](const Tensor& x) { return !x.defined() || fits_vectors<F>(x.raw(), D, x.row_stride()); };
    const auto launch = [&]<class V>() {
      const int64_t columns = D / V::kSize;
      const RowBlock block(columns, 1);
      combine_rows_kernel<V, F><<<block.blocks(T), block.threads, 0, cuda(stream)>>>(
          rows_of<const F>(y_RD), static_cast<int>(R), rows_of<const int32_t>(row_of_slot_TK), static_cast<int>(K),
          rows_of<const F>(addend_TD), T, static_cast<int>(columns), rows_of<F>(out_TD));
    };
    if (fits(y_RD) && fits(addend_TD) && fits(out_TD))
      launch.template operator()<Vec<F>>();
    else
      launch.template operator()<One<F>>();
  });
  check_launch("combine_rows");
}

void CudaOps::gather_rows(Stream& stream, const Tensor& x_XD, const Tensor& index_R, const Tensor& y_RD) {
  const int64_t R = index_R.numel(), D = x_XD.row_numel();
  expect(index_R, "gather_rows: index_R", DType::i32, {R});
  DSTRAIN_CHECK(y_RD.dtype() == x_XD.dtype() && y_RD.size(0) == R && y_RD.row_numel() == D,
                "gather_rows: x_XD is " + x_XD.describe() + " and y_RD " + y_RD.describe());
  DSTRAIN_CHECK(x_XD.size(0) <= INT32_MAX && D <= INT32_MAX,
                "gather_rows: x_XD is " + x_XD.describe() + ", which is too large");
  if (R == 0 || D == 0) return;
  const int64_t element = dtype_bytes(x_XD.dtype()), row_bytes = D * element;
  const auto* const index = pointer<const int32_t>(index_R);
  // The widest unit that addresses, rows and strides are multiples of.
  const uint64_t bits = reinterpret_cast<uintptr_t>(x_XD.raw()) | reinterpret_cast<uintptr_t>(y_RD.raw()) |
                        static_cast<uint64_t>(row_bytes | x_XD.row_stride() * element | y_RD.row_stride() * element);
  if (bits % 16 == 0) return gather_units<uint4>(x_XD, index, row_bytes, y_RD, cuda(stream));
  if (bits % 8 == 0) return gather_units<uint2>(x_XD, index, row_bytes, y_RD, cuda(stream));
  if (bits % 4 == 0) return gather_units<uint32_t>(x_XD, index, row_bytes, y_RD, cuda(stream));
  if (bits % 2 == 0) return gather_units<uint16_t>(x_XD, index, row_bytes, y_RD, cuda(stream));
  gather_units<uint8_t>(x_XD, index, row_bytes, y_RD, cuda(stream));
}

}  // namespace dstrain
