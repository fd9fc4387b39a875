// Multi-token prediction (DeepSeek-V3, arXiv:2412.19437, section 2.2). Module k, from the residual
// stream h of the one before (the main model for k = 1) and the embedding of the token k further on:
//   h' = block([norm_e(embedding) | norm_h(h)] W_eh),  loss over the token k + 1 further on,
// with the main model's embedding and output head and a final norm of its own. Parameter names are the
// published ones: model.layers.<num_hidden_layers + k - 1>.{enorm,hnorm,eh_proj,shared_head.norm}.
#pragma once

#include "core/layers/loss_head.h"
#include "core/model/transformer_block.h"

namespace dstrain {

struct MtpSaved {
  Tensor embedding_tD, embedding_rstd_T, h_tD, h_rstd_T, joined_t2D;
  BlockSaved block;
  LossHeadSaved head;
};

class MtpModule {
 public:
  MtpModule(const ModelConfig& model, const Declare& declare, int layer, int moe_index,
            const Parameter& embedding, const Parameter& head);

  // Values of block() are acquired by the caller. h_tD must stay valid until backward. tokens: the token
  // k further on; targets: k + 1 further on; both of all T tokens.
  void forward(StepContext& ctx, const RopeTable& rope, const Tensor& h_tD, const Tensor& tokens_T,
               const Tensor& targets_T, double factor, MtpSaved& saved) const;
  // dout_tD: gradient that the next module has for this one's residual stream (absent for the last).
  // dh_tD is overwritten. Adds all parameter gradients.
  void backward(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD, const Tensor& tokens_T,
                MtpSaved& saved, const Tensor& dh_tD) const;
  int block() const { return parameter_block_; }
  const Router* router() const { return block_.router(); }

 private:
  int parameter_block_;
  const Parameter& embedding_;
  RmsNorm enorm_, hnorm_;
  Linear eh_proj_;
  TransformerBlock block_;
  LossHead head_;
};

}  // namespace dstrain
