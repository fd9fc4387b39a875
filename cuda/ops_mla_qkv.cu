// Queries, keys and values of multi-head latent attention and their gradients (formulas:
// core/backend/cpu_ops_rope.cpp). T tokens, H heads, Q width of a query/key head, P rotated width,
// N = Q - P, W width of a value head. Bound by memory: every element is moved once, and of queries
// only the rotated part.
#include "cuda/cuda_ops.h"
#include "cuda/rotary.cuh"

namespace dstrain {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kBatch = 4;  // packs of keys and values that a thread has under way

// q, k, v are the outputs of mla_qkv or the gradients that come in; kv and k_rope the other way
// round.
template <class F>
struct Mla {
  Rotation rope;
  F* q;  // null: none
  F* k;
  F* v;
  F* kv;
  F* k_rope;
  int64_t q_stride, k_stride, v_stride, kv_stride, k_rope_stride;
  int64_t tokens;
  unsigned H, Q, N, W;
};

// Keys without position and values on their way from kv to k and v, or back: the packs first,
// first + blockDim.x, ... of a token, of `count`.
template <class F, int kSize, bool kBackward>
struct Moves {
  Pack<F, kSize> packs[kBatch];
  F* to[kBatch];

  __device__ __forceinline__ void load(const Mla<F>& m, int64_t t, unsigned first, unsigned count) {
    const unsigned width = m.N + m.W;
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i) {
      const unsigned element = (first + i * blockDim.x) * kSize;
      to[i] = nullptr;
      if (first + i * blockDim.x >= count) continue;
      const unsigned h = element / width, at = element % width;
      F* const joined = m.kv + t * m.kv_stride + element;
      F* const split = at < m.N ? m.k + t * m.k_stride + h * m.Q + at
                                : m.v + t * m.v_stride + h * m.W + (at - m.N);
      packs[i] = Pack<F, kSize>::load(kBackward ? split : joined);
      to[i] = kBackward ? joined : split;
    }
  }
  __device__ __forceinline__ void store() const {
#pragma unroll
    for (unsigned i = 0; i < kBatch; ++i)
      if (to[i]) packs[i].store(to[i]);
  }
};

// Rounds of a token's threads, in each of which one has kBatch moves and one pair of packs to turn.
__device__ __forceinline__ unsigned rounds(unsigned moves, unsigned turns) {
  const unsigned batch = kBatch * blockDim.x;
  return max((moves + batch - 1) / batch, (turns + blockDim.x - 1) / blockDim.x);
}

template <class F, int kSize>
__global__ void __launch_bounds__(kThreads) mla_qkv_kernel(const Mla<F> m) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= m.tokens) return;
  const int32_t position = m.rope.positions[t];
  const unsigned half = m.rope.half, columns = half / kSize, keys = m.H * columns;
  const unsigned moves = m.H * (m.N + m.W) / kSize, turns = m.q ? 2 * keys : keys;
  for (unsigned round = 0; round < rounds(moves, turns); ++round) {
    Moves<F, kSize, /*kBackward=*/false> moved;
    moved.load(m, t, threadIdx.x + round * kBatch * blockDim.x, moves);
    const unsigned i = threadIdx.x + round * blockDim.x;
    const bool is_key = i < keys;
    const unsigned at = is_key ? i : i - keys, h = at / columns, column = at % columns;
    F* const q = m.q + t * m.q_stride + h * m.Q + m.N;
    Pairs<F, kSize> pairs = {};
    Angles<kSize> angles = {};
    if (i < turns) {
      pairs = Pairs<F, kSize>::load(is_key ? m.k_rope + t * m.k_rope_stride : q, column, half,
                                    m.rope.interleaved);
      angles = m.rope.template angles<kSize>(position, column);
    }
    moved.store();
    if (i >= turns) continue;
    m.rope.turn(angles, pairs);
    pairs.store(is_key ? m.k + t * m.k_stride + h * m.Q + m.N : q, column, half,
                m.rope.interleaved);
  }
}

