// Every numerical operation of the trainer. One interface, one meaning on each back end.
//
// Rules that hold for all of them:
//  - A call is asynchronous on its stream; inputs and outputs must stay valid until it has passed.
//    No call allocates or makes the host wait.
//  - Element types: F is f32, bf16 (CUDA) or f64 (CPU, for gradient checks). Statistics S (rstd,
//    log-sum-exp, scores, routing weights) are f32, or f64 where F is f64. Parameter gradients are
//    f32 (f64 with F = f64) whatever F is. Sums are f32 or better.
//  - Parameter gradients follow `Accumulate`; activation gradients are overwritten unless said.
//  - Empty is legal: zero tokens, experts without rows.
//  - Outputs do not overlap inputs unless the op says "in place" or "may alias".
//  - Results do not depend on how many threads a CPU back end has.
// Letters: T tokens, D hidden size, V vocabulary, H query heads, G key/value heads, Q width of a
// query/key head, W width of a value head, E experts, K experts per token, R = T*K routed rows,
// I intermediate size, S sequences, N attention segments.
#pragma once

#include <cstdint>

#include "core/backend/backend.h"
#include "core/backend/compressed_format.h"
#include "core/tensor/tensor.h"

namespace dstrain {

enum class Trans { no, yes };
enum class Accumulate { overwrite, add };

// Statistics of activations of type F.
inline DType stat_dtype(DType activations) {
  return activations == DType::f64 ? DType::f64 : DType::f32;
}

// cos and sin of position * frequency, f32 or f64 [positions, rope_dim / 2], any attention factor
// multiplied in. Interleaved pairs are (2i, 2i+1), half-split pairs are (i, i + rope_dim/2).
struct RopeTable {
  Tensor cos_PR, sin_PR;
  bool interleaved = false;
};

// Which queries see which keys. Row n of `table_N4` (i32) is {query begin, query count, key begin,
// key count}; queries are the last `query count` of the keys: query j sees keys up to and including
// key count - query count + j (causal, aligned at the end). Each query row is in exactly one
// segment; key ranges may overlap between segments. Rows at and after `count_1` are unused. Not
// causal: every query of a segment sees all of its keys, of which there are any number but none. A
// query row may be in no segment; queries and keys both ascend from segment to segment without
// overlap.
struct AttentionSegments {
  Tensor table_N4;
  Tensor count_1;           // i32
  int64_t max_queries = 0;  // upper bounds over segments, for launch shapes
  int64_t max_keys = 0;
  int64_t max_count = 0;  // upper bound of count_1; 0: the table's rows
  // All rows of the table are used, each with max_queries queries and max_keys keys, one after the
  // other: the tensors are batches of sequences of one length.
  bool uniform = false;
  bool causal = true;
};

enum class RouterScoring { softmax, sigmoid };
enum class GroupScore { best, best_two };

struct RouterParams {
  RouterScoring scoring = RouterScoring::sigmoid;
  GroupScore group_score = GroupScore::best_two;  // what ranks groups: best (V2), best two (V3)
  int64_t groups = 1;
  int64_t groups_per_token = 1;
  int64_t experts_per_token = 1;
  bool normalize = true;  // chosen scores are divided by (their sum + 1e-20)
  double scale = 1.0;
};

// Hard targets: `hard_T` (i32; below 0 is ignored). Soft targets: K alternatives per token with
// probabilities whose sum is the token's weight. Exactly one kind is defined.
struct CrossEntropyTargets {
  Tensor hard_T;
  Tensor soft_index_TK, soft_prob_TK;  // i32, S
};

// What a step reads from device memory, so that a captured graph can be replayed. The host writes
// the inputs before each step and `updates` when a run starts or resumes; clip_scale writes the
// rest.
struct StepInputs {
  double lr = 0;
  double loss_scale = 1;  // factor of d(loss)/d(token loss): 1 / valid tokens of the global batch
};
struct StepScalars {
  StepInputs in;
  double grad_norm = 0;
  double grad_scale = 1;        // clipping coefficient
  double bias_correction1 = 1;  // 1 - beta1^updates
  double bias_correction2 = 1;
  int64_t updates = 0;  // applied so far, the one of this step included
  int32_t finite = 1;   // 0: the update is skipped
  int32_t unused = 0;
};

// Which sequences the rows of a tensor belong to: row t is part of sequence (first_row + t) /
// rows_per_sequence. A rank may hold any run of rows.
struct RowsOfSequences {
  int64_t first_row = 0;
  int64_t rows_per_sequence = 1;
};

struct AdamWParams {
  double beta1 = 0.9, beta2 = 0.95, eps = 1e-8, weight_decay = 0;
};

class Ops {
 public:
  virtual ~Ops() = default;

