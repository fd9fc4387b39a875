// Operations as data: what a call reads and writes, and the call itself, to be made whenever a test
// likes.
#pragma once

#include <cstddef>
#include <functional>
#include <initializer_list>
#include <vector>

#include "core/backend/ops.h"
#include "test/support/stream_order.h"

namespace dstrain::test {

struct OpCall {
  const char* name;
  std::vector<MemoryRange> reads, writes;
  std::function<void(Ops& ops, Stream& stream)> run;
};

class QueuedOps : public Ops {
 public:
  void matmul(Stream& s, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
              double beta, const Tensor& c) override {
    queue(s, {"matmul", all_of({a, b}), all_of({c}),
              [=](Ops& ops, Stream& on) { ops.matmul(on, ta, tb, alpha, a, b, beta, c); }});
  }
  void grouped_matmul(Stream& s, const Tensor& x_XI, const Tensor& row_index_R,
                      const Tensor& weight_EOI, const Tensor& offsets_E1,
                      const Tensor& y_RO) override {
    queue(s, {"grouped_matmul", all_of({x_XI, row_index_R, weight_EOI, offsets_E1}), all_of({y_RO}),
              [=](Ops& ops, Stream& on) {
                ops.grouped_matmul(on, x_XI, row_index_R, weight_EOI, offsets_E1, y_RO);
              }});
  }
  void grouped_matmul_backward_input(Stream& s, const Tensor& dy_XO, const Tensor& row_index_R,
                                     const Tensor& weight_EOI, const Tensor& offsets_E1,
                                     const Tensor& dx_RI) override {
    queue(s, {"grouped_matmul_backward_input", all_of({dy_XO, row_index_R, weight_EOI, offsets_E1}),
              all_of({dx_RI}), [=](Ops& ops, Stream& on) {
                ops.grouped_matmul_backward_input(on, dy_XO, row_index_R, weight_EOI, offsets_E1,
                                                  dx_RI);
              }});
  }
  void grouped_matmul_backward_weight(Stream& s, const Tensor& dy_XO, const Tensor& dy_index_R,
                                      const Tensor& x_XI, const Tensor& x_index_R,
                                      const Tensor& offsets_E1, Accumulate accumulate,
                                      const Tensor& dweight_EOI) override {
    queue(s, {"grouped_matmul_backward_weight",
              all_of({dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1}), all_of({dweight_EOI}),
              [=](Ops& ops, Stream& on) {
                ops.grouped_matmul_backward_weight(on, dy_XO, dy_index_R, x_XI, x_index_R,
                                                   offsets_E1, accumulate, dweight_EOI);
              }});
  }
  void ffn_up(Stream& s, const Tensor& x_XD, const Tensor& row_index_R, const Tensor& weight_E2ID,
              const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
              const Tensor& h_RI) override {
    queue(s, {"ffn_up", all_of({x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R}),
              all_of({gate_up_R2I, h_RI}), [=](Ops& ops, Stream& on) {
                ops.ffn_up(on, x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R,
                           gate_up_R2I, h_RI);
              }});
  }
  void ffn_down_backward_input(Stream& s, const Tensor& dy_XD, const Tensor& row_index_R,
                               const Tensor& weight_EDI, const Tensor& offsets_E1,
                               const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                               const Tensor& dgate_up_R2I, const Tensor& h_RI,
                               const Tensor& drow_weight_R) override {
    queue(s, {"ffn_down_backward_input",
              all_of({dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I, row_weight_R}),
              all_of({dgate_up_R2I, h_RI, drow_weight_R}), [=](Ops& ops, Stream& on) {
                ops.ffn_down_backward_input(on, dy_XD, row_index_R, weight_EDI, offsets_E1,
                                            gate_up_R2I, row_weight_R, dgate_up_R2I, h_RI,
                                            drow_weight_R);
              }});
  }
  void add_rms_norm(Stream& s, const Tensor& x_TD, const Tensor& delta_TD, const Tensor& weight_D,
                    double eps, const Tensor& sum_TD, const Tensor& y_TD,
                    const Tensor& rstd_T) override {
    queue(s, {"add_rms_norm", all_of({x_TD, delta_TD, weight_D}), all_of({sum_TD, y_TD, rstd_T}),
              [=](Ops& ops, Stream& on) {
                ops.add_rms_norm(on, x_TD, delta_TD, weight_D, eps, sum_TD, y_TD, rstd_T);
              }});
  }
  void rms_norm_backward(Stream& s, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& weight_D,
                         const Tensor& rstd_T, const Tensor& dresidual_TD, Accumulate accumulate,
                         const Tensor& dx_TD, const Tensor& dweight_D) override {
    queue(s, {"rms_norm_backward", all_of({dy_TD, x_TD, weight_D, rstd_T, dresidual_TD}),
              all_of({dx_TD, dweight_D}), [=](Ops& ops, Stream& on) {
                ops.rms_norm_backward(on, dy_TD, x_TD, weight_D, rstd_T, dresidual_TD, accumulate,
                                      dx_TD, dweight_D);
              }});
  }
  void mla_qkv(Stream& s, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_b_THX,
               const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
               const Tensor& v_THW) override {
    queue(s, {"mla_qkv", all_of({k_rope_TP, kv_b_THX, rope, positions_T}),
              all_of({q_THQ, k_THQ, v_THW}), [=](Ops& ops, Stream& on) {
                ops.mla_qkv(on, q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW);
              }});
  }
  void mla_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_THQ, const Tensor& dv_THW,
                        const RopeTable& rope, const Tensor& positions_T, const Tensor& dk_rope_TP,
                        const Tensor& dkv_b_THX) override {
    queue(s, {"mla_qkv_backward", all_of({dk_THQ, dv_THW, rope, positions_T}),
              all_of({dq_THQ, dk_rope_TP, dkv_b_THX}), [=](Ops& ops, Stream& on) {
                ops.mla_qkv_backward(on, dq_THQ, dk_THQ, dv_THW, rope, positions_T, dk_rope_TP,
                                     dkv_b_THX);
              }});
  }
  void gqa_qkv(Stream& s, const Tensor& qkv_TX, const RopeTable& rope, const Tensor& positions_T,
               const Tensor& q_THQ, const Tensor& k_TGQ, const Tensor& v_TGW) override {
    queue(s, {"gqa_qkv", all_of({qkv_TX, rope, positions_T}), all_of({q_THQ, k_TGQ, v_TGW}),
              [=](Ops& ops, Stream& on) {
                ops.gqa_qkv(on, qkv_TX, rope, positions_T, q_THQ, k_TGQ, v_TGW);
              }});
  }
  void gqa_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_TGQ, const Tensor& dv_TGW,
                        const RopeTable& rope, const Tensor& positions_T,
                        const Tensor& dqkv_TX) override {
    queue(s, {"gqa_qkv_backward", all_of({dq_THQ, dk_TGQ, dv_TGW, rope, positions_T}),
              all_of({dqkv_TX}), [=](Ops& ops, Stream& on) {
                ops.gqa_qkv_backward(on, dq_THQ, dk_TGQ, dv_TGW, rope, positions_T, dqkv_TX);
              }});
  }
  void attention(Stream& s, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                 const AttentionSegments& segments, double scale, const Tensor& o_THW,
                 const Tensor& lse_TH) override {
    queue(s, {"attention", all_of({q_THQ, k_UGQ, v_UGW, segments}), all_of({o_THW, lse_TH}),
              [=](Ops& ops, Stream& on) {
                ops.attention(on, q_THQ, k_UGQ, v_UGW, segments, scale, o_THW, lse_TH);
              }});
  }
  void attention_backward(Stream& s, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override {
    queue(s, {"attention_backward", all_of({do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments}),
              all_of({dq_THQ, dk_UGQ, dv_UGW}), [=](Ops& ops, Stream& on) {
                ops.attention_backward(on, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments,
                                       scale, dq_THQ, dk_UGQ, dv_UGW);
              }});
  }
  void merge_attention(Stream& s, const Tensor& part_THW, const Tensor& part_lse_TH,
                       const AttentionSegments& segments, const Tensor& o_THW, const Tensor& lse_TH,
                       const Tensor& out_THW) override {
    queue(s, {"merge_attention", all_of({part_THW, part_lse_TH, segments, o_THW}),
              all_of({lse_TH, out_THW}), [=](Ops& ops, Stream& on) {
                ops.merge_attention(on, part_THW, part_lse_TH, segments, o_THW, lse_TH, out_THW);
              }});
  }
  void add_bias(Stream& s, const Tensor& x_TD, const Tensor& bias_D) override {
    queue(s, {"add_bias", all_of({bias_D}), all_of({x_TD}),
              [=](Ops& ops, Stream& on) { ops.add_bias(on, x_TD, bias_D); }});
  }
  void bias_backward(Stream& s, const Tensor& dy_TD, Accumulate accumulate,
                     const Tensor& dbias_D) override {
    queue(s, {"bias_backward", all_of({dy_TD}), all_of({dbias_D}),
              [=](Ops& ops, Stream& on) { ops.bias_backward(on, dy_TD, accumulate, dbias_D); }});
  }
  void router_topk(Stream& s, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                   const Tensor& weights_TK) override {
    queue(s, {"router_topk", all_of({logits_TE, bias_E}),
              all_of({scores_TE, indices_TK, weights_TK}), [=](Ops& ops, Stream& on) {
                ops.router_topk(on, logits_TE, bias_E, params, scores_TE, indices_TK, weights_TK);
              }});
  }
  void router_weights(Stream& s, const Tensor& logits_TE, const RouterParams& params,
                      const Tensor& indices_TK, const Tensor& scores_TE,
                      const Tensor& weights_TK) override {
    queue(s, {"router_weights", all_of({logits_TE, indices_TK}), all_of({scores_TE, weights_TK}),
              [=](Ops& ops, Stream& on) {
                ops.router_weights(on, logits_TE, params, indices_TK, scores_TE, weights_TK);
              }});
  }
  void router_backward(Stream& s, const Tensor& dweights_TK, const Tensor& scores_TE,
                       const Tensor& indices_TK, const RouterParams& params,
                       const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                       const Tensor& dlogits_TE) override {
    queue(s, {"router_backward", all_of({dweights_TK, scores_TE, indices_TK, balance_coeff_SE}),
              all_of({dlogits_TE}), [=](Ops& ops, Stream& on) {
                ops.router_backward(on, dweights_TK, scores_TE, indices_TK, params,
                                    balance_coeff_SE, rows, dlogits_TE);
              }});
  }
  void balance_statistics(Stream& s, const Tensor& scores_TE, const Tensor& indices_TK,
                          const RowsOfSequences& rows, const Tensor& load_SE,
                          const Tensor& prob_SE) override {
    queue(s, {"balance_statistics", all_of({scores_TE, indices_TK}), all_of({load_SE, prob_SE}),
              [=](Ops& ops, Stream& on) {
                ops.balance_statistics(on, scores_TE, indices_TK, rows, load_SE, prob_SE);
              }});
  }
  void balance_loss(Stream& s, const Tensor& load_SE, const Tensor& prob_SE,
                    int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                    const Tensor& loss_1, const Tensor& coeff_SE) override {
    queue(s, {"balance_loss", all_of({load_SE, prob_SE}), all_of({loss_1, coeff_SE}),
              [=](Ops& ops, Stream& on) {
                ops.balance_loss(on, load_SE, prob_SE, tokens_per_sequence, experts_per_token,
                                 alpha, loss_1, coeff_SE);
              }});
  }
  void count_experts(Stream& s, const Tensor& indices_TK, const Tensor& counts_E) override {
    queue(s, {"count_experts", all_of({indices_TK}), all_of({counts_E}),
              [=](Ops& ops, Stream& on) { ops.count_experts(on, indices_TK, counts_E); }});
  }
  void router_bias_update(Stream& s, const Tensor& counts_E, double speed,
                          const StepScalars* scalars, const Tensor& bias_E) override {
    queue(s, {"router_bias_update", all_of({counts_E, decision(scalars)}), all_of({bias_E}),
              [=](Ops& ops, Stream& on) {
                ops.router_bias_update(on, counts_E, speed, scalars, bias_E);
              }});
  }
  void sort_by_expert(Stream& s, const Tensor& indices_TK, const Tensor& weights_TK,
                      const Tensor& offsets_E1, const Tensor& token_of_row_R,
                      const Tensor& row_of_slot_TK, const Tensor& row_weight_R) override {
    queue(s, {"sort_by_expert", all_of({indices_TK, weights_TK}),
              all_of({offsets_E1, token_of_row_R, row_of_slot_TK, row_weight_R}),
              [=](Ops& ops, Stream& on) {
                ops.sort_by_expert(on, indices_TK, weights_TK, offsets_E1, token_of_row_R,
                                   row_of_slot_TK, row_weight_R);
              }});
  }
  void combine_rows(Stream& s, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                    const Tensor& addend_TD, const Tensor& out_TD) override {
    queue(s, {"combine_rows", all_of({y_RD, row_of_slot_TK, addend_TD}), all_of({out_TD}),
              [=](Ops& ops, Stream& on) {
                ops.combine_rows(on, y_RD, row_of_slot_TK, addend_TD, out_TD);
              }});
  }
  void gather_rows(Stream& s, const Tensor& x_XD, const Tensor& index_R,
                   const Tensor& y_RD) override {
    queue(s, {"gather_rows", all_of({x_XD, index_R}), all_of({y_RD}),
              [=](Ops& ops, Stream& on) { ops.gather_rows(on, x_XD, index_R, y_RD); }});
  }
  void count_tokens_by_rank(Stream& s, const Tensor& indices_TK, int64_t experts_per_rank,
                            const Tensor& tokens_N) override {
    queue(s, {"count_tokens_by_rank", all_of({indices_TK}), all_of({tokens_N}),
              [=](Ops& ops, Stream& on) {
                ops.count_tokens_by_rank(on, indices_TK, experts_per_rank, tokens_N);
              }});
  }
  void address_tokens(Stream& s, const Tensor& indices_TK, const Tensor& counts_NX, int64_t rank,
                      int64_t round, int64_t window, const Tensor& token_of_row_Z,
                      const Tensor& row_of_token_TN, const Tensor& choices_ZK) override {
    queue(s, {"address_tokens", all_of({indices_TK, counts_NX}),
              all_of({token_of_row_Z, row_of_token_TN, choices_ZK}), [=](Ops& ops, Stream& on) {
                ops.address_tokens(on, indices_TK, counts_NX, rank, round, window, token_of_row_Z,
                                   row_of_token_TN, choices_ZK);
              }});
  }
  void embedding(Stream& s, const Tensor& tokens_T, const Tensor& weight_VD, int64_t vocab_begin,
                 const Tensor& x_TD) override {
    queue(s,
          {"embedding", all_of({tokens_T, weight_VD}), all_of({x_TD}), [=](Ops& ops, Stream& on) {
             ops.embedding(on, tokens_T, weight_VD, vocab_begin, x_TD);
           }});
  }
  void embedding_backward(Stream& s, const Tensor& tokens_T, const Tensor& dx_TD,
                          int64_t vocab_begin, Accumulate accumulate,
                          const Tensor& dweight_VD) override {
    queue(s, {"embedding_backward", all_of({tokens_T, dx_TD}), all_of({dweight_VD}),
              [=](Ops& ops, Stream& on) {
                ops.embedding_backward(on, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
              }});
  }
  void cross_entropy_stats(Stream& s, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                           int64_t vocab_begin, const Tensor& max_T, const Tensor& sum_exp_T,
                           const Tensor& target_T) override {
    queue(s, {"cross_entropy_stats", all_of({logits_TV, targets}),
              all_of({max_T, sum_exp_T, target_T}), [=](Ops& ops, Stream& on) {
                ops.cross_entropy_stats(on, logits_TV, targets, vocab_begin, max_T, sum_exp_T,
                                        target_T);
              }});
  }
  void rescale_sum_exp(Stream& s, const Tensor& local_max_T, const Tensor& max_T,
                       const Tensor& sum_exp_T) override {
    queue(s,
          {"rescale_sum_exp", all_of({local_max_T, max_T}), all_of({sum_exp_T}),
           [=](Ops& ops, Stream& on) { ops.rescale_sum_exp(on, local_max_T, max_T, sum_exp_T); }});
  }
  void cross_entropy_loss(Stream& s, const CrossEntropyTargets& targets, const Tensor& max_T,
                          const Tensor& sum_exp_T, const Tensor& target_T, const Tensor& lse_T,
                          const Tensor& loss_sum_1, const Tensor& token_loss_T) override {
    queue(s, {"cross_entropy_loss", all_of({targets, max_T, sum_exp_T, target_T}),
              all_of({lse_T, loss_sum_1, token_loss_T}), [=](Ops& ops, Stream& on) {
                ops.cross_entropy_loss(on, targets, max_T, sum_exp_T, target_T, lse_T, loss_sum_1,
                                       token_loss_T);
              }});
  }
  void cross_entropy_backward(Stream& s, const Tensor& logits_TV,
                              const CrossEntropyTargets& targets, int64_t vocab_begin,
                              const Tensor& lse_T, const StepScalars* scalars,
                              double factor) override {
    queue(s, {"cross_entropy_backward", all_of({targets, lse_T, inputs(scalars)}),
              all_of({logits_TV}), [=](Ops& ops, Stream& on) {
                ops.cross_entropy_backward(on, logits_TV, targets, vocab_begin, lse_T, scalars,
                                           factor);
              }});
  }
  void add_sum_squares(Stream& s, const Tensor& x, const Tensor& sum_1) override {
    queue(s, {"add_sum_squares", all_of({x}), all_of({sum_1}),
              [=](Ops& ops, Stream& on) { ops.add_sum_squares(on, x, sum_1); }});
  }
  void clip_scale(Stream& s, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                  StepScalars* scalars) override {
    queue(s, {"clip_scale", all_of({sum_1}), all_of({results(scalars)}), [=](Ops& ops, Stream& on) {
                ops.clip_scale(on, sum_1, max_norm, beta1, beta2, scalars);
              }});
  }
  void adamw(Stream& s, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
             const Tensor& param, const Tensor& param_low, const Tensor& exp_avg,
             const Tensor& exp_avg_sq) override {
    queue(s, {"adamw", all_of({scalars, grad}), all_of({param, param_low, exp_avg, exp_avg_sq}),
              [=](Ops& ops, Stream& on) {
                ops.adamw(on, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq);
              }});
  }
  void fill(Stream& s, const Tensor& x, double value) override {
    queue(s,
          {"fill", all_of({}), all_of({x}), [=](Ops& ops, Stream& on) { ops.fill(on, x, value); }});
  }
  void add(Stream& s, const Tensor& a, const Tensor& b, const Tensor& out) override {
    queue(s, {"add", all_of({a, b}), all_of({out}),
              [=](Ops& ops, Stream& on) { ops.add(on, a, b, out); }});
  }
  void convert(Stream& s, const Tensor& source, const Tensor& destination) override {
    queue(s, {"convert", all_of({source}), all_of({destination}),
              [=](Ops& ops, Stream& on) { ops.convert(on, source, destination); }});
  }
  void split_master(Stream& s, const Tensor& master, const Tensor& param,
                    const Tensor& param_low) override {
    queue(s, {"split_master", all_of({master}), all_of({param, param_low}),
              [=](Ops& ops, Stream& on) { ops.split_master(on, master, param, param_low); }});
  }
  void join_master(Stream& s, const Tensor& param, const Tensor& param_low,
                   const Tensor& master) override {
    queue(s, {"join_master", all_of({param, param_low}), all_of({master}),
              [=](Ops& ops, Stream& on) { ops.join_master(on, param, param_low, master); }});
  }
  void fill_normal(Stream& s, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                   const SliceOf& slice) override {
    queue(s, {"fill_normal", all_of({}), all_of({x}),
              [=](Ops& ops, Stream& on) { ops.fill_normal(on, x, seed, stream, std, slice); }});
  }
  void topk_compress(Stream& s, const Tensor& grad_PN, const TopkFormat& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    queue(s, {"topk_compress", all_of({grad_PN}), all_of({residual_PN, payload_PB}),
              [=](Ops& ops, Stream& on) {
                ops.topk_compress(on, grad_PN, format, residual_PN, payload_PB);
              }});
  }
  void topk_sum(Stream& s, const Tensor& payload_PB, const TopkFormat& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    queue(s, {"topk_sum", all_of({payload_PB}), all_of({sum_N}), [=](Ops& ops, Stream& on) {
                ops.topk_sum(on, payload_PB, format, accumulate, sum_N);
              }});
  }
  void int8_compress(Stream& s, const Tensor& grad_PN, const Int8Format& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    queue(s, {"int8_compress", all_of({grad_PN}), all_of({residual_PN, payload_PB}),
              [=](Ops& ops, Stream& on) {
                ops.int8_compress(on, grad_PN, format, residual_PN, payload_PB);
              }});
  }
  void int8_sum(Stream& s, const Tensor& payload_PB, const Int8Format& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    queue(s, {"int8_sum", all_of({payload_PB}), all_of({sum_N}), [=](Ops& ops, Stream& on) {
                ops.int8_sum(on, payload_PB, format, accumulate, sum_N);
              }});
  }
  void clear_if_skipped(Stream& s, const StepScalars* scalars, const Tensor& x) override {
    queue(s, {"clear_if_skipped", all_of({decision(scalars)}), all_of({x}),
              [=](Ops& ops, Stream& on) { ops.clear_if_skipped(on, scalars, x); }});
  }

 protected:
  virtual void queue(Stream& s, OpCall call) = 0;

 private:
  // What an argument lies in.
  class Memory {
   public:
    Memory(const Tensor& x) { add_ranges(x, ranges_); }
    Memory(const RopeTable& rope) {
      add_ranges(rope.cos_PR, ranges_);
      add_ranges(rope.sin_PR, ranges_);
    }
    Memory(const AttentionSegments& segments) {
      add_ranges(segments.table_N4, ranges_);
      add_ranges(segments.count_1, ranges_);
    }
    Memory(const CrossEntropyTargets& targets) {
      add_ranges(targets.hard_T, ranges_);
      add_ranges(targets.soft_index_TK, ranges_);
      add_ranges(targets.soft_prob_TK, ranges_);
    }
    Memory(const StepScalars* scalars) : ranges_{{scalars, sizeof(StepScalars)}} {}
    Memory(MemoryRange range) : ranges_{range} {}
    const std::vector<MemoryRange>& ranges() const { return ranges_; }

   private:
    std::vector<MemoryRange> ranges_;
  };

  static std::vector<MemoryRange> all_of(std::initializer_list<Memory> arguments) {
    std::vector<MemoryRange> ranges;
    for (const Memory& memory : arguments)
      ranges.insert(ranges.end(), memory.ranges().begin(), memory.ranges().end());
    return ranges;
  }
  // What the host writes before a step, what clip_scale() does, and what decides on the update.
  static MemoryRange inputs(const StepScalars* scalars) {
    return {&scalars->in, sizeof scalars->in};
  }
  static MemoryRange results(const StepScalars* scalars) {
    return {&scalars->grad_norm, sizeof *scalars - offsetof(StepScalars, grad_norm)};
  }
  static MemoryRange decision(const StepScalars* scalars) {
    return {&scalars->finite, sizeof scalars->finite};
  }
};

}  // namespace dstrain::test
