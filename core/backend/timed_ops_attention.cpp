// Attention, and what makes its queries, keys and values, on a clock.
#include <algorithm>

#include "core/backend/op_cost.h"
#include "core/backend/timed_ops.h"

namespace dstrain {
namespace {

// Scores and values of every query with its keys: uniform segments exactly, others as if they were
// as large as the largest.
double attention_flops(const Tensor& q_THQ, const Tensor& v_UGW,
                       const AttentionSegments& segments) {
  const double keys = static_cast<double>(segments.max_keys),
               queries = static_cast<double>(segments.max_queries);
  const double mean_keys = segments.causal ? keys - (queries - 1) / 2 : keys;
  const double rows =
      segments.causal ? size_of(q_THQ, 0) : queries * static_cast<double>(segments.max_count);
  return 2 * rows * size_of(q_THQ, 1) * mean_keys * (size_of(q_THQ, 2) + size_of(v_UGW, 2));
}

// In place: of each head the part that is as wide as a row of k_rope.
double rotation_bytes(const Tensor& q_THQ, const Tensor& k_rope_TP) {
  if (!q_THQ.defined()) return 0;
  return 2 * bytes_of({&q_THQ}) * size_of(k_rope_TP, 1) / size_of(q_THQ, 2);
}

}  // namespace

void TimedOps::mla_qkv(Stream& stream, const Tensor& q_THQ, const Tensor& k_rope_TP,
                       const Tensor& kv_b_THX, const RopeTable& rope, const Tensor& positions_T,
                       const Tensor& k_THQ, const Tensor& v_THW) {
  timed(
      stream, "mla_qkv", 0,
      bytes_of({&k_rope_TP, &kv_b_THX, &positions_T, &k_THQ, &v_THW}) +
          rotation_bytes(q_THQ, k_rope_TP),
      [&] { inner_.mla_qkv(stream, q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW); });
}

void TimedOps::mla_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_THQ,
                                const Tensor& dv_THW, const RopeTable& rope,
                                const Tensor& positions_T, const Tensor& dk_rope_TP,
                                const Tensor& dkv_b_THX) {
  timed(stream, "mla_qkv_backward", 0,
        bytes_of({&dk_THQ, &dv_THW, &positions_T, &dk_rope_TP, &dkv_b_THX}) +
            rotation_bytes(dq_THQ, dk_rope_TP),
        [&] {
          inner_.mla_qkv_backward(stream, dq_THQ, dk_THQ, dv_THW, rope, positions_T, dk_rope_TP,
                                  dkv_b_THX);
        });
}

void TimedOps::gqa_qkv(Stream& stream, const Tensor& qkv_TX, const RopeTable& rope,
                       const Tensor& positions_T, const Tensor& q_THQ, const Tensor& k_TGQ,
                       const Tensor& v_TGW) {
  timed(stream, "gqa_qkv", 0, bytes_of({&qkv_TX, &positions_T, &q_THQ, &k_TGQ, &v_TGW}),
        [&] { inner_.gqa_qkv(stream, qkv_TX, rope, positions_T, q_THQ, k_TGQ, v_TGW); });
}

void TimedOps::gqa_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_TGQ,
                                const Tensor& dv_TGW, const RopeTable& rope,
                                const Tensor& positions_T, const Tensor& dqkv_TX) {
  timed(
      stream, "gqa_qkv_backward", 0, bytes_of({&dq_THQ, &dk_TGQ, &dv_TGW, &positions_T, &dqkv_TX}),
      [&] { inner_.gqa_qkv_backward(stream, dq_THQ, dk_TGQ, dv_TGW, rope, positions_T, dqkv_TX); });
}

void TimedOps::attention(Stream& stream, const Tensor& q_THQ, const Tensor& k_UGQ,
                         const Tensor& v_UGW, const AttentionSegments& segments, double scale,
                         const Tensor& o_THW, const Tensor& lse_TH) {
  timed(stream, "attention", attention_flops(q_THQ, v_UGW, segments),
        bytes_of({&q_THQ, &k_UGQ, &v_UGW, &o_THW, &lse_TH}),
        [&] { inner_.attention(stream, q_THQ, k_UGQ, v_UGW, segments, scale, o_THW, lse_TH); });
}

void TimedOps::attention_backward(Stream& stream, const Tensor& do_THW, const Tensor& q_THQ,
                                  const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                                  const Tensor& lse_TH, const AttentionSegments& segments,
                                  double scale, const Tensor& dq_THQ, const Tensor& dk_UGQ,
                                  const Tensor& dv_UGW) {
  timed(stream, "attention_backward", 2.5 * attention_flops(q_THQ, v_UGW, segments),
        bytes_of({&do_THW, &q_THQ, &k_UGQ, &v_UGW, &o_THW, &lse_TH, &dq_THQ, &dk_UGQ, &dv_UGW}),
        [&] {
          inner_.attention_backward(stream, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments,
                                    scale, dq_THQ, dk_UGQ, dv_UGW);
        });
}

void TimedOps::merge_attention(Stream& stream, const Tensor& part_THW, const Tensor& part_lse_TH,
                               const AttentionSegments& segments, const Tensor& o_THW,
                               const Tensor& lse_TH, const Tensor& out_THW) {
  const double share = static_cast<double>(segments.max_queries * segments.max_count) /
                       std::max(1.0, size_of(o_THW, 0));
  const double share_of_o = o_THW.raw() == out_THW.raw() ? share : 1;
  timed(stream, "merge_attention", 0,
        share * bytes_of({&part_THW, &part_lse_TH, &lse_TH, &lse_TH}) +
            share_of_o * bytes_of({&o_THW, &out_THW}),
        [&] {
          inner_.merge_attention(stream, part_THW, part_lse_TH, segments, o_THW, lse_TH, out_THW);
        });
}

void TimedOps::add_bias(Stream& stream, const Tensor& x_TD, const Tensor& bias_D) {
  timed(stream, "add_bias", 0, bytes_of({&x_TD, &bias_D, &x_TD}),
        [&] { inner_.add_bias(stream, x_TD, bias_D); });
}

void TimedOps::bias_backward(Stream& stream, const Tensor& dy_TD, Accumulate accumulate,
                             const Tensor& dbias_D) {
  timed(stream, "bias_backward", 0, bytes_of({&dy_TD, &dbias_D}),
        [&] { inner_.bias_backward(stream, dy_TD, accumulate, dbias_D); });
}

}  // namespace dstrain