// The gradient of k_rope sums over heads: `groups` groups of threads have every groups-th head
// each, and their sums are added in order. sums: f32 [tokens of the block, groups, 2 * half].
template <class F, int kSize>
__global__ void __launch_bounds__(kThreads)
    mla_qkv_backward_kernel(const Mla<F> m, unsigned groups) {
  extern __shared__ float all_sums[];
  const unsigned half = m.rope.half, columns = half / kSize;
  const bool interleaved = m.rope.interleaved;
  float* const sums = all_sums + threadIdx.y * groups * 2 * half;
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const int32_t position = t < m.tokens ? m.rope.positions[t] : 0;
  const unsigned moves = m.H * (m.N + m.W) / kSize;
  const unsigned keys = groups * columns, turns = m.q ? keys + m.H * columns : keys;
  for (unsigned round = 0; t < m.tokens && round < rounds(moves, turns); ++round) {
    Moves<F, kSize, /*kBackward=*/true> moved;
    moved.load(m, t, threadIdx.x + round * kBatch * blockDim.x, moves);
    const unsigned i = threadIdx.x + round * blockDim.x;
    const bool is_key = i < keys;
    const unsigned at = is_key ? i : i - keys, h = at / columns, column = at % columns;
    F* const dk = m.k + t * m.k_stride + m.N;
    F* const dq = m.q + t * m.q_stride + h * m.Q + m.N;
    Pairs<F, kSize> pairs = {};
    Angles<kSize> angles = {};
    if (i < turns)
      pairs = Pairs<F, kSize>::load(is_key ? dk + h * m.Q : dq, column, half, interleaved);
    if (i < turns && !is_key) angles = m.rope.template angles<kSize>(position, column);
    moved.store();
    if (i >= turns) continue;
    if (!is_key) {
      m.rope.turn(angles, pairs);
      pairs.store(dq, column, half, interleaved);
      continue;
    }
    Pairs<float, kSize> sum = {};
    for (unsigned head = h;;) {
#pragma unroll
      for (int j = 0; j < kSize; ++j) {
        sum.low.at[j] += to_float(pairs.low.at[j]);
        sum.high.at[j] += to_float(pairs.high.at[j]);
      }
      head += groups;
      if (head >= m.H) break;
      pairs = Pairs<F, kSize>::load(dk + head * m.Q, column, half, interleaved);
    }
    float* const to = sums + h * 2 * half;
#pragma unroll
    for (int j = 0; j < kSize; ++j) {
      to[Pairs<F, kSize>::first(column, interleaved) + j] = sum.low.at[j];
      to[Pairs<F, kSize>::second(column, half, interleaved) + j] = sum.high.at[j];
    }
  }
  __syncthreads();
  if (t >= m.tokens) return;
  for (unsigned i = threadIdx.x; i < half; i += blockDim.x) {
    const unsigned a = Pairs<F, 1>::first(i, interleaved);
    const unsigned b = Pairs<F, 1>::second(i, half, interleaved);
    float sum_a = 0, sum_b = 0;
    for (unsigned g = 0; g < groups; ++g) {
      sum_a += sums[g * 2 * half + a];
      sum_b += sums[g * 2 * half + b];
    }
    const Angles<1> angles = m.rope.template angles<1>(position, i);
    m.rope.turn(sum_a, sum_b, angles.cos.at[0], angles.sin.at[0]);
    F* const k_rope = m.k_rope + t * m.k_rope_stride;
    k_rope[a] = from_float<F>(sum_a);
    k_rope[b] = from_float<F>(sum_b);
  }
}

// Blocks of kThreads threads: those of one token, each with about kBatch moves, or of several.
struct TokenGrid {
  dim3 block, grid;

  TokenGrid(int64_t tokens, int64_t moves) {
    unsigned threads = 32;
    while (threads < kThreads && kBatch * threads < moves) threads *= 2;
    block = dim3(threads, kThreads / threads);
    grid = dim3(static_cast<unsigned>(ceil_div(tokens, block.y)));
  }
};

template <class F>
Mla<F> mla(const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_THX,
           const RopeTable& rope, const Tensor& positions_T, float sign, const Tensor& k_THQ,
           const Tensor& v_THW) {
  const int64_t P = 2 * rope.cos_PR.size(1);
  return {.rope = rotation(rope, positions_T, sign),
          .q = pointer<F>(q_THQ),
          .k = pointer<F>(k_THQ),
          .v = pointer<F>(v_THW),
          .kv = pointer<F>(kv_THX),
          .k_rope = pointer<F>(k_rope_TP),
          .q_stride = q_THQ.row_stride(),
          .k_stride = k_THQ.row_stride(),
          .v_stride = v_THW.row_stride(),
          .kv_stride = kv_THX.row_stride(),
          .k_rope_stride = k_rope_TP.row_stride(),
          .tokens = k_THQ.size(0),
          .H = static_cast<unsigned>(k_THQ.size(1)),
          .Q = static_cast<unsigned>(k_THQ.size(2)),
          .N = static_cast<unsigned>(k_THQ.size(2) - P),
          .W = static_cast<unsigned>(v_THW.size(2))};
}

