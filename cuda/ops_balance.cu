// Load balance of experts: the statistics and the loss of a sequence, counts of choices, and the bias that steers
// them; the formulas are in core/backend/cpu_ops_balance.cpp. T tokens in S sequences, E <= 512 experts, K experts
// per token. The cut into chunks of tokens depends on shapes only, and so does the order of every sum of floats.
#include "core/backend/expect.h"
#include "core/backend/routing.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"

namespace dstrain {
namespace {

constexpr int kWarps = 8;        // of a block that reads scores
constexpr int kSumThreads = 32;  // squared: of a block that adds partial results

// One chunk of one sequence: its loads, then its probabilities, E of each.
template <int kPerLane>
__global__ void __launch_bounds__(32 * kWarps)
    balance_statistics_kernel(Rows<const float> scores_TE, Rows<const int32_t> indices_TK, int E, int K, int64_t T,
                              RowsOfSequences rows, int64_t rows_per_chunk, int64_t chunks, float* partials) {
  __shared__ int32_t load[32 * kPerLane];
  __shared__ float prob[kWarps][32 * kPerLane];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t sequence = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  const int64_t first = sequence * rows.rows_per_sequence - rows.first_row;  // token of the sequence's first row
  const int64_t begin = max(first + chunk * rows_per_chunk, int64_t{0});
  const int64_t end =
      min(first + min((chunk + 1) * rows_per_chunk, rows.rows_per_sequence), T);
  for (int e = threadIdx.x; e < 32 * kPerLane; e += blockDim.x) load[e] = 0;
  __syncthreads();

  float sums[kPerLane] = {};
#pragma unroll 2
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    float scores[kPerLane], sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const int e = 32 * j + lane;
      scores[j] = e < E ? scores_TE[t][e] : 0.0f;
      sum += scores[j];
    }
    const float inverse = 1.0f / (warp_sum(sum) + static_cast<float>(kTinyScore));
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) sums[j] += scores[j] * inverse;
  }
  for (int64_t t = begin + warp; t < end; t += kWarps) {
    for (int k = lane; k < K; k += 32) atomicAdd(&load[checked_index(indices_TK[t][k], E)], 1);
  }
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) prob[warp][32 * j + lane] = sums[j];
  __syncthreads();
  float* const partial = partials + int64_t{blockIdx.x} * 2 * E;
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    float sum = 0.0f;
    for (int w = 0; w < kWarps; ++w) sum += prob[w][e];
    partial[e] = static_cast<float>(load[e]);
    partial[E + e] = sum;
  }
}

// Sums over the chunks of a sequence. Threads of one x have a column, those of one y every 32nd chunk.
__global__ void __launch_bounds__(kSumThreads * kSumThreads)
    sum_chunks_kernel(const float* partials, int64_t chunks, int E, float* load_SE, float* prob_SE) {
  __shared__ float sums[kSumThreads][kSumThreads + 1];
  const int64_t sequence = blockIdx.x;
  const int column = blockIdx.y * kSumThreads + threadIdx.x;
  float sum = 0.0f;
  if (column < 2 * E) {
    for (int64_t chunk = threadIdx.y; chunk < chunks; chunk += kSumThreads)
      sum += partials[(sequence * chunks + chunk) * 2 * E + column];
  }
  sums[threadIdx.y][threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y > 0 || column >= 2 * E) return;
  float total = 0.0f;
  for (int y = 0; y < kSumThreads; ++y) total += sums[y][threadIdx.x];
  if (column < E)
    load_SE[sequence * E + column] = total;
  else
    prob_SE[sequence * E + column - E] = total;
}

__global__ void __launch_bounds__(1024)
    balance_loss_kernel(const float* load_SE, const float* prob_SE, int64_t count, double n, double load_scale,
                        double alpha, double* loss_1, float* coeff_SE) {
  __shared__ double shared[32];
  double loss = 0;
  for (int64_t i = threadIdx.x; i < count; i += blockDim.x) {
    const double coeff = alpha * load_scale * static_cast<double>(load_SE[i]) / n;
    coeff_SE[i] = static_cast<float>(coeff);
    loss += coeff * static_cast<double>(prob_SE[i]);
  }
  loss = block_sum(loss, shared);
  if (threadIdx.x == 0) *loss_1 += loss;
}

// Counts are integers: the order in which atomics add them does not show.
__global__ void __launch_bounds__(256)
    count_experts_kernel(const int32_t* indices, int64_t count, int E, unsigned long long* counts_E) {
  extern __shared__ int32_t counts[];
  for (int e = threadIdx.x; e < E; e += blockDim.x) counts[e] = 0;
  __syncthreads();
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 4
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < count; i += step)
    atomicAdd(&counts[checked_index(indices[i], E)], 1);
  __syncthreads();
  for (int e = threadIdx.x; e < E; e += blockDim.x)
    if (counts[e] > 0) atomicAdd(&counts_E[e], static_cast<unsigned long long>(counts[e]));
}

// One warp.
__global__ void router_bias_update_kernel(const int64_t* counts_E, double speed, const StepScalars* scalars, int E,
                                          float* bias_E) {
  if (!scalars->finite) return;
  long long total = 0;
  for (int e = threadIdx.x; e < E; e += 32) total += counts_E[e];
  for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
  for (int e = threadIdx.x; e < E; e += 32) {
    const long long above_mean = counts_E[e] * E - total;  // exact, as a mean would not be
    const int sign = above_mean < 0 ? 1 : above_mean > 0 ? -1 : 0;
    bias_E[e] += static_cast<float>(speed * sign);
  }
}

