// Rotary position embedding (Su et al. 2021, arXiv:2104.09864) and the splits and joins around it.
// A pair (a, b) at position p becomes (a cos - b sin, a sin + b cos); backward turns the other way.
// T tokens, H query heads, G key/value heads, Q width of a query/key head, W width of a value head,
// P rotated width, X = Q - P + W (one head of kv_b). Every loop is bound by memory.
#include <cstring>

#include "core/backend/cpu_ops.h"

namespace dstrain {
namespace {

// The rotation of one token.
template <class F>
struct Rotation {
  const F* cos;
  const F* sin;
  F sign;  // 1 turns forward, -1 back
  int64_t pairs;
  bool interleaved;

  // in and out may be the same memory.
  void apply(const F* in, F* out) const {
    const F s = sign;
    if (interleaved) {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) {
        const F a = in[2 * i], b = in[2 * i + 1];
        out[2 * i] = a * cos[i] - b * (s * sin[i]);
        out[2 * i + 1] = a * (s * sin[i]) + b * cos[i];
      }
    } else {
#pragma omp simd
      for (int64_t i = 0; i < pairs; ++i) {
        const F a = in[i], b = in[i + pairs];
        out[i] = a * cos[i] - b * (s * sin[i]);
        out[i + pairs] = a * (s * sin[i]) + b * cos[i];
      }
    }
  }
};

template <class F>
Rotation<F> rotation_at(const RopeTable& rope, const Tensor& positions_T, int64_t t, F sign) {
  const int32_t position = positions_T.data<int32_t>()[t];
  DSTRAIN_CHECK(position >= 0 && position < rope.cos_PR.size(0),
                "position " + std::to_string(position) + " is outside of the rotary table " +
                    rope.cos_PR.describe());
  return {row<F>(rope.cos_PR, position), row<F>(rope.sin_PR, position), sign, rope.cos_PR.size(1),
          rope.interleaved};
}

template <class F>
void copy(const F* from, int64_t n, F* to) {
  std::memcpy(to, from, static_cast<size_t>(n) * sizeof(F));
}

void expect_rope(const RopeTable& rope, const Tensor& positions_T, DType dtype, int64_t T,
                 int64_t head_width) {
  DSTRAIN_CHECK(rope.cos_PR.dims() == 2 && 2 * rope.cos_PR.size(1) <= head_width,
                "the rotary table " + rope.cos_PR.describe() + " is wider than a head of " +
                    std::to_string(head_width));
  const int64_t positions = rope.cos_PR.size(0), pairs = rope.cos_PR.size(1);
  expect_strided(rope.cos_PR, "rope: cos_PR", dtype, {positions, pairs});
  expect_strided(rope.sin_PR, "rope: sin_PR", dtype, {positions, pairs});
  expect(positions_T, "rope: positions_T", DType::i32, {T});
}

// Sizes of the MLA operands.
struct MlaShape {
  int64_t T, H, Q, P, N, W;  // N = Q - P, the part of a head without position

  MlaShape(const Tensor& k_THQ, const Tensor& v_THW, const RopeTable& rope)
      : T(k_THQ.size(0)),
        H(k_THQ.size(1)),
        Q(k_THQ.size(2)),
        P(2 * rope.cos_PR.size(1)),
        N(Q - P),
        W(v_THW.size(2)) {}
};

struct GqaShape {
  int64_t T, G, Q, queries;  // queries: query heads of one group

  GqaShape(const Tensor& q_THQ, const Tensor& k_TGQ)
      : T(q_THQ.size(0)),
        G(k_TGQ.size(1)),
        Q(q_THQ.size(2)),
        queries(G > 0 ? q_THQ.size(1) / G : 0) {}
};

void expect_gqa(const GqaShape& shape, const Tensor& qkv_TX, const Tensor& q_THQ,
                const Tensor& k_TGQ, const Tensor& v_TGW, const RopeTable& rope,
                const Tensor& positions_T) {
  const auto& [T, G, Q, queries] = shape;
  const DType dtype = q_THQ.dtype();
  expect_rope(rope, positions_T, dtype, T, Q);
  DSTRAIN_CHECK(2 * rope.cos_PR.size(1) == Q, "gqa_qkv rotates whole heads of " +
                                                  std::to_string(Q) + ", the rotary table is " +
                                                  rope.cos_PR.describe());
  DSTRAIN_CHECK(
      qkv_TX.row_numel() == G * (queries + 2) * Q && qkv_TX.size(0) == T && qkv_TX.dtype() == dtype,
      "gqa_qkv: qkv_TX is " + qkv_TX.describe() + " and q_THQ " + q_THQ.describe());
  expect_strided(q_THQ, "gqa_qkv: q_THQ", dtype, {T, G * queries, Q});
  expect_strided(k_TGQ, "gqa_qkv: k_TGQ", dtype, {T, G, Q});
  expect_strided(v_TGW, "gqa_qkv: v_TGW", dtype, {T, G, Q});
}

}  // namespace

