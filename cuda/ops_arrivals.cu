// The order of rows that arrive at a rank of expert parallelism (core/backend/ops.h). N sources, L
// experts here, M = N L entries: the rows from one source for one expert, which arrive in the order
// of the entries. A block has one expert.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/scan.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kMostEntries = 8192;

struct Arrivals {
  const int64_t* counts_NE;
  int N, E, L, first_expert, C;
  int64_t begin;  // the number of the round's first row
  int32_t *order_C, *arrival_C, *offsets_L1;
};

__global__ void __launch_bounds__(kThreads) arrange_arrivals_kernel(const Arrivals a) {
  extern __shared__ int64_t number[];  // [M + 1] of each entry's first row, over all rounds
  __shared__ int before;               // rows of this round for the experts before this one
  const int own = blockIdx.x, M = a.N * a.L;
  for (int j = threadIdx.x; j <= M; j += kThreads)
    number[j] = j < M ? a.counts_NE[j / a.L * a.E + a.first_expert + j % a.L] : 0;
  if (threadIdx.x == 0) before = 0;
  __syncthreads();
  if (threadIdx.x < 32) exclusive_scan(number, M + 1);
  __syncthreads();
  const auto place = [&](int j) {  // in what arrives in this round
    return static_cast<int>(min(max(number[j] - a.begin, int64_t{0}), int64_t{a.C}));
  };
  int rows = 0;
  for (int j = threadIdx.x; j < M; j += kThreads)
    if (j % a.L < own) rows += place(j + 1) - place(j);
  rows = __reduce_add_sync(0xffffffffu, rows);
  if (threadIdx.x % 32 == 0) atomicAdd(&before, rows);
  __syncthreads();

  int row = before;
  if (threadIdx.x == 0) a.offsets_L1[own] = row;
  for (int source = 0; source < a.N; ++source) {
    const int first = place(source * a.L + own), count = place(source * a.L + own + 1) - first;
    for (int k = threadIdx.x; k < count; k += kThreads) {
      if (a.order_C) a.order_C[row + k] = first + k;
      if (a.arrival_C) a.arrival_C[first + k] = row + k;
    }
    row += count;
  }
  if (own + 1 < a.L) return;
  if (threadIdx.x == 0) a.offsets_L1[a.L] = row;
  for (int r = row + threadIdx.x; r < a.C; r += kThreads) {
    if (a.order_C) a.order_C[r] = 0;
    if (a.arrival_C) a.arrival_C[r] = 0;
  }
}

}  // namespace

void CudaOps::arrange_arrivals(Stream& stream, const Tensor& counts_NE, int64_t first_expert,
                               int64_t round, const Tensor& order_C, const Tensor& arrival_C,
                               const Tensor& offsets_L1) {
  const int64_t N = counts_NE.size(0), E = counts_NE.size(1), L = offsets_L1.numel() - 1;
  const Tensor& any = order_C.defined() ? order_C : arrival_C;
  DSTRAIN_CHECK(any.defined(), "arrange_arrivals: nothing is asked for");
  const int64_t C = any.numel();
  expect(counts_NE, "arrange_arrivals: counts_NE", DType::i64, {N, E});
  expect(offsets_L1, "arrange_arrivals: offsets_L1", DType::i32, {L + 1});
  for (const Tensor* x : {&order_C, &arrival_C})
    if (x->defined()) expect(*x, "arrange_arrivals: order_C or arrival_C", DType::i32, {C});
  DSTRAIN_CHECK(L > 0 && first_expert >= 0 && first_expert + L <= E,
                "arrange_arrivals: no such experts");
  DSTRAIN_CHECK(N * L <= kMostEntries - 1 && C <= INT32_MAX,
                "arrange_arrivals: more sources, experts or rows than its kernel numbers");
  const Arrivals a{.counts_NE = pointer<const int64_t>(counts_NE),
                   .N = static_cast<int>(N),
                   .E = static_cast<int>(E),
                   .L = static_cast<int>(L),
                   .first_expert = static_cast<int>(first_expert),
                   .C = static_cast<int>(C),
                   .begin = round * C,
                   .order_C = pointer<int32_t>(order_C),
                   .arrival_C = pointer<int32_t>(arrival_C),
                   .offsets_L1 = pointer<int32_t>(offsets_L1)};
  constexpr auto kMostShared = static_cast<int>(kMostEntries * sizeof(int64_t));
  check_cuda(cudaFuncSetAttribute(arrange_arrivals_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kMostShared),
             "preparing arrange_arrivals");
  const auto shared = static_cast<size_t>(N * L + 1) * sizeof(int64_t);
  arrange_arrivals_kernel<<<static_cast<unsigned>(L), kThreads, shared, cuda(stream)>>>(a);
  check_launch("arrange_arrivals");
}

}  // namespace dstrain