template <class F>
bool mla_fits(const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_THX,
              const RopeTable& rope, const Tensor& k_THQ, const Tensor& v_THW) {
  const int64_t Q = k_THQ.size(2), W = v_THW.size(2), P = 2 * rope.cos_PR.size(1);
  return table_fits<F>(rope) && heads_fit<F>(q_THQ, Q) && heads_fit<F>(k_THQ, Q) &&
         heads_fit<F>(v_THW, W) && heads_fit<F>(kv_THX, Q - P + W) && heads_fit<F>(k_rope_TP, P);
}

void expect_mla(const char* op, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_THX,
                const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
                const Tensor& v_THW) {
  const DType dtype = k_THQ.dtype();
  DSTRAIN_CHECK(
      k_THQ.dims() == 3 && v_THW.dims() == 3,
      std::string(op) + ": keys are " + k_THQ.describe() + ", values " + v_THW.describe());
  const int64_t T = k_THQ.size(0), H = k_THQ.size(1), Q = k_THQ.size(2), W = v_THW.size(2);
  expect_rope(rope, positions_T, T, Q);
  const int64_t P = 2 * rope.cos_PR.size(1);
  expect_strided(k_rope_TP, op, dtype, {T, P});
  expect_strided(kv_THX, op, dtype, {T, H, Q - P + W});
  expect_strided(v_THW, op, dtype, {T, H, W});
  if (q_THQ.defined()) expect_strided(q_THQ, op, dtype, {T, H, Q});
}

}  // namespace

void CudaOps::mla_qkv(Stream& stream, const Tensor& q_THQ, const Tensor& k_rope_TP,
                      const Tensor& kv_b_THX, const RopeTable& rope, const Tensor& positions_T,
                      const Tensor& k_THQ, const Tensor& v_THW) {
  expect_mla("mla_qkv", q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW);
  if (k_THQ.numel() == 0) return;
  dispatch_f(k_THQ.dtype(), "mla_qkv", [&]<class F>() {
    const Mla<F> m = mla<F>(q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, 1, k_THQ, v_THW);
    const bool vectors = mla_fits<F>(q_THQ, k_rope_TP, kv_b_THX, rope, k_THQ, v_THW);
    dispatch_packs<F>(vectors, [&]<int kSize>() {
      const TokenGrid shape(m.tokens, kv_b_THX.row_numel() / kSize);
      mla_qkv_kernel<F, kSize><<<shape.grid, shape.block, 0, cuda(stream)>>>(m);
    });
  });
  check_launch("mla_qkv");
}

void CudaOps::mla_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_THQ,
                               const Tensor& dv_THW, const RopeTable& rope,
                               const Tensor& positions_T, const Tensor& dk_rope_TP,
                               const Tensor& dkv_b_THX) {
  expect_mla("mla_qkv_backward", dq_THQ, dk_rope_TP, dkv_b_THX, rope, positions_T, dk_THQ, dv_THW);
  if (dk_THQ.numel() == 0) return;
  dispatch_f(dk_THQ.dtype(), "mla_qkv_backward", [&]<class F>() {
    const Mla<F> m = mla<F>(dq_THQ, dk_rope_TP, dkv_b_THX, rope, positions_T, -1, dk_THQ, dv_THW);
    const bool vectors = mla_fits<F>(dq_THQ, dk_rope_TP, dkv_b_THX, rope, dk_THQ, dv_THW);
    dispatch_packs<F>(vectors, [&]<int kSize>() {
      const TokenGrid shape(m.tokens, dkv_b_THX.row_numel() / kSize);
      const unsigned columns = std::max(m.rope.half / kSize, 1u);
      const unsigned groups = std::clamp(shape.block.x / columns, 1u, m.H);
      const size_t sums_bytes = size_t{shape.block.y} * groups * 2 * m.rope.half * sizeof(float);
      mla_qkv_backward_kernel<F, kSize>
          <<<shape.grid, shape.block, sums_bytes, cuda(stream)>>>(m, groups);
    });
  });
  check_launch("mla_qkv_backward");
}

}  // namespace dstrain
