// Queries, keys and values of grouped-query attention and their gradients: split out of one
// product, or joined into one, with queries and keys rotated. T tokens, H query heads, G key/value
// heads, Q width of a head. Bound by memory: every element is moved once.
#include "cuda/cuda_ops.h"
#include "cuda/rotary.cuh"

namespace dstrain {
namespace {

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
  unsigned G, Q, queries;  // queries: query heads of one group
};

template <class F, bool kVectors, bool kBackward>
__global__ void __launch_bounds__(kRotaryThreads) gqa_qkv_kernel(const Gqa<F> g) {
  constexpr int kSize = Unit<F, kVectors>::kSize, kPairs = Unit<F, kVectors>::kPairs;
  const int64_t t = int64_t{blockIdx.x} * blockDim.y + threadIdx.y;
  if (t >= g.tokens) return;
  const int position = g.rope.position(t);
  F* const qkv = g.qkv + t * g.qkv_stride;
  const unsigned of_value = g.Q / kSize, values = g.G * of_value;
  for (unsigned i = threadIdx.x; i < values; i += blockDim.x) {
    const unsigned group = i / of_value, at = i % of_value * kSize;
    F* const joined = qkv + (group * (g.queries + 2) + g.queries + 1) * g.Q + at;
    F* const split = g.v + t * g.v_stride + group * g.Q + at;
    Pack<F, kSize>::load(kBackward ? split : joined).store(kBackward ? joined : split);
  }
  const unsigned of_head = g.rope.half / kPairs, turned = g.G * (g.queries + 1) * of_head;
  for (unsigned i = threadIdx.x; i < turned; i += blockDim.x) {
    const unsigned head = i / of_head, pair = i % of_head * kPairs;
    const unsigned group = head / (g.queries + 1), at = head % (g.queries + 1);
    F* const joined = qkv + (group * (g.queries + 2) + at) * g.Q;
    F* const split = at < g.queries ? g.q + t * g.q_stride + (group * g.queries + at) * g.Q
                                    : g.k + t * g.k_stride + group * g.Q;
    g.rope.template turn<F, kPairs>(kBackward ? split : joined, kBackward ? joined : split,
                                    position, pair);
  }
}

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
  expect_rope(rope, positions_T, T, Q);
  DSTRAIN_CHECK(2 * rope.cos_PR.size(1) == Q && qkv_TX.size(0) == T &&
                    qkv_TX.row_numel() == (H + 2 * G) * Q && qkv_TX.dtype() == dtype,
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
                     .G = static_cast<unsigned>(G),
                     .Q = static_cast<unsigned>(Q),
                     .queries = static_cast<unsigned>(H / G)};
    const bool vectors = table_fits<F>(rope) && heads_fit<F>(qkv_TX, Q) && heads_fit<F>(q_THQ, Q) &&
                         heads_fit<F>(k_TGQ, Q) && heads_fit<F>(v_TGW, Q);
    dispatch_vectors<F>(vectors, [&]<bool kVectors>(int size) {
      const TokenGrid shape(T, qkv_TX.row_numel() / size);
      gqa_qkv_kernel<F, kVectors, kBackward><<<shape.grid, shape.block, 0, cuda(stream)>>>(gqa);
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
