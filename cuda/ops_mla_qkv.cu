// Queries, keys and values of multi-head latent attention and their gradients (formulas:
// core/backend/cpu_ops_rope.cpp). T tokens, H heads, Q width of a query/key head, P rotated width,
// N = Q - P, W width of a value head. Bound by memory: every element is moved once, and of queries
// only the rotated part.
#include "cuda/cuda_ops.h"
#include "cuda/rotary.cuh"

namespace dstrain {
namespace {

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

// Moves keys without position and values from kv to k and v, or back, two packs of a thread at a
// time.
template <int kSize, bool kBackward, class F>
__device__ __forceinline__ void move_keys_values(const Mla<F>& m, int64_t t) {
  constexpr int kBatch = 2;
  F* const kv = m.kv + t * m.kv_stride;
  F* const k = m.k + t * m.k_stride;
  F* const v = m.v + t * m.v_stride;
  const unsigned width = m.N + m.W, count = m.H * width / kSize;
  for (unsigned first = threadIdx.x; first < count; first += kBatch * blockDim.x) {
    Pack<F, kSize> pack[kBatch];
    F* to[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const unsigned element = (first + i * blockDim.x) * kSize;
      if (element >= count * kSize) break;
      const unsigned h = element / width, at = element % width;
      F* const joined = kv + element;
      F* const split = at < m.N ? k + h * m.Q + at : v + h * m.W + (at - m.N);
      pack[i] = Pack<F, kSize>::load(kBackward ? split : joined);
      to[i] = kBackward ? joined : split;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i)
      if (first + i * blockDim.x < count) pack[i].store(to[i]);
  }
}

template <class F, bool kVectors>
__global__ void __launch_bounds__(kRotaryThreads) mla_qkv_kernel(const Mla<F> m) {
  constexpr int kSize = Unit<F, kVectors>::kSize, kPairs = Unit<F, kVectors>::kPairs;
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= m.tokens) return;
  const int position = m.rope.position(t);
  move_keys_values<kSize, /*kBackward=*/false>(m, t);
  const unsigned of_head = m.rope.half / kPairs, count = m.H * of_head;
  for (unsigned i = threadIdx.x; i < 2 * count; i += blockDim.x) {
    const bool is_key = i < count;
    const unsigned at = is_key ? i : i - count, h = at / of_head, pair = at % of_head * kPairs;
    if (is_key) {
      F* const k = m.k + t * m.k_stride + h * m.Q + m.N;
      m.rope.template turn<F, kPairs>(m.k_rope + t * m.k_rope_stride, k, position, pair);
    } else if (m.q) {
      F* const q = m.q + t * m.q_stride + h * m.Q + m.N;
      m.rope.template turn<F, kPairs>(q, q, position, pair);
    }
  }
}

// The gradient of k_rope sums over heads: `groups` groups of threads have every groups-th head
// each, and their sums are added in order. sums: f32 [tokens of the block, groups, 2 * half], a in
// the first half and b in the second.
template <class F, bool kVectors>
__global__ void __launch_bounds__(kRotaryThreads)
    mla_qkv_backward_kernel(const Mla<F> m, unsigned groups) {
  constexpr int kSize = Unit<F, kVectors>::kSize, kPairs = Unit<F, kVectors>::kPairs;
  extern __shared__ float all_sums[];
  float* const sums = all_sums + threadIdx.y * groups * 2 * m.rope.half;
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  const unsigned half = m.rope.half, of_head = half / kPairs;
  int position = 0;
  if (t < m.tokens) {
    position = m.rope.position(t);
    for (unsigned i = threadIdx.x; i < groups * of_head; i += blockDim.x) {
      const unsigned group = i / of_head, pair = i % of_head * kPairs;
      Pairs<F, kPairs> sum = {};
      for (unsigned h = group; h < m.H; h += groups) {
        const F* const dk = m.k + t * m.k_stride + h * m.Q + m.N;
        const auto one = Pairs<F, kPairs>::load(dk, pair, half, m.rope.interleaved);
#pragma unroll
        for (int j = 0; j < kPairs; ++j) {
          sum.a[j] += one.a[j];
          sum.b[j] += one.b[j];
        }
      }
#pragma unroll
      for (int j = 0; j < kPairs; ++j) {
        sums[group * 2 * half + pair + j] = sum.a[j];
        sums[group * 2 * half + half + pair + j] = sum.b[j];
      }
    }
    move_keys_values<kSize, /*kBackward=*/true>(m, t);
    for (unsigned i = threadIdx.x; i < m.H * of_head; i += blockDim.x) {
      F* const dq = m.q + t * m.q_stride + i / of_head * m.Q + m.N;
      m.rope.template turn<F, kPairs>(dq, dq, position, i % of_head * kPairs);
    }
  }
  __syncthreads();
  if (t >= m.tokens) return;
  for (unsigned i = threadIdx.x; i < half; i += blockDim.x) {
    Pairs<F, 1> sum = {};
    for (unsigned g = 0; g < groups; ++g) {
      sum.a[0] += sums[g * 2 * half + i];
      sum.b[0] += sums[g * 2 * half + half + i];
    }
    m.rope.turn(position, i, sum);
    sum.store(m.k_rope + t * m.k_rope_stride, i, half, m.rope.interleaved);
  }
}

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
    dispatch_vectors<F>(
        mla_fits<F>(q_THQ, k_rope_TP, kv_b_THX, rope, k_THQ, v_THW), [&]<bool kVectors>(int size) {
          const TokenGrid shape(m.tokens, kv_b_THX.row_numel() / size);
          mla_qkv_kernel<F, kVectors><<<shape.grid, shape.block, 0, cuda(stream)>>>(m);
        });
  });
  check_launch("mla_qkv");
}

void CudaOps::mla_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_THQ,
                               const Tensor& dv_THW, const RopeTable& rope,
                               const Tensor& positions_T, const Tensor& dk_rope_TP,
                               const Tensor& dkv_b_THX) {
  expect_strided(dq_THQ, "mla_qkv_backward: dq_THQ", dk_THQ.dtype(),
                 {dk_THQ.size(0), dk_THQ.size(1), dk_THQ.size(2)});
  expect_mla("mla_qkv_backward", dq_THQ, dk_rope_TP, dkv_b_THX, rope, positions_T, dk_THQ, dv_THW);
  if (dk_THQ.numel() == 0) return;
  dispatch_f(dk_THQ.dtype(), "mla_qkv_backward", [&]<class F>() {
    const Mla<F> m = mla<F>(dq_THQ, dk_rope_TP, dkv_b_THX, rope, positions_T, -1, dk_THQ, dv_THW);
    dispatch_vectors<F>(mla_fits<F>(dq_THQ, dk_rope_TP, dkv_b_THX, rope, dk_THQ, dv_THW),
                        [&]<bool kVectors>(int size) {
                          const TokenGrid shape(m.tokens, dkv_b_THX.row_numel() / size);
                          const unsigned of_head =
                              std::max(m.rope.half / Unit<F, kVectors>::kPairs, 1u);
                          const unsigned groups = std::clamp(shape.block.x / of_head, 1u, m.H);
                          const size_t sums_bytes =
                              size_t{shape.block.y} * groups * 2 * m.rope.half * sizeof(float);
                          mla_qkv_backward_kernel<F, kVectors>
                              <<<shape.grid, shape.block, sums_bytes, cuda(stream)>>>(m, groups);
                        });
  });
  check_launch("mla_qkv_backward");
}

}  // namespace dstrain
