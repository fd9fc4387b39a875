// A pass puts tokens in the order of a digit. Tokens are cut into runs, by their number only; the
// counts of each run's digits are there before the pass, so that a block knows where its tokens of
// each digit begin. What it moves it counts for the next pass, by the run where it comes to stand.
#include "cuda/token_sort.h"

#include <bit>

#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 512;  // of a block; a thread for each digit
constexpr int kWarps = kThreads / 32;
constexpr int kMostDigitBits = 9;
constexpr int kMostRuns = 64;
constexpr unsigned kAllLanes = 0xffffffffu;
static_assert(1 << kMostDigitBits == kThreads, "a digit without a thread");

// One digit of the keys: its counts by runs are [runs, digits].
struct Digit {
  int32_t* counts;
  int shift, bits;

  __device__ __forceinline__ int of(uint32_t key) const {
    return static_cast<int>(key >> shift & ((1u << bits) - 1));
  }
  __device__ __forceinline__ int32_t* of_run(int run) const { return counts + (run << bits); }
};

// Keys, the counts of the first digit, and zeros for those of the digits after it.
__global__ void __launch_bounds__(kThreads)
    number_tokens_kernel(const int32_t* __restrict__ tokens_T, int64_t vocab_begin, int V, int T,
                         int run_length, Digit first, int later_digits, uint32_t* keys_T,
                         uint8_t* used_V) {
  __shared__ int32_t counts[kThreads];
  const int run = blockIdx.x, begin = run * run_length, end = min(begin + run_length, T);
  counts[threadIdx.x] = 0;
  __syncthreads();
  for (int t = begin + threadIdx.x; t < end; t += kThreads) {
    const int64_t v = tokens_T[t] - vocab_begin;
    const bool is_here = v >= 0 && v < V;
    const auto key = static_cast<uint32_t>(is_here ? v : V);
    keys_T[t] = key;
    if (is_here && used_V) used_V[v] = 1;
    atomicAdd(&counts[first.of(key)], 1);
  }
  __syncthreads();
  if (threadIdx.x >> first.bits) return;
  first.of_run(run)[threadIdx.x] = counts[threadIdx.x];
  for (int later = 1; later <= later_digits; ++later)
    first.of_run(later * static_cast<int>(gridDim.x) + run)[threadIdx.x] = 0;
}

// The sum of x over the threads before this one; warp_sums holds kWarps values.
__device__ __forceinline__ int sum_before(int x, int32_t* warp_sums) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int sum = x;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int before = __shfl_up_sync(kAllLanes, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == 31) warp_sums[warp] = sum;
  __syncthreads();
  int result = sum - x;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) result += w < warp ? warp_sums[w] : 0;
  return result;
}

struct Tokens {
  uint32_t* keys_T;
  int32_t* positions_T;  // null: in order
};

// Lanes of a warp whose tokens have the same digit; lanes without a token pass -1.
struct SameDigit {
  unsigned lanes;
  __device__ __forceinline__ explicit SameDigit(int digit)
      : lanes(__match_any_sync(kAllLanes, digit)) {}
  __device__ __forceinline__ int count() const { return __popc(lanes); }
  __device__ __forceinline__ int before() const {
    return __popc(lanes & ((1u << threadIdx.x % 32) - 1u));
  }
};

