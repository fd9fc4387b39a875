#include "core/backend/timed_ops.h"

#include <fmt/format.h>

#include <initializer_list>
#include <utility>

namespace dstrain {
namespace {

double bytes_of(std::initializer_list<const Tensor*> tensors) {
  double bytes = 0;
  for (const Tensor* x : tensors)
    if (x->defined()) bytes += static_cast<double>(x->bytes());
  return bytes;
}

// Of as many rows of x as `like` has.
double rows_bytes(const Tensor& like, const Tensor& x) {
  return static_cast<double>(like.size(0) * x.row_numel() * dtype_bytes(x.dtype()));
}

double product_flops(double m, double n, double k) {
  return 2 * m * n * k;
}

double size(const Tensor& x, int dim) {
  return static_cast<double>(x.size(dim));
}

// Scores and values of every query with its keys: uniform segments exactly, others as if they were.
double attention_flops(const Tensor& q_THQ, const Tensor& v_UGW,
                       const AttentionSegments& segments) {
  const double keys = static_cast<double>(segments.max_keys),
               queries = static_cast<double>(segments.max_queries);
  const double mean_keys = keys - (queries - 1) / 2;
  return 2 * size(q_THQ, 0) * size(q_THQ, 1) * mean_keys * (size(q_THQ, 2) + size(v_UGW, 2));
}

}  // namespace

template <class Run>
void TimedOps::timed(Stream& stream, std::string name, double flops, double bytes, const Run& run) {
  const int begin = clock_.mark(stream);
  run();
  calls_.push_back({std::move(name), flops, bytes, begin, clock_.mark(stream)});
}

std::map<std::string, OpTotal> TimedOps::take_totals() {
  std::map<std::string, OpTotal> totals;
  for (const Call& call : calls_) {
    OpTotal& total = totals[call.name];
    ++total.calls;
    total.seconds += clock_.seconds_between(call.begin, call.end);
    total.flops += call.flops;
    total.bytes += call.bytes;
  }
  calls_.clear();
  clock_.clear();
  return totals;
}

void TimedOps::matmul(Stream& stream, Trans ta, Trans tb, double alpha, const Tensor& a,
                      const Tensor& b, double beta, const Tensor& c) {
  timed(stream,
        fmt::format("matmul {}x{}x{}{}{} {}", c.size(0), c.size(1),
                    ta == Trans::no ? a.size(1) : a.size(0), ta == Trans::no ? " n" : " t",
                    tb == Trans::no ? "n" : "t", dtype_name(c.dtype())),
        product_flops(size(c, 0), size(c, 1), size(a, ta == Trans::no ? 1 : 0)),
        bytes_of({&a, &b, &c}) + (beta == 0 ? 0 : bytes_of({&c})),
        [&] { inner_.matmul(stream, ta, tb, alpha, a, b, beta, c); });
}

void TimedOps::grouped_matmul(Stream& stream, const Tensor& x_XI, const Tensor& row_index_R,
                              const Tensor& weight_EOI, const Tensor& offsets_E1,
                              const Tensor& y_RO) {
  timed(stream, "grouped_matmul",
        product_flops(size(y_RO, 0), size(y_RO, 1), static_cast<double>(x_XI.row_numel())),
        rows_bytes(y_RO, x_XI) + bytes_of({&weight_EOI, &y_RO}),
        [&] { inner_.grouped_matmul(stream, x_XI, row_index_R, weight_EOI, offsets_E1, y_RO); });
}

void TimedOps::grouped_matmul_backward_input(Stream& stream, const Tensor& dy_XO,
                                             const Tensor& row_index_R, const Tensor& weight_EOI,
                                             const Tensor& offsets_E1, const Tensor& dx_RI) {
  timed(stream, "grouped_matmul_backward_input",
        product_flops(size(dx_RI, 0), size(dx_RI, 1), static_cast<double>(dy_XO.row_numel())),
        rows_bytes(dx_RI, dy_XO) + bytes_of({&weight_EOI, &dx_RI}), [&] {
          inner_.grouped_matmul_backward_input(stream, dy_XO, row_index_R, weight_EOI, offsets_E1,
                                               dx_RI);
        });
}

void TimedOps::grouped_matmul_backward_weight(Stream& stream, const Tensor& dy_XO,
                                              const Tensor& dy_index_R, const Tensor& x_XI,
                                              const Tensor& x_index_R, const Tensor& offsets_E1,
                                              Accumulate accumulate, const Tensor& dweight_EOI) {
  timed(
      stream, "grouped_matmul_backward_weight",
      product_flops(size(dy_index_R.defined()  ? dy_index_R
                         : x_index_R.defined() ? x_index_R
                                               : x_XI,
                         0),
                    static_cast<double>(dy_XO.row_numel()), static_cast<double>(x_XI.row_numel())),
      bytes_of({&dy_XO, &x_XI, &dweight_EOI}) +
          (accumulate == Accumulate::add ? bytes_of({&dweight_EOI}) : 0),
      [&] {
        inner_.grouped_matmul_backward_weight(stream, dy_XO, dy_index_R, x_XI, x_index_R,
                                              offsets_E1, accumulate, dweight_EOI);
      });
}

void TimedOps::ffn_up(Stream& stream, const Tensor& x_XD, const Tensor& row_index_R,
                      const Tensor& weight_E2ID, const Tensor& offsets_E1,
                      const Tensor& row_weight_R, const Tensor& gate_up_R2I, const Tensor& h_RI) {
  timed(stream, "ffn_up",
        product_flops(size(h_RI, 0), static_cast<double>(gate_up_R2I.row_numel()),
                      static_cast<double>(x_XD.row_numel())),
        rows_bytes(h_RI, x_XD) + bytes_of({&weight_E2ID, &gate_up_R2I, &h_RI}), [&] {
          inner_.ffn_up(stream, x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R,
                        gate_up_R2I, h_RI);
        });
}

void TimedOps::ffn_down_backward_input(Stream& stream, const Tensor& dy_XD,
                                       const Tensor& row_index_R, const Tensor& weight_EDI,
                                       const Tensor& offsets_E1, const Tensor& gate_up_R2I,
                                       const Tensor& row_weight_R, const Tensor& dgate_up_R2I,
                                       const Tensor& h_RI, const Tensor& drow_weight_R) {
  timed(stream, "ffn_down_backward_input",
        product_flops(size(h_RI, 0), static_cast<double>(h_RI.row_numel()),
                      static_cast<double>(dy_XD.row_numel())),
        rows_bytes(h_RI, dy_XD) + bytes_of({&weight_EDI, &gate_up_R2I, &dgate_up_R2I, &h_RI}), [&] {
          inner_.ffn_down_backward_input(stream, dy_XD, row_index_R, weight_EDI, offsets_E1,
                                         gate_up_R2I, row_weight_R, dgate_up_R2I, h_RI,
                                         drow_weight_R);
        });
}

void TimedOps::add_rms_norm(Stream& stream, const Tensor& x_TD, const Tensor& delta_TD,
                            const Tensor& weight_D, double eps, const Tensor& sum_TD,
                            const Tensor& y_TD, const Tensor& rstd_T) {
  timed(stream, "add_rms_norm", 0, bytes_of({&x_TD, &delta_TD, &weight_D, &sum_TD, &y_TD, &rstd_T}),
        [&] { inner_.add_rms_norm(stream, x_TD, delta_TD, weight_D, eps, sum_TD, y_TD, rstd_T); });
}

void TimedOps::rms_norm_backward(Stream& stream, const Tensor& dy_TD, const Tensor& x_TD,
                                 const Tensor& weight_D, const Tensor& rstd_T,
                                 const Tensor& dresidual_TD, Accumulate accumulate,
                                 const Tensor& dx_TD, const Tensor& dweight_D) {
  timed(stream, "rms_norm_backward", 0,
        bytes_of({&dy_TD, &x_TD, &weight_D, &rstd_T, &dresidual_TD, &dx_TD, &dweight_D}), [&] {
          inner_.rms_norm_backward(stream, dy_TD, x_TD, weight_D, rstd_T, dresidual_TD, accumulate,
                                   dx_TD, dweight_D);
        });
}

void TimedOps::mla_qkv(Stream& stream, const Tensor& q_THQ, const Tensor& k_rope_TP,
                       const Tensor& kv_b_THX, const RopeTable& rope, const Tensor& positions_T,
                       const Tensor& k_THQ, const Tensor& v_THW) {
  timed(
      stream, "mla_qkv", 0, bytes_of({&q_THQ, &k_rope_TP, &kv_b_THX, &positions_T, &k_THQ, &v_THW}),
      [&] { inner_.mla_qkv(stream, q_THQ, k_rope_TP, kv_b_THX, rope, positions_T, k_THQ, v_THW); });
}

void TimedOps::mla_qkv_backward(Stream& stream, const Tensor& dq_THQ, const Tensor& dk_THQ,
                                const Tensor& dv_THW, const RopeTable& rope,
                                const Tensor& positions_T, const Tensor& dk_rope_TP,
                                const Tensor& dkv_b_THX) {
  timed(stream, "mla_qkv_backward", 0,
        bytes_of({&dq_THQ, &dk_THQ, &dv_THW, &positions_T, &dk_rope_TP, &dkv_b_THX}), [&] {
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

void TimedOps::add_bias(Stream& stream, const Tensor& x_TD, const Tensor& bias_D) {
  timed(stream, "add_bias", 0, bytes_of({&x_TD, &bias_D, &x_TD}),
        [&] { inner_.add_bias(stream, x_TD, bias_D); });
}

void TimedOps::bias_backward(Stream& stream, const Tensor& dy_TD, Accumulate accumulate,
                             const Tensor& dbias_D) {
  timed(stream, "bias_backward", 0, bytes_of({&dy_TD, &dbias_D}),
        [&] { inner_.bias_backward(stream, dy_TD, accumulate, dbias_D); });
}

void TimedOps::router_topk(Stream& stream, const Tensor& logits_TE, const Tensor& bias_E,
                           const RouterParams& params, const Tensor& scores_TE,
                           const Tensor& indices_TK, const Tensor& weights_TK) {
  timed(stream, "router_topk", 0,
        bytes_of({&logits_TE, &bias_E, &scores_TE, &indices_TK, &weights_TK}), [&] {
          inner_.router_topk(stream, logits_TE, bias_E, params, scores_TE, indices_TK, weights_TK);
        });
}

void TimedOps::router_weights(Stream& stream, const Tensor& logits_TE, const RouterParams& params,
                              const Tensor& indices_TK, const Tensor& scores_TE,
                              const Tensor& weights_TK) {
  timed(
      stream, "router_weights", 0, bytes_of({&logits_TE, &indices_TK, &scores_TE, &weights_TK}),
      [&] { inner_.router_weights(stream, logits_TE, params, indices_TK, scores_TE, weights_TK); });
}

void TimedOps::router_backward(Stream& stream, const Tensor& dweights_TK, const Tensor& scores_TE,
                               const Tensor& indices_TK, const RouterParams& params,
                               const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                               const Tensor& dlogits_TE) {
  timed(stream, "router_backward", 0,
        bytes_of({&dweights_TK, &scores_TE, &indices_TK, &balance_coeff_SE, &dlogits_TE}), [&] {
          inner_.router_backward(stream, dweights_TK, scores_TE, indices_TK, params,
                                 balance_coeff_SE, rows, dlogits_TE);
        });
}

void TimedOps::balance_statistics(Stream& stream, const Tensor& scores_TE, const Tensor& indices_TK,
                                  const RowsOfSequences& rows, const Tensor& load_SE,
                                  const Tensor& prob_SE) {
  timed(stream, "balance_statistics", 0, bytes_of({&scores_TE, &indices_TK, &load_SE, &prob_SE}),
        [&] { inner_.balance_statistics(stream, scores_TE, indices_TK, rows, load_SE, prob_SE); });
}

void TimedOps::balance_loss(Stream& stream, const Tensor& load_SE, const Tensor& prob_SE,
                            int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                            const Tensor& loss_1, const Tensor& coeff_SE) {
  timed(stream, "balance_loss", 0, bytes_of({&load_SE, &prob_SE, &loss_1, &coeff_SE}), [&] {
    inner_.balance_loss(stream, load_SE, prob_SE, tokens_per_sequence, experts_per_token, alpha,
                        loss_1, coeff_SE);
  });
}

void TimedOps::count_experts(Stream& stream, const Tensor& indices_TK, const Tensor& counts_E) {
  timed(stream, "count_experts", 0, bytes_of({&indices_TK, &counts_E}),
        [&] { inner_.count_experts(stream, indices_TK, counts_E); });
}

void TimedOps::router_bias_update(Stream& stream, const Tensor& counts_E, double speed,
                                  const StepScalars* scalars, const Tensor& bias_E) {
  timed(stream, "router_bias_update", 0, bytes_of({&counts_E, &bias_E}),
        [&] { inner_.router_bias_update(stream, counts_E, speed, scalars, bias_E); });
}

void TimedOps::sort_by_expert(Stream& stream, const Tensor& indices_TK, const Tensor& weights_TK,
                              const Tensor& offsets_E1, const Tensor& token_of_row_R,
                              const Tensor& row_of_slot_TK, const Tensor& row_weight_R) {
  timed(stream, "sort_by_expert", 0,
        bytes_of({&indices_TK, &weights_TK, &offsets_E1, &token_of_row_R, &row_of_slot_TK,
                  &row_weight_R}),
        [&] {
          inner_.sort_by_expert(stream, indices_TK, weights_TK, offsets_E1, token_of_row_R,
                                row_of_slot_TK, row_weight_R);
        });
}

void TimedOps::combine_rows(Stream& stream, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                            const Tensor& addend_TD, const Tensor& out_TD) {
  timed(stream, "combine_rows", 0, bytes_of({&y_RD, &row_of_slot_TK, &addend_TD, &out_TD}),
        [&] { inner_.combine_rows(stream, y_RD, row_of_slot_TK, addend_TD, out_TD); });
}

void TimedOps::gather_rows(Stream& stream, const Tensor& x_XD, const Tensor& index_R,
                           const Tensor& y_RD) {
  timed(stream, "gather_rows", 0, bytes_of({&index_R, &y_RD, &y_RD}),
        [&] { inner_.gather_rows(stream, x_XD, index_R, y_RD); });
}

void TimedOps::count_tokens_by_rank(Stream& stream, const Tensor& indices_TK,
                                    int64_t experts_per_rank, const Tensor& tokens_N) {
  timed(stream, "count_tokens_by_rank", 0, bytes_of({&indices_TK, &tokens_N}),
        [&] { inner_.count_tokens_by_rank(stream, indices_TK, experts_per_rank, tokens_N); });
}

void TimedOps::address_tokens(Stream& stream, const Tensor& indices_TK, const Tensor& counts_NX,
                              int64_t rank, int64_t round, int64_t window,
                              const Tensor& token_of_row_Z, const Tensor& row_of_token_TN,
                              const Tensor& choices_ZK) {
  timed(stream, "address_tokens", 0,
        bytes_of({&indices_TK, &counts_NX, &token_of_row_Z, &row_of_token_TN, &choices_ZK}), [&] {
          inner_.address_tokens(stream, indices_TK, counts_NX, rank, round, window, token_of_row_Z,
                                row_of_token_TN, choices_ZK);
        });
}

void TimedOps::embedding(Stream& stream, const Tensor& tokens_T, const Tensor& weight_VD,
                         int64_t vocab_begin, const Tensor& x_TD) {
  timed(stream, "embedding", 0, bytes_of({&tokens_T, &x_TD, &x_TD}),
        [&] { inner_.embedding(stream, tokens_T, weight_VD, vocab_begin, x_TD); });
}

void TimedOps::embedding_backward(Stream& stream, const Tensor& tokens_T, const Tensor& dx_TD,
                                  int64_t vocab_begin, Accumulate accumulate,
                                  const Tensor& dweight_VD) {
  timed(stream, "embedding_backward", 0,
        bytes_of({&tokens_T, &dx_TD}) +
            (accumulate == Accumulate::add ? 2 * bytes_of({&dx_TD}) : bytes_of({&dweight_VD})),
        [&] {
          inner_.embedding_backward(stream, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
        });
}

void TimedOps::cross_entropy_stats(Stream& stream, const Tensor& logits_TV,
                                   const CrossEntropyTargets& targets, int64_t vocab_begin,
                                   const Tensor& max_T, const Tensor& sum_exp_T,
                                   const Tensor& target_T) {
  timed(stream, "cross_entropy_stats", 0, bytes_of({&logits_TV, &max_T, &sum_exp_T, &target_T}),
        [&] {
          inner_.cross_entropy_stats(stream, logits_TV, targets, vocab_begin, max_T, sum_exp_T,
                                     target_T);
        });
}

void TimedOps::rescale_sum_exp(Stream& stream, const Tensor& local_max_T, const Tensor& max_T,
                               const Tensor& sum_exp_T) {
  timed(stream, "rescale_sum_exp", 0, bytes_of({&local_max_T, &max_T, &sum_exp_T}),
        [&] { inner_.rescale_sum_exp(stream, local_max_T, max_T, sum_exp_T); });
}

void TimedOps::cross_entropy_loss(Stream& stream, const CrossEntropyTargets& targets,
                                  const Tensor& max_T, const Tensor& sum_exp_T,
                                  const Tensor& target_T, const Tensor& lse_T,
                                  const Tensor& loss_sum_1, const Tensor& token_loss_T) {
  timed(stream, "cross_entropy_loss", 0, bytes_of({&max_T, &sum_exp_T, &target_T, &lse_T}), [&] {
    inner_.cross_entropy_loss(stream, targets, max_T, sum_exp_T, target_T, lse_T, loss_sum_1,
                              token_loss_T);
  });
}

void TimedOps::cross_entropy_backward(Stream& stream, const Tensor& logits_TV,
                                      const CrossEntropyTargets& targets, int64_t vocab_begin,
                                      const Tensor& lse_T, const StepScalars* scalars,
                                      double factor) {
  timed(stream, "cross_entropy_backward", 0, 2 * bytes_of({&logits_TV}), [&] {
    inner_.cross_entropy_backward(stream, logits_TV, targets, vocab_begin, lse_T, scalars, factor);
  });
}

void TimedOps::add_sum_squares(Stream& stream, const Tensor& x, const Tensor& sum_1) {
  timed(stream, "add_sum_squares", 0, bytes_of({&x, &sum_1}),
        [&] { inner_.add_sum_squares(stream, x, sum_1); });
}

void TimedOps::clip_scale(Stream& stream, const Tensor& sum_1, double max_norm, double beta1,
                          double beta2, StepScalars* scalars) {
  timed(stream, "clip_scale", 0, bytes_of({&sum_1}),
        [&] { inner_.clip_scale(stream, sum_1, max_norm, beta1, beta2, scalars); });
}

void TimedOps::adamw(Stream& stream, const AdamWParams& params, const StepScalars* scalars,
                     const Tensor& grad, const Tensor& param, const Tensor& param_low,
                     const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  timed(
      stream, "adamw", 0,
      bytes_of({&grad, &param, &param_low, &exp_avg, &exp_avg_sq, &param, &param_low, &exp_avg,
                &exp_avg_sq}),
      [&] { inner_.adamw(stream, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq); });
}

void TimedOps::fill(Stream& stream, const Tensor& x, double value) {
  timed(stream, "fill", 0, bytes_of({&x}), [&] { inner_.fill(stream, x, value); });
}

void TimedOps::add(Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) {
  timed(stream, "add", 0, bytes_of({&a, &b, &out}), [&] { inner_.add(stream, a, b, out); });
}

void TimedOps::convert(Stream& stream, const Tensor& source, const Tensor& destination) {
  timed(stream, "convert", 0, bytes_of({&source, &destination}),
        [&] { inner_.convert(stream, source, destination); });
}

void TimedOps::split_master(Stream& stream, const Tensor& master, const Tensor& param,
                            const Tensor& param_low) {
  timed(stream, "split_master", 0, bytes_of({&master, &param, &param_low}),
        [&] { inner_.split_master(stream, master, param, param_low); });
}

void TimedOps::join_master(Stream& stream, const Tensor& param, const Tensor& param_low,
                           const Tensor& master) {
  timed(stream, "join_master", 0, bytes_of({&param, &param_low, &master}),
        [&] { inner_.join_master(stream, param, param_low, master); });
}

void TimedOps::fill_normal(Stream& stream, const Tensor& x, uint64_t seed, uint64_t counter_stream,
                           double std, const SliceOf& slice) {
  timed(stream, "fill_normal", 0, bytes_of({&x}),
        [&] { inner_.fill_normal(stream, x, seed, counter_stream, std, slice); });
}

void TimedOps::topk_compress(Stream& stream, const Tensor& grad_PN, const TopkFormat& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) {
  timed(stream, "topk_compress", 0, bytes_of({&grad_PN, &residual_PN, &payload_PB, &residual_PN}),
        [&] { inner_.topk_compress(stream, grad_PN, format, residual_PN, payload_PB); });
}

void TimedOps::topk_sum(Stream& stream, const Tensor& payload_PB, const TopkFormat& format,
                        Accumulate accumulate, const Tensor& sum_N) {
  const double read = accumulate == Accumulate::add ? bytes_of({&sum_N}) : 0;
  timed(stream, "topk_sum", 0, bytes_of({&payload_PB, &sum_N}) + read,
        [&] { inner_.topk_sum(stream, payload_PB, format, accumulate, sum_N); });
}

void TimedOps::int8_compress(Stream& stream, const Tensor& grad_PN, const Int8Format& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) {
  timed(stream, "int8_compress", 0, bytes_of({&grad_PN, &residual_PN, &payload_PB, &residual_PN}),
        [&] { inner_.int8_compress(stream, grad_PN, format, residual_PN, payload_PB); });
}

void TimedOps::int8_sum(Stream& stream, const Tensor& payload_PB, const Int8Format& format,
                        Accumulate accumulate, const Tensor& sum_N) {
  const double read = accumulate == Accumulate::add ? bytes_of({&sum_N}) : 0;
  timed(stream, "int8_sum", 0, bytes_of({&payload_PB, &sum_N}) + read,
        [&] { inner_.int8_sum(stream, payload_PB, format, accumulate, sum_N); });
}

void TimedOps::clear_if_skipped(Stream& stream, const StepScalars* scalars, const Tensor& x) {
  timed(stream, "clear_if_skipped", 0, bytes_of({&x, &x}),
        [&] { inner_.clear_if_skipped(stream, scalars, x); });
}

}  // namespace dstrain
