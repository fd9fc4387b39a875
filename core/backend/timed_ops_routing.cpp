// Routing, and rows on their way to experts and back, on a clock.
#include "core/backend/op_cost.h"
#include "core/backend/timed_ops.h"

namespace dstrain {

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

}  // namespace dstrain
