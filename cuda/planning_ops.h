// Ops that compute nothing and note how much scratch the real ones take for the shapes that they
// see.
#pragma once

#include <algorithm>

#include "core/backend/null_ops.h"
#include "cuda/cuda_ops.h"

namespace dstrain {

class PlanningOps : public NullOps {
 public:
  explicit PlanningOps(CudaOps& ops) : ops_(ops) {}
  int64_t scratch_bytes() const { return bytes_; }

  void matmul(Stream&, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
              double beta, const Tensor& c) override;
  void attention(Stream&, const Tensor& q_THQ, const Tensor& k_UGQ, const Tensor& v_UGW,
                 const AttentionSegments& segments, double scale, const Tensor& o_THW,
                 const Tensor& lse_TH) override;
  void attention_backward(Stream&, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override;
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
  void rms_norm_backward(Stream&, const Tensor& dy_TD, const Tensor& x_TD, const Tensor& weight_D,
                         const Tensor& rstd_T, const Tensor& dresidual_TD, Accumulate accumulate,
                         const Tensor& dx_TD, const Tensor& dweight_D) override;
  void bias_backward(Stream&, const Tensor& dy_TD, Accumulate accumulate,
                     const Tensor& dbias_D) override;
  void sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor& weights_TK,
                      const Tensor& offsets_E1, const Tensor& token_of_row_R,
                      const Tensor& row_of_slot_TK, const Tensor& row_weight_R) override;
  void embedding_backward(Stream&, const Tensor& tokens_T, const Tensor& dx_TD, int64_t vocab_begin,
                          Accumulate accumulate, const Tensor& dweight_VD) override;

  // Called by the definitions above, which stand beside the operations that they plan.
  void note(int64_t bytes) { bytes_ = std::max(bytes_, bytes); }

 private:
  CudaOps& ops_;
  int64_t bytes_ = 0;
};

}  // namespace dstrain
