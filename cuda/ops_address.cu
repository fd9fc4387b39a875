// Which tokens go to which rank of expert parallelism, and as what rows (core/backend/ops.h). N
// ranks, K choices per token, L experts on a rank, Z rows that this rank sends.
//
// Two launches. A block has a run of tokens, of which each warp looks at one rank after the other:
// in the first it counts the run's choices and tokens for the rank; in the second it adds up those
// of the runs before its own, and numbers the run's tokens.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/rows.cuh"
#include "cuda/scan.cuh"

namespace dstrain {
namespace {

constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kRun = 256;  // tokens
constexpr int kMostRanks = 2048;

struct Choices {
  const int32_t* indices_TK;
  int T, K, N, L;

  // How many of a token's choices are experts of a rank.
  __device__ __forceinline__ int of_rank(int token, int rank) const {
    int count = 0;
    for (int k = 0; k < K; ++k) count += is_of_rank(token, k, rank);
    return count;
  }
  __device__ __forceinline__ bool is_of_rank(int token, int k, int rank) const {
    const int expert = checked_index(indices_TK[int64_t{token} * K + k], N * L);
    return expert >= rank * L && expert < (rank + 1) * L;
  }
};

struct RunCount {
  int choices, tokens;
};

__global__ void __launch_bounds__(kThreads) count_run_kernel(Choices c, RunCount* counts) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x * kRun;
  for (int rank = warp; rank < c.N; rank += kWarps) {
    RunCount sum{};
    for (int first = begin; first < begin + kRun; first += 32) {
      const int token = first + lane, own = token < c.T ? c.of_rank(token, rank) : 0;
      sum.choices += __reduce_add_sync(kAllLanes, own);
      sum.tokens += __popc(__ballot_sync(kAllLanes, own > 0));
    }
    if (lane == 0) counts[int64_t{blockIdx.x} * c.N + rank] = sum;
  }
}

__device__ __forceinline__ int64_t sum_of_warp(int64_t x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

struct Round {
  const int64_t* counts_NX;
  int rank, Z;
  int64_t begin, end;  // numbers of the choices whose tokens it carries

  __device__ __forceinline__ int64_t inside(int64_t number) const {
    return min(max(number, begin), end);
  }
};

struct Addresses {
  int32_t *token_of_row_Z, *row_of_token_TN, *choices_ZK;
};

__global__ void __launch_bounds__(kThreads)
    address_run_kernel(Choices c, Round round, const RunCount* counts, Addresses out) {
  extern __shared__ int64_t first_choice_N[];  // number of this rank's first choice for a rank
  int* const rows_N = reinterpret_cast<int*>(first_choice_N + c.N);
  int* const first_row_N = rows_N + c.N;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, begin = blockIdx.x * kRun;
  const int64_t X = int64_t{c.N} * c.L + c.N;
  for (int to = warp; to < c.N; to += kWarps) {
    int64_t before = 0, own = 0;  // choices of earlier ranks, of this one
    for (int64_t j = lane; j < int64_t{round.rank + 1} * c.L; j += 32) {
      const int64_t source = j / c.L;
      const int64_t count = round.counts_NX[source * X + int64_t{to} * c.L + j % c.L];
      (source == round.rank ? own : before) += count;
    }
    before = sum_of_warp(before);
    own = sum_of_warp(own);
    if (lane > 0) continue;
    const int64_t carried = round.inside(before + own) - round.inside(before);
    const int64_t tokens = round.counts_NX[round.rank * X + int64_t{c.N} * c.L + to];
    first_choice_N[to] = before;
    rows_N[to] = first_row_N[to] = static_cast<int>(min(carried, tokens));
  }
  __syncthreads();
  if (warp == 0) exclusive_scan(first_row_N, c.N);
  __syncthreads();

  for (int to = warp; to < c.N; to += kWarps) {
    int choices_before = 0, tokens_before = 0;
    for (int run = lane; run < static_cast<int>(blockIdx.x); run += 32) {
      const RunCount count = counts[int64_t{run} * c.N + to];
      choices_before += count.choices;
      tokens_before += count.tokens;
    }
    int64_t number = first_choice_N[to] + __reduce_add_sync(kAllLanes, choices_before);
    int nth = __reduce_add_sync(kAllLanes, tokens_before);
    for (int first = begin; first < min(begin + kRun, c.T); first += 32) {
      const int token = first + lane, own = token < c.T ? c.of_rank(token, to) : 0;
      int until = own;  // choices up to and with this token's
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(kAllLanes, until, step);
        if (lane >= step) until += other;
      }
      const unsigned with = __ballot_sync(kAllLanes, own > 0);
      const int64_t own_number = number + until - own;
      const bool carried = own > 0 && own_number >= round.begin && own_number < round.end;
      int row = -1;
      if (carried) {
        const int own_nth = nth + __popc(with & ((1u << lane) - 1u));
        row = checked_index(first_row_N[to] + own_nth % max(rows_N[to], 1), round.Z);
        out.token_of_row_Z[row] = token;
        for (int k = 0; k < c.K; ++k)
          if (c.is_of_rank(token, k, to))
            out.choices_ZK[int64_t{row} * c.K + k] =
                c.indices_TK[int64_t{token} * c.K + k] - to * c.L;
      }
      if (token < c.T) out.row_of_token_TN[int64_t{token} * c.N + to] = row;
      number += __shfl_sync(kAllLanes, until, 31);
      nth += __popc(with);
    }
  }
}

// A thread has a token.
__global__ void __launch_bounds__(kThreads)
    count_tokens_kernel(Choices c, unsigned long long* tokens_N) {
  extern __shared__ int tokens[];  // [N]
  for (int rank = threadIdx.x; rank < c.N; rank += kThreads) tokens[rank] = 0;
  __syncthreads();
  const int token = blockIdx.x * kThreads + threadIdx.x;
  for (int k = 0; token < c.T && k < c.K; ++k) {
    const int rank = checked_index(c.indices_TK[int64_t{token} * c.K + k], c.N * c.L) / c.L;
    bool first = true;
    for (int earlier = 0; earlier < k; ++earlier) first &= !c.is_of_rank(token, earlier, rank);
    if (first) atomicAdd(&tokens[rank], 1);
  }
  __syncthreads();
  for (int rank = threadIdx.x; rank < c.N; rank += kThreads)
    if (tokens[rank] > 0) atomicAdd(&tokens_N[rank], static_cast<unsigned long long>(tokens[rank]));
}

Choices choices_of(const Tensor& indices_TK, int64_t N, int64_t L) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1);
  expect(indices_TK, "tokens by rank: indices_TK", DType::i32, {T, K});
  DSTRAIN_CHECK(N > 0 && L > 0 && N <= kMostRanks && N * L <= INT32_MAX / 2 &&
                    T * std::max(K, N) <= INT32_MAX - kRun,
                "tokens by rank: more tokens, ranks or experts than the kernels number");
  return {.indices_TK = pointer<const int32_t>(indices_TK),
          .T = static_cast<int>(T),
          .K = static_cast<int>(K),
          .N = static_cast<int>(N),
          .L = static_cast<int>(L)};
}

}  // namespace

