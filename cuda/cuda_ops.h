// The CUDA back end's Ops: every operation of core/backend/ops.h in f32 and bf16, queued on its
// stream. One family per file (ops_*.cu, ops_*.cpp). Scratch comes from the stream
// (CudaStream::scratch); what it will take is known from a dry run on PlanningOps.
#pragma once

#include <memory>
#include <string>

#include "core/backend/null_ops.h"
#include "core/backend/ops.h"
#include "cuda/cuda_device.h"

namespace dstrain {

class CudaMatmul;
class CudnnAttention;
class GroupedGemm;
class HopperFfn;
class HopperWeightGradient;

class CudaOps : public Ops {
 public:
  explicit CudaOps(const CudaDevice& device);
  ~CudaOps() override;

  // Chooses algorithms for the products that PlanningOps saw, from a file in the folder or by
  // measuring; waits for the stream.
  void tune(Stream& stream, const std::string& cache_folder);

  void matmul(Stream&, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
              double beta, const Tensor& c) override;
  void grouped_matmul(Stream&, const Tensor& x_XI, const Tensor& row_index_R,
                      const Tensor& weight_EOI, const Tensor& offsets_E1,
                      const Tensor& y_RO) override;
  void grouped_matmul_backward_input(Stream&, const Tensor& dy_XO, const Tensor& row_index_R,
                                     const Tensor& weight_EOI, const Tensor& offsets_E1,
                                     const Tensor& dx_RI) override;
  void grouped_matmul_backward_weight(Stream&, const Tensor& dy_XO, const Tensor& dy_index_R,
                                      const Tensor& x_XI, const Tensor& x_index_R,
                                      const Tensor& offsets_E1, Accumulate accumulate,
                                      const Tensor& dweight_EOI) override;
  void ffn_up(Stream&, const Tensor& x_XD, const Tensor& row_index_R, const Tensor& weight_E2ID,
              const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
              const Tensor& h_RI) override;
  void ffn_down_backward_input(Stream&, const Tensor& dy_XD, const Tensor& row_index_R,
                               const Tensor& weight_EDI, const Tensor& offsets_E1,
                               const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                               const Tensor& dgate_up_R2I, const Tensor& h_RI,
                               const Tensor& drow_weight_R) override;
  void add_rms_norm(Stream&, const Tensor& x_TD, const Tensor& delta_TD, const Tensor& weight_D,
                    double eps, const Tensor& sum_TD, const Tensor& y_TD,
                    const Tensor& rstd_T) override;
  void rms_norm_backward(Stream&, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& weight_D,
                         const Tensor& rstd_T, const Tensor& dresidual_TD, Accumulate accumulate,
                         const Tensor& dx_TD, const Tensor& dweight_D) override;
  void mla_qkv(Stream&, const Tensor& q_THQ, const Tensor& k_rope_TP, const Tensor& kv_b_THX,
               const RopeTable& rope, const Tensor& positions_T, const Tensor& k_THQ,
               const Tensor& v_THW) override;
  void mla_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_THQ, const Tensor& dv_THW,
                        const RopeTable& rope, const Tensor& positions_T, const Tensor& dk_rope_TP,
                        const Tensor& dkv_b_THX) override;
  void gqa_qkv(Stream&, const Tensor& qkv_TX, const RopeTable& rope, const Tensor& positions_T,
               const Tensor& q_THQ, const Tensor& k_TGQ, const Tensor& v_TGW) override;
  void gqa_qkv_backward(Stream&, const Tensor& dq_THQ, const Tensor& dk_TGQ, const Tensor& dv_TGW,
                        const RopeTable& rope, const Tensor& positions_T,
                        const Tensor& dqkv_TX) override;
  void attention(Stream&, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                 const AttentionSegments& segments, double scale, const Tensor& o_THW,
                 const Tensor& lse_TH) override;
  void attention_backward(Stream&, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override;
  void merge_attention(Stream&, const Tensor& part_THW, const Tensor& part_lse_TH,
                       const AttentionSegments& segments, const Tensor& o_THW, const Tensor& lse_TH,
                       const Tensor& out_THW) override;
  void add_bias(Stream&, const Tensor& x_TD, const Tensor& bias_D) override;
  void bias_backward(Stream&, const Tensor& dy_TD, Accumulate accumulate,
                     const Tensor& dbias_D) override;
  void router_topk(Stream&, const Tensor& logits_TE, const Tensor& bias_E,
                   const RouterParams& params, const Tensor& scores_TE, const Tensor& indices_TK,
                   const Tensor& weights_TK) override;
  void router_weights(Stream&, const Tensor& logits_TE, const RouterParams& params,
                      const Tensor& indices_TK, const Tensor& scores_TE,
                      const Tensor& weights_TK) override;
  void router_backward(Stream&, const Tensor& dweights_TK, const Tensor& scores_TE,
                       const Tensor& indices_TK, const RouterParams& params,
                       const Tensor& balance_coeff_SE, const RowsOfSequences& rows,
                       const Tensor& dlogits_TE) override;
  void balance_statistics(Stream&, const Tensor& scores_TE, const Tensor& indices_TK,
                          const RowsOfSequences& rows, const Tensor& load_SE,
                          const Tensor& prob_SE) override;
  void balance_loss(Stream&, const Tensor& load_SE, const Tensor& prob_SE,
                    int64_t tokens_per_sequence, int64_t experts_per_token, double alpha,
                    const Tensor& loss_1, const Tensor& coeff_SE) override;
  void count_experts(Stream&, const Tensor& indices_TK, const Tensor& counts_E) override;
  void router_bias_update(Stream&, const Tensor& counts_E, double speed, const StepScalars* scalars,
                          const Tensor& bias_E) override;
  void sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor& weights_TK,
                      const Tensor& offsets_E1, const Tensor& token_of_row_R,
                      const Tensor& row_of_slot_TK, const Tensor& row_weight_R) override;
  void combine_rows(Stream&, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                    const Tensor& addend_TD, const Tensor& out_TD) override;
  void gather_rows(Stream&, const Tensor& x_XD, const Tensor& index_R, const Tensor& y_RD) override;
  void count_tokens_by_rank(Stream&, const Tensor& indices_TK, int64_t experts_per_rank,
                            const Tensor& tokens_N) override;
  void address_tokens(Stream&, const Tensor& indices_TK, const Tensor& counts_NX, int64_t rank,
                      int64_t round, int64_t window, const Tensor& token_of_row_Z,
                      const Tensor& row_of_token_TN, const Tensor& choices_ZK) override;
  void embedding(Stream&, const Tensor& tokens_T, const Tensor& weight_VD, int64_t vocab_begin,
                 const Tensor& x_TD) override;
  void embedding_backward(Stream&, const Tensor& tokens_T, const Tensor& dx_TD, int64_t vocab_begin,
                          Accumulate accumulate, const Tensor& dweight_VD) override;
  void cross_entropy_stats(Stream&, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                           int64_t vocab_begin, const Tensor& max_T, const Tensor& sum_exp_T,
                           const Tensor& target_T) override;
  void rescale_sum_exp(Stream&, const Tensor& local_max_T, const Tensor& max_T,
                       const Tensor& sum_exp_T) override;
  void cross_entropy_loss(Stream&, const CrossEntropyTargets& targets, const Tensor& max_T,
                          const Tensor& sum_exp_T, const Tensor& target_T, const Tensor& lse_T,
                          const Tensor& loss_sum_1, const Tensor& token_loss_T) override;
  void cross_entropy_backward(Stream&, const Tensor& logits_TV, const CrossEntropyTargets& targets,
                              int64_t vocab_begin, const Tensor& lse_T, const StepScalars* scalars,
                              double factor) override;
  void add_sum_squares(Stream&, const Tensor& x, const Tensor& sum_1) override;
  void clip_scale(Stream&, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                  StepScalars* scalars) override;
  void adamw(Stream&, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
             const Tensor& param, const Tensor& param_low, const Tensor& exp_avg,
             const Tensor& exp_avg_sq) override;
  void fill(Stream&, const Tensor& x, double value) override;
  void add(Stream&, const Tensor& a, const Tensor& b, const Tensor& out) override;
  void convert(Stream&, const Tensor& source, const Tensor& destination) override;
  void split_master(Stream&, const Tensor& master, const Tensor& param,
                    const Tensor& param_low) override;
  void join_master(Stream&, const Tensor& param, const Tensor& param_low,
                   const Tensor& master) override;
  void fill_normal(Stream&, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                   const SliceOf& slice) override;
  void topk_compress(Stream&, const Tensor& grad_PN, const TopkFormat& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override;
  void topk_sum(Stream&, const Tensor& payload_PB, const TopkFormat& format, Accumulate accumulate,
                const Tensor& sum_N) override;
  void int8_compress(Stream&, const Tensor& grad_PN, const Int8Format& format,
                     const Tensor& residual_PN, const Tensor& payload_PB) override;
  void int8_sum(Stream&, const Tensor& payload_PB, const Int8Format& format, Accumulate accumulate,
                const Tensor& sum_N) override;
  void clear_if_skipped(Stream&, const StepScalars* scalars, const Tensor& x) override;

 private:
  friend class PlanningOps;

  CudaDevice device_;
  std::unique_ptr<CudaMatmul> matmul_;
  std::unique_ptr<CudnnAttention> cudnn_attention_;
  std::unique_ptr<GroupedGemm> grouped_gemm_;
  std::unique_ptr<HopperFfn> hopper_ffn_;
  std::unique_ptr<HopperWeightGradient> hopper_weight_gradient_;
};

}  // namespace dstrain
