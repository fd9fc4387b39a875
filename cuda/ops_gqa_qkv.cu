// Queries, keys and values of grouped-query attention and their gradients: split out of one
// product, or joined into one, with queries and keys rotated. T tokens, H query heads, G key/value
// heads, Q width of a head. Bound by memory: every element is moved once.
#include "cuda/cuda_ops.h"
#include "cuda/rotary.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 256;
constexpr int kBatch = 2;

// q, k, v are the outputs of gqa_qkv or the gradients that come in; qkv the other way round.
template <class F>
struct Gqa {
  Rotation rope;
  F* qkv;
  F* q;
  F* k;
  F* v;
  int64_t qkv_stride, q_stride, k_stride, v_stride;
  int64_t tokens;
  unsigned heads, Q, queries;  // queries: query heads of one group; heads: all, keys and values too
  unsigned per_group;          // 2^32 / (queries + 2), rounded up: it divides heads exactly

  // Head number `head` of qkv, where it is split.
  __device__ __forceinline__ F* split(int64_t t, unsigned head) const {
    const unsigned group = __umulhi(head, per_group), at = head - group * (queries + 2);
    if (at < queries) return q + t * q_stride + (head - 2 * group) * Q;
    return (at == queries ? k + t * k_stride : v + t * v_stride) + group * Q;
  }
  __device__ __forceinline__ bool is_value(unsigned head) const {
    return head - __umulhi(head, per_group) * (queries + 2) == queries + 1;
  }
};

// threadIdx: x counts columns of a head (pairs of packs), y heads and z tokens. A thread has the
// same column of up to kBatch heads under way, and the angles of that column in registers.
template <class F, int kSize, bool kBackward>
__global__ void __launch_bounds__(kThreads) gqa_qkv_kernel(const Gqa<F> g) {
  const int64_t t = int64_t{blockIdx.x} * blockDim.z + threadIdx.z;
  if (t >= g.tokens) return;
  const int32_t position = g.rope.positions[t];
  const unsigned half = g.rope.half;
  F* const qkv = g.qkv + t * g.qkv_stride;
  for (unsigned column = threadIdx.x; column < half / kSize; column += blockDim.x) {
    for (unsigned head = threadIdx.y; head < g.heads; head += kBatch * blockDim.y) {
      Pairs<F, kSize> pairs[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const unsigned h = head + i * blockDim.y;
        if (h < g.heads)
          pairs[i] = Pairs<F, kSize>::load(kBackward ? g.split(t, h) : qkv + h * g.Q, column, half,
                                           g.rope.interleaved);
      }
      const auto angles = g.rope.template angles<kSize>(position, column);
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const unsigned h = head + i * blockDim.y;
        if (h >= g.heads) break;
        if (!g.is_value(h)) g.rope.turn(angles, pairs[i]);
        pairs[i].store(kBackward ? qkv + h * g.Q : g.split(t, h), column, half, g.rope.interleaved);
      }
    }
  }
}

// Blocks of at most kThreads threads: those of one token, each with about kBatch heads, or of
// several.
struct Shape {
  dim3 block, grid;

  Shape(int64_t tokens, int64_t heads, int64_t columns) {
    const int64_t x = std::clamp<int64_t>(columns, 1, kThreads);
    const int64_t y = std::clamp<int64_t>(ceil_div(heads, kBatch), 1, kThreads / x);
    const int64_t z = std::min<int64_t>(kThreads / (x * y), 64);
    block = dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
    grid = dim3(static_cast<unsigned>(ceil_div(tokens, z)));
  }
};

template <bool kBackward>
void launch_gqa(Stream& stream, const Tensor& qkv_TX, const RopeTable& rope,
                const Tensor& positions_T, const Tensor& q_THQ, const Tensor& k_TGQ,
                const Tensor& v_TGW) {
  const char* const op = kBackward ? "gqa_qkv_backward" : "gqa_qkv";
  const DType dtype = q_THQ.dtype();
  DSTRAIN_CHECK(
      q_THQ.dims() == 3 && k_TGQ.dims() == 3 && k_TGQ.size(1) > 0 &&
          q_THQ.size(1) % k_TGQ.size(1) == 0,
      std::string(op) + ": queries are " + q_THQ.describe() + ", keys " + k_TGQ.describe());
  const int64_t T = q_THQ.size(0), H = q_THQ.size(1), G = k_TGQ.size(1), Q = q_THQ.size(2);
  const int64_t heads = H + 2 * G;
  expect_rope(rope, positions_T, T, Q);
  DSTRAIN_CHECK(2 * rope.cos_PR.size(1) == Q && qkv_TX.size(0) == T &&
                    qkv_TX.row_numel() == heads * Q && heads < 65536 && qkv_TX.dtype() == dtype,
                std::string(op) + ": qkv_TX is " + qkv_TX.describe() + ", q_THQ " +
                    q_THQ.describe() + ", the rotary table " + rope.cos_PR.describe());
  expect_strided(k_TGQ, op, dtype, {T, G, Q});
  expect_strided(v_TGW, op, dtype, {T, G, Q});
  if (T == 0 || Q == 0) return;
  dispatch_f(dtype, op, [&]<class F>() {
    const Gqa<F> gqa{.rope = rotation(rope, positions_T, kBackward ? -1.0f : 1.0f),
                     .qkv = pointer<F>(qkv_TX),
                     .q = pointer<F>(q_THQ),
                     .k = pointer<F>(k_TGQ),
                     .v = pointer<F>(v_TGW),
                     .qkv_stride = qkv_TX.row_stride(),
                     .q_stride = q_THQ.row_stride(),
                     .k_stride = k_TGQ.row_stride(),
                     .v_stride = v_TGW.row_stride(),
                     .tokens = T,
                     .heads = static_cast<unsigned>(heads),
                     .Q = static_cast<unsigned>(Q),
                     .queries = static_cast<unsigned>(H / G),
                     .per_group = UINT32_MAX / static_cast<unsigned>(H / G + 2) + 1};
    const bool vectors = table_fits<F>(rope) && heads_fit<F>(qkv_TX, Q) && heads_fit<F>(q_THQ, Q) &&
                         heads_fit<F>(k_TGQ, Q) && heads_fit<F>(v_TGW, Q);
    dispatch_packs<F>(vectors, [&]<int kSize>() {
      const Shape shape(T, heads, Q / 2 / kSize);
      gqa_qkv_kernel<F, kSize, kBackward><<<shape.grid, shape.block, 0, cuda(stream)>>>(gqa);
    });
  });
  check_launch(op);
}

}  // namespace

void CudaOps::gqa_qkv(Stream& stream, const Tensor& qkv_TX, const RopeTable& rope,
                      const Tensor& positions_T, const Tensor& q_THQ, const Tensor& k_TGQ,
                      const Tensor& v_TGW) {
  launch_gqa<false>(stream, qkv_TX, rope, positions_T, q_THQ, k_TGQ, v_TGW);
}

void CudaOps::gqa_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_TGQ,
                               const Tensor& dv_TGW, const RopeTable& rope,
                               const Tensor& positions_T, const Tensor& dqkv_TX) {
  launch_gqa<true>(stream, dqkv_TX, rope, positions_T, dq_THQ, dk_TGQ, dv_TGW);
}

}  // namespace dstrain