void CudaOps::count_tokens_by_rank(Stream& stream, const Tensor& indices_TK,
                                   int64_t experts_per_rank, const Tensor& tokens_N) {
  const int64_t N = tokens_N.numel(), T = indices_TK.size(0);
  expect(tokens_N, "count_tokens_by_rank: tokens_N", DType::i64, {N});
  const Choices c = choices_of(indices_TK, N, experts_per_rank);
  if (T == 0) return;
  count_tokens_kernel<<<static_cast<unsigned>(ceil_div(T, kThreads)), kThreads,
                        static_cast<size_t>(N) * sizeof(int), cuda(stream)>>>(
      c, pointer<unsigned long long>(tokens_N));
  check_launch("count_tokens_by_rank");
}

void CudaOps::address_tokens(Stream& stream, const Tensor& indices_TK, const Tensor& counts_NX,
                             int64_t rank, int64_t round, int64_t window,
                             const Tensor& token_of_row_Z, const Tensor& row_of_token_TN,
                             const Tensor& choices_ZK) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), N = counts_NX.size(0);
  const int64_t E = counts_NX.size(1) - N, Z = token_of_row_Z.numel();
  expect(counts_NX, "address_tokens: counts_NX", DType::i64, {N, E + N});
  expect(token_of_row_Z, "address_tokens: token_of_row_Z", DType::i32, {Z});
  expect(row_of_token_TN, "address_tokens: row_of_token_TN", DType::i32, {T, N});
  expect(choices_ZK, "address_tokens: choices_ZK", DType::i32, {Z, K});
  DSTRAIN_CHECK(rank >= 0 && rank < N && E % N == 0 && Z * K <= INT32_MAX,
                "address_tokens: no such ranks, or more rows than its kernel numbers");
  const Choices c = choices_of(indices_TK, N, E / N);
  for (const Tensor* x : {&token_of_row_Z, &choices_ZK})  // -1 is all bits
    check_cuda(cudaMemsetAsync(x->raw(), 0xff, static_cast<size_t>(x->bytes()), cuda(stream)),
               "address_tokens");
  if (T == 0) return;
  const int64_t runs = ceil_div(T, kRun);
  const int64_t bytes = runs * N * static_cast<int64_t>(sizeof(RunCount));
  auto* const counts =
      ScratchPieces(stream, ScratchPieces::padded(bytes)).take<RunCount>(runs * N);
  const auto blocks = static_cast<unsigned>(runs);
  count_run_kernel<<<blocks, kThreads, 0, cuda(stream)>>>(c, counts);
  check_launch("address_tokens");
  const Round of{.counts_NX = pointer<const int64_t>(counts_NX),
                 .rank = static_cast<int>(rank),
                 .Z = static_cast<int>(Z),
                 .begin = round * window,
                 .end = (round + 1) * window};
  const auto shared = static_cast<size_t>(N) * (sizeof(int64_t) + 2 * sizeof(int));
  address_run_kernel<<<blocks, kThreads, shared, cuda(stream)>>>(
      c, of, counts,
      {pointer<int32_t>(token_of_row_Z), pointer<int32_t>(row_of_token_TN),
       pointer<int32_t>(choices_ZK)});
  check_launch("address_tokens");
}

}  // namespace dstrain