  // --- matrix products -------------------------------------------------------------------------
  // c[M,N] = alpha * op(a) op(b) + beta * c. a, b, c are matrices whose rows may be strided. a and
  // b are F; c is F or S (router logits, weight gradients). For the router, one of a and b may be S
  // beside an F: it is not rounded to F (logit gradients have to stay in f32), and c is F or S.
  // Products are summed in S. beta 0 ignores what c held.
  virtual void matmul(Stream&, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
                      double beta, const Tensor& c) = 0;

  // Products over groups of consecutive rows: rows offsets_E1[e] .. offsets_E1[e+1] use weight e.
  // Absent offsets mean one group of all rows. An absent row index means row r of the operand, a
  // present one (i32 [R]) row index[r]: gathered rows are never stored.
  // y_RO = x W_e^T
  virtual void grouped_matmul(Stream&, const Tensor& x_XI, const Tensor& row_index_R,
                              const Tensor& weight_EOI, const Tensor& offsets_E1,
                              const Tensor& y_RO) = 0;
  // dx_RI = dy W_e
  virtual void grouped_matmul_backward_input(Stream&, const Tensor& dy_XO,
                                             const Tensor& row_index_R, const Tensor& weight_EOI,
                                             const Tensor& offsets_E1, const Tensor& dx_RI) = 0;
  // dW_e (+)= dy_e^T x_e. A group without rows gets zeros (overwrite) or nothing (add).
  virtual void grouped_matmul_backward_weight(Stream&, const Tensor& dy_XO,
                                              const Tensor& dy_index_R, const Tensor& x_XI,
                                              const Tensor& x_index_R, const Tensor& offsets_E1,
                                              Accumulate accumulate, const Tensor& dweight_EOI) = 0;

  // --- gated feed-forward (SwiGLU; Shazeer 2020, arXiv:2002.05202), dense or grouped
  // -------------- gate_up_R2I = x W_e^T (gate in the first I columns, up in the last); h_RI =
  // silu(gate) * up * row_weight.  weight_E2ID is [E, 2I, D]; row_weight_R (S) may be absent.
  virtual void ffn_up(Stream&, const Tensor& x_XD, const Tensor& row_index_R,
                      const Tensor& weight_E2ID, const Tensor& offsets_E1,
                      const Tensor& row_weight_R, const Tensor& gate_up_R2I,
                      const Tensor& h_RI) = 0;
  // From the gradient of y = h W_down^T: dh = dy W_down, then through the product above.
  // Writes dgate_up, h once more (backward_weight of W_down needs it) and, if row weights are
  // present, drow_weight[r] = sum_i dh[r,i] silu(gate) up.  weight_EDI is [E, D, I].
  virtual void ffn_down_backward_input(Stream&, const Tensor& dy_XD, const Tensor& row_index_R,
                                       const Tensor& weight_EDI, const Tensor& offsets_E1,
                                       const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                                       const Tensor& dgate_up_R2I, const Tensor& h_RI,
                                       const Tensor& drow_weight_R) = 0;

