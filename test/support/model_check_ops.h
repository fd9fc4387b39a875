// Ops that pass every call on. Tests override what should go wrong, so that a check can be seen to
// notice it, or look at tensors between operations.
#pragma once

#include "core/backend/ops.h"

namespace dstrain::test {

class ForwardingOps : public Ops {
 public:
  explicit ForwardingOps(Ops& ops) : ops_(ops) {}

  void matmul(Stream& s, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
              double beta, const Tensor& c) override {
    ops_.matmul(s, ta, tb, alpha, a, b, beta, c);
    after_op();
  }
  void grouped_matmul(Stream& s, const Tensor& x_XI, const Tensor& row_index_R,
                      const Tensor& weight_EOI, const Tensor& offsets_E1,
                      const Tensor& y_RO) override {
    ops_.grouped_matmul(s, x_XI, row_index_R, weight_EOI, offsets_E1, y_RO);
    after_op();
  }
  void grouped_matmul_backward_input(Stream& s, const Tensor& dy_XO, const Tensor& row_index_R,
                                     const Tensor& weight_EOI, const Tensor& offsets_E1,
                                     const Tensor& dx_RI) override {
    ops_.grouped_matmul_backward_input(s, dy_XO, row_index_R, weight_EOI, offsets_E1, dx_RI);
    after_op();
  }
  void grouped_matmul_backward_weight(Stream& s, const Tensor& dy_XO, const Tensor& dy_index_R,
                                      const Tensor& x_XI, const Tensor& x_index_R,
                                      const Tensor& offsets_E1, Accumulate accumulate,
                                      const Tensor& dweight_EOI) override {
    ops_.grouped_matmul_backward_weight(s, dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1,
                                        accumulate, dweight_EOI);
    after_op();
  }
  void ffn_up(Stream& s, const Tensor& x_XD, const Tensor& row_index_R, const Tensor& weight_E2ID,
              const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
              const Tensor& h_RI) override {
    ops_.ffn_up(s, x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
    after_op();
  }
  void ffn_down_backward_input(Stream& s, const Tensor& dy_XD, const Tensor& row_index_R,
                               const Tensor& weight_EDI, const Tensor& offsets_E1,
                               const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                               const Tensor& dgate_up_R2I, const Tensor& h_RI,
                               const Tensor& drow_weight_R) override {
    ops_.ffn_down_backward_input(s, dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I,
                                 row_weight_R, dgate_up_R2I, h_RI, drow_weight_R);
    after_op();
  }
  void add_rms_norm(Stream& s, const Tensor& x_TD, const Tensor& delta_TD, const Tensor& weight_D,
                    double eps, const Tensor& sum_TD, const Tensor& y_TD,
                    const Tensor& rstd_T) override {
    ops_.add_rms_norm(s, x_TD, delta_TD, weight_D, eps, sum_TD, y_TD, rstd_T);
    after_op();
  }
  void rms_norm_backward(Stream& s, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& weight_D,
                         const Tensor& rstd_T, const Tensor& dresidual_TD, Accumulate accumulate,
                         const Tensor& dx_TD, const Tensor& dweight_D) override {
    ops_.rms_norm_backward(s, dy_TD, x_TD, weight_D, rstd_T, dresidual_TD, accumulate, dx_TD,
                           dweight_D);
    after_op();
  }
  void mla_qkv(Stream& s, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_b_THX,
               const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
               const Tensor& v_THW) override {
    ops_.mla_qkv(s, q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW);
    after_op();
  }
  void mla_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_THQ, const Tensor& dv_THW,
                        const RopeTable& rope, const Tensor& positions_T, const Tensor& dk_rope_TP,
                        const Tensor& dkv_b_THX) override {
    ops_.mla_qkv_backward(s, dq_THQ, dk_THQ, dv_THW, rope, positions_T, dk_rope_TP, dkv_b_THX);
    after_op();
  }
  void gqa_qkv(Stream& s, const Tensor& qkv_TX, const RopeTable& rope, const Tensor& positions_T,
               const Tensor& q_THQ, const Tensor& k_TGQ, const Tensor& v_TGW) override {
    ops_.gqa_qkv(s, qkv_TX, rope, positions_T, q_THQ, k_TGQ, v_TGW);
    after_op();
  }
  void gqa_qkv_backward(Stream& s, const Tensor& dq_THQ, const Tensor& dk_TGQ, const Tensor& dv_TGW,
                        const RopeTable& rope, const Tensor& positions_T,
                        const Tensor& dqkv_TX) override {
    ops_.gqa_qkv_backward(s, dq_THQ, dk_TGQ, dv_TGW, rope, positions_T, dqkv_TX);
    after_op();
  }
  void attention(Stream& s, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                 const AttentionSegments& segments, double scale, const Tensor& o_THW,
                 const Tensor& lse_TH) override {
    ops_.attention(s, q_THQ, k_UGQ, v_UGW, segments, scale, o_THW, lse_TH);
    after_op();
  }
  void attention_backward(Stream& s, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override {
    ops_.attention_backward(s, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments, scale, dq_THQ,
                            dk_UGQ, dv_UGW);
    after_op();
  }
  void merge_attention(Stream& s, const Tensor& part_THW, const Tensor& part_lse_TH,
                       const AttentionSegments& segments, const Tensor& o_THW, const Tensor& lse_TH,
                       const Tensor& out_THW) override {
    ops_.merge_attention(s, part_THW, part_lse_TH, segments, o_THW, lse_TH, out_THW);
    after_op();
  }
  void add_bias(Stream& s, const Tensor& x_TD, const Tensor& bias_D) override {
    ops_.add_bias(s, x_TD, bias_D);
    after_op();
  }
  void bias_backward(Stream& s, const Tensor& dy_TD, Accumulate accumulate,
                     const Tensor& dbias_D) override {
    ops_.bias_backward(s, dy_TD, accumulate, dbias_D);
    after_op();
  }
  void router_topk(Stream& s, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                   const Tensor& weights_TK) override {
    ops_.router_topk(s, logits_TE, bias_E, params, scores_TE, indices_TK, weights_TK);
    after_op();
  }
  void router_weights(Stream& s, const Tensor& logits_TE, const RouterParams& params,
                      const Tensor& indices_TK, const Tensor& scores_TE,
                      const Tensor& weights_TK) override {
    ops_.router_weights(s, logits_TE, params, indices_TK, scores_TE, weights_TK);
    after_op();
  }
  void router_backward(Stream& s, const Tensor& dweights_TK, const Tensor& scores_TE,
                       const Tensor& indices_TK, const RouterParams& params,
                       const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                       const Tensor& dlogits_TE) override {
    ops_.router_backward(s, dweights_TK, scores_TE, indices_TK, params, balance_coeff_SE, rows,
                         dlogits_TE);
    after_op();
  }
  void balance_statistics(Stream& s, const Tensor& scores_TE, const Tensor& indices_TK,
                          const RowsOfSequences& rows, const Tensor& load_SE,
                          const Tensor& prob_SE) override {
    ops_.balance_statistics(s, scores_TE, indices_TK, rows, load_SE, prob_SE);
    after_op();
  }
  void balance_loss(Stream& s, const Tensor& load_SE, const Tensor& prob_SE,
                    int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                    const Tensor& loss_1, const Tensor& coeff_SE) override {
    ops_.balance_loss(s, load_SE, prob_SE, tokens_per_sequence, experts_per_token, alpha, loss_1,
                      coeff_SE);
    after_op();
  }
  void count_experts(Stream& s, const Tensor& indices_TK, const Tensor& counts_E) override {
    ops_.count_experts(s, indices_TK, counts_E);
    after_op();
  }
  void router_bias_update(Stream& s, const Tensor& counts_E, double speed,
                          const StepScalars* scalars, const Tensor& bias_E) override {
    ops_.router_bias_update(s, counts_E, speed, scalars, bias_E);
    after_op();
  }
  void sort_by_expert(Stream& s, const Tensor& indices_TK, const Tensor& weights_TK,
                      const Tensor& offsets_E1, const Tensor& token_of_row_R,
                      const Tensor& row_of_slot_TK, const Tensor& row_weight_R) override {
    ops_.sort_by_expert(s, indices_TK, weights_TK, offsets_E1, token_of_row_R, row_of_slot_TK,
                        row_weight_R);
    after_op();
  }
  void combine_rows(Stream& s, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                    const Tensor& addend_TD, const Tensor& out_TD) override {
    ops_.combine_rows(s, y_RD, row_of_slot_TK, addend_TD, out_TD);
    after_op();
  }
  void gather_rows(Stream& s, const Tensor& x_XD, const Tensor& index_R,
                   const Tensor& y_RD) override {
    ops_.gather_rows(s, x_XD, index_R, y_RD);
    after_op();
  }
  void count_tokens_by_rank(Stream& s, const Tensor& indices_TK, int64_t experts_per_rank,
                            const Tensor& tokens_N) override {
    ops_.count_tokens_by_rank(s, indices_TK, experts_per_rank, tokens_N);
  }
  void address_tokens(Stream& s, const Tensor& indices_TK, const Tensor& counts_NX, int64_t rank,
                      int64_t round, int64_t window, const Tensor& token_of_row_Z,
                      const Tensor& row_of_token_TN, const Tensor& choices_ZK) override {
    ops_.address_tokens(s, indices_TK, counts_NX, rank, round, window, token_of_row_Z,
                        row_of_token_TN, choices_ZK);
  }
  void embedding(Stream& s, const Tensor& tokens_T, const Tensor& weight_VD, int64_t vocab_begin,
                 const Tensor& x_TD) override {
    ops_.embedding(s, tokens_T, weight_VD, vocab_begin, x_TD);
    after_op();
  }
  void embedding_backward(Stream& s, const Tensor& tokens_T, const Tensor& dx_TD,
                          int64_t vocab_begin, Accumulate accumulate,
                          const Tensor& dweight_VD) override {
    ops_.embedding_backward(s, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
    after_op();
  }
  void cross_entropy_stats(Stream& s, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                           int64_t vocab_begin, const Tensor& max_T, const Tensor& sum_exp_T,
                           const Tensor& target_T) override {
    ops_.cross_entropy_stats(s, logits_TV, targets, vocab_begin, max_T, sum_exp_T, target_T);
    after_op();
  }
  void rescale_sum_exp(Stream& s, const Tensor& local_max_T, const Tensor& max_T,
                       const Tensor& sum_exp_T) override {
    ops_.rescale_sum_exp(s, local_max_T, max_T, sum_exp_T);
    after_op();
  }
  void cross_entropy_loss(Stream& s, const CrossEntropyTargets& targets, const Tensor& max_T,
                          const Tensor& sum_exp_T, const Tensor& target_T, const Tensor& lse_T,
                          const Tensor& loss_sum_1, const Tensor& token_loss_T) override {
    ops_.cross_entropy_loss(s, targets, max_T, sum_exp_T, target_T, lse_T, loss_sum_1,
                            token_loss_T);
    after_op();
  }
  void cross_entropy_backward(Stream& s, const Tensor& logits_TV,
                              const CrossEntropyTargets& targets, int64_t vocab_begin,
                              const Tensor& lse_T, const StepScalars* scalars,
                              double factor) override {
    ops_.cross_entropy_backward(s, logits_TV, targets, vocab_begin, lse_T, scalars, factor);
    after_op();
  }
  void add_sum_squares(Stream& s, const Tensor& x, const Tensor& sum_1) override {
    ops_.add_sum_squares(s, x, sum_1);
    after_op();
  }
  void clip_scale(Stream& s, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                  StepScalars* scalars) override {
    ops_.clip_scale(s, sum_1, max_norm, beta1, beta2, scalars);
    after_op();
  }
  void adamw(Stream& s, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
             const Tensor& param, const Tensor& param_low, const Tensor& exp_avg,
             const Tensor& exp_avg_sq) override {
    ops_.adamw(s, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq);
    after_op();
  }
  void fill(Stream& s, const Tensor& x, double value) override {
    ops_.fill(s, x, value);
    after_op();
  }
  void add(Stream& s, const Tensor& a, const Tensor& b, const Tensor& out) override {
    ops_.add(s, a, b, out);
    after_op();
  }
  void split_master(Stream& s, const Tensor& master, const Tensor& param,
                    const Tensor& low) override {
    ops_.split_master(s, master, param, low);
    after_op();
  }
  void join_master(Stream& s, const Tensor& param, const Tensor& low,
                   const Tensor& master) override {
    ops_.join_master(s, param, low, master);
    after_op();
  }
  void convert(Stream& s, const Tensor& source, const Tensor& destination) override {
    ops_.convert(s, source, destination);
    after_op();
  }
  void fill_normal(Stream& s, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                   const SliceOf& slice) override {
    ops_.fill_normal(s, x, seed, stream, std, slice);
    after_op();
  }
  void topk_compress(Stream& s, const Tensor& grad_PN, const TopkFormat& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    ops_.topk_compress(s, grad_PN, format, residual_PN, payload_PB);
    after_op();
  }
  void topk_sum(Stream& s, const Tensor& payload_PB, const TopkFormat& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    ops_.topk_sum(s, payload_PB, format, accumulate, sum_N);
    after_op();
  }
  void int8_compress(Stream& s, const Tensor& grad_PN, const Int8Format& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override {
    ops_.int8_compress(s, grad_PN, format, residual_PN, payload_PB);
    after_op();
  }
  void int8_sum(Stream& s, const Tensor& payload_PB, const Int8Format& format,
                Accumulate accumulate, const Tensor& sum_N) override {
    ops_.int8_sum(s, payload_PB, format, accumulate, sum_N);
    after_op();
  }
  void clear_if_skipped(Stream& s, const StepScalars* scalars, const Tensor& x) override {
    ops_.clear_if_skipped(s, scalars, x);
    after_op();
  }

 protected:
  virtual void after_op() {}  // what a call of any operation ends with

  Ops& ops_;
};

}  // namespace dstrain::test