// Tokens of a chunk: 64, or more where partial results would fill the scratch that there always is.
int64_t balance_rows_per_chunk(int64_t S, int64_t n, int64_t E) {
  constexpr int64_t kMostBytes = int64_t{32} << 20;
  int64_t rows = 64;
  while (rows < n && S * ceil_div(n, rows) * 2 * E * 4 > kMostBytes) rows *= 2;
  return rows;
}

}  // namespace

void CudaOps::balance_statistics(Stream& stream, const Tensor& scores_TE, const Tensor& indices_TK,
                                 const RowsOfSequences& rows, const Tensor& load_SE, const Tensor& prob_SE) {
  const int64_t T = scores_TE.size(0), E = scores_TE.size(1), S = load_SE.size(0), K = indices_TK.size(1);
  expect_strided(scores_TE, "balance_statistics: scores_TE", DType::f32, {T, E});
  expect_strided(indices_TK, "balance_statistics: indices_TK", DType::i32, {T, K});
  expect(load_SE, "balance_statistics: load_SE", DType::f32, {S, E});
  expect(prob_SE, "balance_statistics: prob_SE", DType::f32, {S, E});
  if (S == 0) return;
  expect_rows(rows, T, S, "balance_statistics");
  DSTRAIN_CHECK(E <= 512, "balance_statistics: " + std::to_string(E) + " experts; the CUDA back end has at most 512");
  const int64_t rows_per_chunk = balance_rows_per_chunk(S, rows.rows_per_sequence, E);
  const int64_t chunks = ceil_div(rows.rows_per_sequence, rows_per_chunk);
  const int64_t sums = S * chunks * 2 * E;
  auto* const partials = ScratchPieces(stream, ScratchPieces::padded(4 * sums)).take<float>(sums);
  const auto launch = [&]<int kPerLane>() {
    balance_statistics_kernel<kPerLane><<<static_cast<unsigned>(S * chunks), 32 * kWarps, 0, cuda(stream)>>>(
        rows_of<const float>(scores_TE), rows_of<const int32_t>(indices_TK), static_cast<int>(E),
        static_cast<int>(K), T, rows, rows_per_chunk, chunks, partials);
  };
  if (E <= 64)
    launch.template operator()<2>();
  else if (E <= 256)
    launch.template operator()<8>();
  else
    launch.template operator()<16>();
  check_launch("balance_statistics");
  const dim3 grid(static_cast<unsigned>(S), static_cast<unsigned>(ceil_div(2 * E, kSumThreads)));
  sum_chunks_kernel<<<grid, dim3(kSumThreads, kSumThreads), 0, cuda(stream)>>>(
      partials, chunks, static_cast<int>(E), pointer<float>(load_SE), pointer<float>(prob_SE));
  check_launch("balance_statistics");
}

void CudaOps::balance_loss(Stream& stream, const Tensor& load_SE, const Tensor& prob_SE, int64_t tokens_per_sequence,
                           int64_t experts_per_token, double alpha, const Tensor& loss_1, const Tensor& coeff_SE) {
  const int64_t S = load_SE.size(0), E = load_SE.size(1);
  expect(load_SE, "balance_loss: load_SE", DType::f32, {S, E});
  expect(prob_SE, "balance_loss: prob_SE", DType::f32, {S, E});
  expect(loss_1, "balance_loss: loss_1", DType::f64, {1});
  expect(coeff_SE, "balance_loss: coeff_SE", DType::f32, {S, E});
  if (S == 0 || tokens_per_sequence == 0) return;
  const double n = static_cast<double>(tokens_per_sequence);
  const double load_scale = static_cast<double>(E) / (static_cast<double>(experts_per_token) * n);
  balance_loss_kernel<<<1, 1024, 0, cuda(stream)>>>(pointer<const float>(load_SE), pointer<const float>(prob_SE),
                                                    S * E, n, load_scale, alpha, pointer<double>(loss_1),
                                                    pointer<float>(coeff_SE));
  check_launch("balance_loss");
}

void CudaOps::count_experts(Stream& stream, const Tensor& indices_TK, const Tensor& counts_E) {
  const int64_t E = counts_E.numel(), count = indices_TK.numel();
  expect(counts_E, "count_experts: counts_E", DType::i64, {E});
  DSTRAIN_CHECK(indices_TK.dtype() == DType::i32 && indices_TK.contiguous(),
                "count_experts: indices_TK is " + indices_TK.describe() + " where contiguous i32 belong");
  DSTRAIN_CHECK(E <= 8192, "count_experts: " + std::to_string(E) + " experts; the CUDA back end has at most 8192");
  if (count == 0) return;
  count_experts_kernel<<<grid_for(count, 1024, device_.num_sms, 4), 256, static_cast<size_t>(E) * 4, cuda(stream)>>>(
      pointer<const int32_t>(indices_TK), count, static_cast<int>(E), pointer<unsigned long long>(counts_E));
  check_launch("count_experts");
}

void CudaOps::router_bias_update(Stream& stream, const Tensor& counts_E, double speed, const StepScalars* scalars,
                                 const Tensor& bias_E) {
  const int64_t E = counts_E.numel();
  expect(counts_E, "router_bias_update: counts_E", DType::i64, {E});
  expect(bias_E, "router_bias_update: bias_E", DType::f32, {E});
  router_bias_update_kernel<<<1, 32, 0, cuda(stream)>>>(pointer<const int64_t>(counts_E), speed, scalars,
                                                        static_cast<int>(E), pointer<float>(bias_E));
  check_launch("router_bias_update");
}

}  // namespace dstrain