  // --- normalisation
  // ------------------------------------------------------------------------------- sum = x + delta
  // (delta absent: sum = x and sum_TD may be absent), rstd = 1/sqrt(mean(sum^2) + eps), y = sum *
  // rstd * weight.  x and y may be strided. sum may alias x.
  virtual void add_rms_norm(Stream&, const Tensor& x_TD, const Tensor& delta_TD,
                            const Tensor& weight_D, double eps, const Tensor& sum_TD,
                            const Tensor& y_TD, const Tensor& rstd_T) = 0;
  // dx = dresidual + d(norm)/d(sum); dresidual may be absent, dx may alias it. x_TD is the sum
  // above. x, dy and dx may be strided.
  virtual void rms_norm_backward(Stream&, const Tensor& dy_TD, const Tensor& x_TD,
                                 const Tensor& weight_D, const Tensor& rstd_T,
                                 const Tensor& dresidual_TD, Accumulate accumulate,
                                 const Tensor& dx_TD, const Tensor& dweight_D) = 0;

  // --- attention
  // ------------------------------------------------------------------------------------- MLA
  // (DeepSeek-V2, arXiv:2405.04434). Rotates the last rope_dim of each query head in place; k is
  // [nope part of kv_b | rotated k_rope], k_rope shared by all heads; v is the last W of kv_b.
  // q_THQ [T,H,Q] (absent: only k and v), k_rope_TP [T, rope_dim] (strided), kv_b_THX
  // [T,H,Q-rope_dim+W], positions_T i32.
  virtual void mla_qkv(Stream&, const Tensor& q_THQ, const Tensor& k_rope_TP,
                       const Tensor& kv_b_THX, const RopeTable& rope, const Tensor& positions_T,
                       const Tensor& k_THQ, const Tensor& v_THW) = 0;
  // Rotates dq (may be absent) back in place; dk_rope_TP (strided) sums over heads.
  virtual void mla_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_THQ,
                                const Tensor& dv_THW, const RopeTable& rope,
                                const Tensor& positions_T, const Tensor& dk_rope_TP,
                                const Tensor& dkv_b_THX) = 0;
  // Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245): one product makes
  // qkv_TX [T, G, H/G + 2, Q] (query heads of the group, key, value); q and k are rotated.
  virtual void gqa_qkv(Stream&, const Tensor& qkv_TX, const RopeTable& rope,
                       const Tensor& positions_T, const Tensor& q_THQ, const Tensor& k_TGQ,
                       const Tensor& v_TGW) = 0;
  virtual void gqa_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_TGQ,
                                const Tensor& dv_TGW, const RopeTable& rope,
                                const Tensor& positions_T, const Tensor& dqkv_TX) = 0;
  // o = softmax(scale q k^T) v within segments; log-sum-exp per query and head for backward
  // (FlashAttention-2, Dao 2023, arXiv:2307.08691). Head h reads key/value head h / (H/G). Query
  // rows in no segment get zeros.
  virtual void attention(Stream&, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                         const AttentionSegments& segments, double scale, const Tensor& o_THW,
                         const Tensor& lse_TH) = 0;
  // dq, dk and dv are overwritten, with zeros in rows of no segment. o and lse may be those of
  // attention to more keys than these (merge_attention): then the gradients are what these keys
  // add.
  virtual void attention_backward(Stream&, const Tensor& do_THW, const Tensor& q_THQ,
                                  const Tensor& k_UGQ, const Tensor& v_UGW, const Tensor& o_THW,
                                  const Tensor& lse_TH, const AttentionSegments& segments,
                                  double scale, const Tensor& dq_THQ, const Tensor& dk_UGQ,
                                  const Tensor& dv_UGW) = 0;
  // From o and lse of attention to some keys those of attention to these and the keys of another
  // part, in the query rows of the part's segments, which are not causal; other rows stay what they
  // are in o and lse. With m = log(exp lse + exp part_lse): out = exp(lse - m) o + exp(part_lse -
  // m) part, lse = m. part is F, o and out are F or S; out may be o. All contiguous.
  virtual void merge_attention(Stream&, const Tensor& part_THW, const Tensor& part_lse_TH,
                               const AttentionSegments& segments, const Tensor& o_THW,
                               const Tensor& lse_TH, const Tensor& out_THW) = 0;
  // x += bias per row; dbias (+)= sum over rows.
  virtual void add_bias(Stream&, const Tensor& x_TD, const Tensor& bias_D) = 0;
  virtual void bias_backward(Stream&, const Tensor& dy_TD, Accumulate accumulate,
                             const Tensor& dbias_D) = 0;

  // --- routing
  // ------------------------------------------------------------------------------------- scores =
  // softmax or sigmoid of logits (S [T,E]); experts are chosen by scores + bias (bias_E absent: 0)
  // among the best groups; ties go to the lower index. weights are the chosen scores without bias,
  // normalised and scaled. indices_TK is in descending order of choice.
  virtual void router_topk(Stream&, const Tensor& logits_TE, const Tensor& bias_E,
                           const RouterParams& params, const Tensor& scores_TE,
                           const Tensor& indices_TK, const Tensor& weights_TK) = 0;
  // Recomputes scores and weights for given indices (backward of recomputed blocks, replay).
  virtual void router_weights(Stream&, const Tensor& logits_TE, const RouterParams& params,
                              const Tensor& indices_TK, const Tensor& scores_TE,
                              const Tensor& weights_TK) = 0;
  // dlogits from dweights and, if present, from the balance loss: balance_coeff_SE is the gradient
  // with respect to the sum over a sequence's tokens of scores / sum(scores).
  virtual void router_backward(Stream&, const Tensor& dweights_TK, const Tensor& scores_TE,
                               const Tensor& indices_TK, const RouterParams& params,
                               const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                               const Tensor& dlogits_TE) = 0;
  // Per sequence, over the rows that are here: load_SE = tokens that chose e, prob_SE = sum of
  // scores / sum(scores). Both S. Overwritten, with zeros for sequences without rows.
  virtual void balance_statistics(Stream&, const Tensor& scores_TE, const Tensor& indices_TK,
                                  const RowsOfSequences& rows, const Tensor& load_SE,
                                  const Tensor& prob_SE) = 0;
  // DeepSeek-V3 (arXiv:2412.19437) eq. 17-20: loss_1 (f64) += alpha * sum_s sum_e f_e P_e with
  // f_e = load E / (K n), P_e = prob / n, n tokens in the sequence; coeff = d loss / d prob. The
  // caller divides alpha by the sequences of the global batch.
  virtual void balance_loss(Stream&, const Tensor& load_SE, const Tensor& prob_SE,
                            int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                            const Tensor& loss_1, const Tensor& coeff_SE) = 0;
  // counts_E (i64) += how often each expert stands in indices_TK.
  virtual void count_experts(Stream&, const Tensor& indices_TK, const Tensor& counts_E) = 0;
  // bias += speed * sign(mean(counts) - counts): auxiliary-loss-free balancing (arXiv:2408.15664).
  // Nothing happens in a step that is skipped (scalars->finite is 0).
  virtual void router_bias_update(Stream&, const Tensor& counts_E, double speed,
                                  const StepScalars* scalars, const Tensor& bias_E) = 0;

  // Rows of tokens for experts. An i32 index below 0 means "none": of a choice that it has no
  // expert here, of a slot that it has no row, of a row that no token goes there. Stable sort of
  // the T*K choices by expert: row r of the sorted order holds token token_of_row[r]; slot (t,k)
  // became row row_of_slot[t,k] (-1: a choice of none); offsets_E1[e] is the first row of expert e
  // (all i32); row_weight_R = weights of the slot. R may be any number from that of the choices on;
  // rows at and after offsets_E1[E] become zeros.
  virtual void sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor& weights_TK,
                              const Tensor& offsets_E1, const Tensor& token_of_row_R,
                              const Tensor& row_of_slot_TK, const Tensor& row_weight_R) = 0;
  // out[t] = addend[t] + sum_k y[row_of_slot[t,k]], over slots that have a row; addend may be
  // absent and may alias out.
  virtual void combine_rows(Stream&, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                            const Tensor& addend_TD, const Tensor& out_TD) = 0;
  // y[r] = x[index[r]]; rows whose index is below 0 stay what they were.
  virtual void gather_rows(Stream&, const Tensor& x_XD, const Tensor& index_R,
                           const Tensor& y_RD) = 0;
  // tokens_N (i64)[n] += tokens that chose an expert of rank n, which are [n L, (n+1) L).
  virtual void count_tokens_by_rank(Stream&, const Tensor& indices_TK, int64_t experts_per_rank,
                                    const Tensor& tokens_N) = 0;
  // Expert parallelism: which of this rank's tokens goes where in a round. A token goes once to
  // each rank that has experts of its choice. counts_NX (i64) [N, E + N]: how often each of N ranks
  // chose each of E experts, and then its tokens by rank (above). The choices on their way to a
  // rank are numbered source by source, those of a source token by token; the round carries the
  // tokens whose first choice there has a number in [round * window, (round + 1) * window). A
  // source sends a rank as many rows as it has choices with such numbers, and no more than tokens:
  // some of these may stay without a token. Rows lie rank by rank. token_of_row_Z; row_of_token_TN
  // (-1: not in this round); choices_ZK: the choices of a row's token as experts of its rank, from
  // 0 on, and -1 for those of other ranks. All i32; rows without a token are -1.
  virtual void address_tokens(Stream&, const Tensor& indices_TK, const Tensor& counts_NX,
                              int64_t rank, int64_t round, int64_t window,
                              const Tensor& token_of_row_Z, const Tensor& row_of_token_TN,
                              const Tensor& choices_ZK) = 0;

  // --- embedding and loss
  // ----------------------------------------------------------------------------- weight holds rows
  // [vocab_begin, vocab_begin + its size) of the vocabulary; other tokens give zeros.
  virtual void embedding(Stream&, const Tensor& tokens_T, const Tensor& weight_VD,
                         int64_t vocab_begin, const Tensor& x_TD) = 0;
  virtual void embedding_backward(Stream&, const Tensor& tokens_T, const Tensor& dx_TD,
                                  int64_t vocab_begin, Accumulate accumulate,
                                  const Tensor& dweight_VD) = 0;
  // Over the local slice of the vocabulary: max_T, sum_exp_T = sum exp(logit - max), and
  // target_T = the target's logit (probability-weighted for soft targets; 0 if not local). All S.
  virtual void cross_entropy_stats(Stream&, const Tensor& logits_TV,
                                   const CrossEntropyTargets& targets, int64_t vocab_begin,
                                   const Tensor& max_T, const Tensor& sum_exp_T,
                                   const Tensor& target_T) = 0;
  // sum_exp *= exp(local_max - max): sums over slices of the vocabulary before they are added.
  virtual void rescale_sum_exp(Stream&, const Tensor& local_max_T, const Tensor& max_T,
                               const Tensor& sum_exp_T) = 0;
  // lse = max + log(sum_exp); token loss = weight * lse - target; loss_sum_1 (f64) += their sum.
  // token_loss_T (S) may be absent.
  virtual void cross_entropy_loss(Stream&, const CrossEntropyTargets& targets, const Tensor& max_T,
                                  const Tensor& sum_exp_T, const Tensor& target_T,
                                  const Tensor& lse_T, const Tensor& loss_sum_1,
                                  const Tensor& token_loss_T) = 0;
  // In place: dlogits = (softmax * weight - target distribution) * scalars.in.loss_scale * factor.
  virtual void cross_entropy_backward(Stream&, const Tensor& logits_TV,
                                      const CrossEntropyTargets& targets, int64_t vocab_begin,
                                      const Tensor& lse_T, const StepScalars* scalars,
                                      double factor) = 0;

  // --- optimizer
  // ----------------------------------------------------------------------------------- sum_1 (f64)
  // += sum of squares, in an order that depends on x's length only.
  virtual void add_sum_squares(Stream&, const Tensor& x, const Tensor& sum_1) = 0;
  // grad_norm = sqrt(sum); grad_scale = min(1, max_norm / (norm + 1e-6)) (1 if max_norm is 0);
  // finite = whether the sum is; if so, the next update's number and bias corrections. scalars is
  // device memory.
  virtual void clip_scale(Stream&, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                          StepScalars* scalars) = 0;
  // Decoupled AdamW (Loshchilov & Hutter, arXiv:1711.05101) over a flat range; does nothing if
  // scalars->finite is 0. g = grad * grad_scale; p -= lr * (weight_decay * p + m^ / (sqrt(v^) +
  // eps)). param is F. A bf16 param needs param_low (u16, absent otherwise): together they are the
  // f32 master value, whose lower 16 bits are param_low and whose nearest bf16, ties away from
  // zero, is param. grad is S; moments are S or bf16.
  virtual void adamw(Stream&, const AdamWParams& params, const StepScalars* scalars,
                     const Tensor& grad, const Tensor& param, const Tensor& param_low,
                     const Tensor& exp_avg, const Tensor& exp_avg_sq) = 0;

  // --- elementwise
  // -----------------------------------------------------------------------------------
  virtual void fill(Stream&, const Tensor& x, double value) = 0;
  // out = a + b; out may be a or b. b is F, a and out are F or S.
  virtual void add(Stream&, const Tensor& a, const Tensor& b, const Tensor& out) = 0;
  virtual void convert(Stream&, const Tensor& source,
                       const Tensor& destination) = 0;  // f32 f64 bf16
  // f32 values as a bf16 parameter and its lower 16 bits (see adamw), and back.
  virtual void split_master(Stream&, const Tensor& master, const Tensor& param,
                            const Tensor& param_low) = 0;
  virtual void join_master(Stream&, const Tensor& param, const Tensor& param_low,
                           const Tensor& master) = 0;
  // x[i] = std * normal(seed, stream, index of element i in the global tensor). x is a run, from
  // element `first` on, of the slice [begin, begin + extent) of the middle dim of a tensor [outer,
  // global, inner].
  struct SliceOf {
    int64_t outer = 1, global = 1, begin = 0, extent = 1, inner = 1;
    int64_t first = 0;
  };
  virtual void fill_normal(Stream&, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                           const SliceOf& slice) = 0;

  // --- gradient compression (core/backend/compressed_format.h): P pieces of N elements, f32
  // --------------- v = grad + residual; the payload holds what is sent of v, the residual becomes
  // v - sent. It may be absent. NaN and infinity are sent: they count as largest in top-k, and make
  // a whole int8 block NaN; residuals stay finite: such an element keeps its own. Of each block the
  // elements of largest magnitude, ties to the lower index.
  virtual void topk_compress(Stream&, const Tensor& grad_PN, const TopkFormat& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) = 0;
  // sum = piece 0 + piece 1 + ..., in this order; Accumulate::add begins with what sum holds.
  virtual void topk_sum(Stream&, const Tensor& payload_PB, const TopkFormat& format,
                        Accumulate accumulate, const Tensor& sum_N) = 0;
  virtual void int8_compress(Stream&, const Tensor& grad_PN, const Int8Format& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) = 0;
  virtual void int8_sum(Stream&, const Tensor& payload_PB, const Int8Format& format,
                        Accumulate accumulate, const Tensor& sum_N) = 0;
  // x = 0 if scalars->finite is 0.
  virtual void clear_if_skipped(Stream&, const StepScalars* scalars, const Tensor& x) = 0;
};

}  // namespace dstrain