// next.counts is null in the last pass.
__global__ void __launch_bounds__(kThreads)
    move_tokens_kernel(Tokens from, Tokens to, int T, int run_length, Digit digit, Digit next) {
  __shared__ int32_t next_row[kWarps][kThreads];  // of a warp and a digit
  __shared__ int32_t warp_sums[kWarps];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, run = blockIdx.x;
  const int runs = static_cast<int>(gridDim.x), own_digit = threadIdx.x;
  int all = 0, before = 0;  // tokens of this thread's digit
  if (own_digit >> digit.bits == 0) {
#pragma unroll 16
    for (int r = 0; r < runs; ++r) {
      const int count = digit.of_run(r)[own_digit];
      all += count;
      before += r < run ? count : 0;
    }
  }
#pragma unroll
  for (int w = 0; w < kWarps; ++w) next_row[w][own_digit] = 0;
  __syncthreads();

  // Each warp has a part of the run.
  const int part = run_length / kWarps, begin = run * run_length + warp * part;
  const int end = min(begin + part, T);
  for (int first = begin; first < end; first += 32) {
    const int own = first + lane < end ? digit.of(from.keys_T[first + lane]) : -1;
    const SameDigit same(own);
    if (own >= 0 && same.before() == 0) next_row[warp][own] += same.count();
    __syncwarp();
  }
  int row = before + sum_before(all, warp_sums);  // its barrier ends the counting, too
#pragma unroll
  for (int w = 0; w < kWarps; ++w) {
    const int count = next_row[w][own_digit];
    next_row[w][own_digit] = row;
    row += count;
  }
  __syncthreads();

  for (int first = begin; first < end; first += 32) {
    const int i = first + lane;
    const uint32_t key = i < end ? from.keys_T[i] : 0u;
    const int own = i < end ? digit.of(key) : -1;
    const SameDigit same(own);
    const int place = i < end ? next_row[warp][own] + same.before() : 0;
    __syncwarp();
    if (own >= 0 && same.before() == 0) next_row[warp][own] += same.count();
    __syncwarp();
    if (own < 0) continue;
    to.keys_T[place] = key;
    to.positions_T[place] = from.positions_T ? from.positions_T[i] : i;
    if (next.counts) atomicAdd(next.of_run(place / run_length) + next.of(key), 1);
  }
}

}  // namespace

TokenSort::TokenSort(int64_t T, int64_t V) {
  DSTRAIN_CHECK(T < int64_t{1} << 30 && V < INT32_MAX, "embedding_backward: 2^30 tokens or more");
  tokens_ = static_cast<int>(T);
  rows_ = static_cast<int>(V);
  const int bits = std::max(1, static_cast<int>(std::bit_width(static_cast<uint64_t>(V))));
  passes_ = static_cast<int>(ceil_div(bits, kMostDigitBits));
  digit_bits_ = static_cast<int>(ceil_div(bits, passes_));
  run_length_ =
      static_cast<int>(kThreads * std::max<int64_t>(1, ceil_div(T, int64_t{kMostRuns} * kThreads)));
  runs_ = static_cast<int>(ceil_div(T, run_length_));
}

int64_t TokenSort::scratch_bytes() const {
  return 4 * ScratchPieces::padded(int64_t{4} * tokens_) +
         ScratchPieces::padded(int64_t{4} * passes_ * (int64_t{runs_} << digit_bits_));
}

TokenSort::Sorted TokenSort::run(Stream& stream, ScratchPieces& scratch, const int32_t* tokens_T,
                                 int64_t vocab_begin, uint8_t* used_V) const {
  const auto take = [&] {
    return Tokens{scratch.take<uint32_t>(tokens_), scratch.take<int32_t>(tokens_)};
  };
  Tokens from = take(), to = take();
  const int64_t counts_of_digit = int64_t{runs_} << digit_bits_;
  auto* const counts = scratch.take<int32_t>(passes_ * counts_of_digit);
  const auto digit = [&](int pass) {
    return Digit{pass < passes_ ? counts + pass * counts_of_digit : nullptr, pass * digit_bits_,
                 digit_bits_};
  };
  const auto blocks = static_cast<unsigned>(runs_);
  number_tokens_kernel<<<blocks, kThreads, 0, cuda(stream)>>>(tokens_T, vocab_begin, rows_, tokens_,
                                                              run_length_, digit(0), passes_ - 1,
                                                              from.keys_T, used_V);
  check_launch("embedding_backward: numbers of tokens");
  for (int pass = 0; pass < passes_; ++pass) {
    const Tokens source{from.keys_T, pass > 0 ? from.positions_T : nullptr};
    move_tokens_kernel<<<blocks, kThreads, 0, cuda(stream)>>>(source, to, tokens_, run_length_,
                                                              digit(pass), digit(pass + 1));
    check_launch("embedding_backward: sorting tokens");
    std::swap(from, to);
  }
  return {from.keys_T, from.positions_T};
}

}  // namespace dstrain