void CpuOps::mla_qkv(Stream&, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_b_THX,
                     const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
                     const Tensor& v_THW) {
  const DType dtype = k_THQ.dtype();
  const auto [T, H, Q, P, N, W] = MlaShape(k_THQ, v_THW, rope);
  expect_rope(rope, positions_T, dtype, T, Q);
  expect_strided(k_rope_TP, "mla_qkv: k_rope_TP", dtype, {T, P});
  expect_strided(kv_b_THX, "mla_qkv: kv_b_THX", dtype, {T, H, N + W});
  if (q_THQ.defined()) expect_strided(q_THQ, "mla_qkv: q_THQ", dtype, {T, H, Q});
  expect_strided(v_THW, "mla_qkv: v_THW", dtype, {T, H, W});
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(H * (Q + W)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto rotation = rotation_at<F>(rope, positions_T, t, F(1));
        if (q_THQ.defined()) {
          F* const q = row<F>(q_THQ, t) + N;
          for (int64_t h = 0; h < H; ++h) rotation.apply(q + h * Q, q + h * Q);
        }
        F* const k = row<F>(k_THQ, t);
        F* const v = row<F>(v_THW, t);
        const F* const kv_b = row<F>(kv_b_THX, t);
        for (int64_t h = 0; h < H; ++h) {
          const F* const kv_head = kv_b + h * (N + W);
          copy(kv_head, N, k + h * Q);
          copy(kv_head + N, W, v + h * W);
        }
        rotation.apply(row<F>(k_rope_TP, t), k + N);
        for (int64_t h = 1; h < H; ++h) {
          copy(k + N, Q - N, k + h * Q + N);
        }
      }
    });
  });
}

void CpuOps::mla_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_THQ,
                              const Tensor& dv_THW, const RopeTable& rope,
                              const Tensor& positions_T, const Tensor& dk_rope_TP,
                              const Tensor& dkv_b_THX) {
  const DType dtype = dk_THQ.dtype();
  const auto [T, H, Q, P, N, W] = MlaShape(dk_THQ, dv_THW, rope);
  expect_rope(rope, positions_T, dtype, T, Q);
  if (dq_THQ.defined()) expect_strided(dq_THQ, "mla_qkv_backward: dq_THQ", dtype, {T, H, Q});
  expect_strided(dv_THW, "mla_qkv_backward: dv_THW", dtype, {T, H, W});
  expect_strided(dk_rope_TP, "mla_qkv_backward: dk_rope_TP", dtype, {T, P});
  expect_strided(dkv_b_THX, "mla_qkv_backward: dkv_b_THX", dtype, {T, H, N + W});
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(H * (Q + W)), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto rotation = rotation_at<F>(rope, positions_T, t, F(-1));
        if (dq_THQ.defined()) {
          F* const dq = row<F>(dq_THQ, t) + N;
          for (int64_t h = 0; h < H; ++h) rotation.apply(dq + h * Q, dq + h * Q);
        }
        const F* const dk = row<F>(dk_THQ, t);
        const F* const dv = row<F>(dv_THW, t);
        F* const dkv_b = row<F>(dkv_b_THX, t);
        F* const dk_rope = row<F>(dk_rope_TP, t);
        std::fill(dk_rope, dk_rope + P, F(0));
        for (int64_t h = 0; h < H; ++h) {
          const F* const dk_head = dk + h * Q;
          F* const dkv_head = dkv_b + h * (N + W);
          copy(dk_head, N, dkv_head);
          copy(dv + h * W, W, dkv_head + N);
#pragma omp simd
          for (int64_t i = 0; i < P; ++i) dk_rope[i] += dk_head[N + i];
        }
        rotation.apply(dk_rope, dk_rope);
      }
    });
  });
}

void CpuOps::gqa_qkv(Stream&, const Tensor& qkv_TX, const RopeTable& rope,
                     const Tensor& positions_T, const Tensor& q_THQ, const Tensor& k_TGQ,
                     const Tensor& v_TGW) {
  const GqaShape shape(q_THQ, k_TGQ);
  expect_gqa(shape, qkv_TX, q_THQ, k_TGQ, v_TGW, rope, positions_T);
  const int64_t G = shape.G, Q = shape.Q, queries = shape.queries;
  dispatch_float(q_THQ.dtype(), [&]<class F>() {
    pool_.run_ranges(shape.T, rows_per_task(qkv_TX.row_numel()), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto rotation = rotation_at<F>(rope, positions_T, t, F(1));
        const F* head = row<F>(qkv_TX, t);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < queries; ++i, head += Q) {
            rotation.apply(head, row<F>(q_THQ, t) + (g * queries + i) * Q);
          }
          rotation.apply(head, row<F>(k_TGQ, t) + g * Q);
          copy(head + Q, Q, row<F>(v_TGW, t) + g * Q);
          head += 2 * Q;
        }
      }
    });
  });
}

void CpuOps::gqa_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_TGQ,
                              const Tensor& dv_TGW, const RopeTable& rope,
                              const Tensor& positions_T, const Tensor& dqkv_TX) {
  const GqaShape shape(dq_THQ, dk_TGQ);
  expect_gqa(shape, dqkv_TX, dq_THQ, dk_TGQ, dv_TGW, rope, positions_T);
  const int64_t G = shape.G, Q = shape.Q, queries = shape.queries;
  dispatch_float(dq_THQ.dtype(), [&]<class F>() {
    pool_.run_ranges(shape.T, rows_per_task(dqkv_TX.row_numel()), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const auto rotation = rotation_at<F>(rope, positions_T, t, F(-1));
        F* head = row<F>(dqkv_TX, t);
        for (int64_t g = 0; g < G; ++g) {
          for (int64_t i = 0; i < queries; ++i, head += Q) {
            rotation.apply(row<F>(dq_THQ, t) + (g * queries + i) * Q, head);
          }
          rotation.apply(row<F>(dk_TGQ, t) + g * Q, head);
          copy(row<F>(dv_TGW, t) + g * Q, Q, head + Q);
          head += 2 * Q;
        }
      }
    });
  });
}

}  // namespace dstrain
