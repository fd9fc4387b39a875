// Self-attention sublayers: the common interface, and what both kinds save for backward.
#pragma once

#include <memory>

#include "core/config/config.h"
#include "core/layers/linear.h"
#include "core/layers/rms_norm.h"

namespace dstrain {

// Letters beside those of ops.h: L kv_lora_rank, M q_lora_rank, P rotated part of a head.
// Tensors marked * are made again by selective recomputation.
struct AttentionSaved {
  Tensor x_tD;       // input of the projections; given by the block
  Tensor qa_tM;      // MLA with q_lora_rank: this rank's tokens
  Tensor qa_TM;      // * all tokens
  Tensor qan_TM;     // *
  Tensor qa_rstd_T;  // *
  Tensor q_THQ;      // rotated; * with q_lora_rank and for GQA
  Tensor kva_tX;     // MLA: [t, L + P]
  Tensor kva_TX;     // * all tokens
  Tensor kvn_TL;     // *
  Tensor kv_rstd_T;  // *
  Tensor k_TGQ;      // *
  Tensor v_TGW;      // *
  Tensor o_THW;
  Tensor lse_TH;
  // Gradients that backward_weight reads.
  Tensor x_TD, dout_tD, dout_TD, dq_TX, dqa_tM, dkva_tX, dkvb_TX;
};

class Attention {
 public:
  virtual ~Attention() = default;
  // out_tD = projection of attention over x_tD; x must stay valid until backward_weight.
  virtual void forward(StepContext& ctx, const RopeTable& rope, const Tensor& x_tD,
                       AttentionSaved& saved, const Tensor& out_tD) const = 0;
  // Makes the tensors marked * again, in ctx.arena.scratch; the caller has restored saved.x_tD.
  virtual void restore(StepContext& ctx, const RopeTable& rope, AttentionSaved& saved) const = 0;
  virtual void backward_input(StepContext& ctx, const RopeTable& rope, const Tensor& dout_tD,
                              AttentionSaved& saved, const Tensor& dx_tD) const = 0;
  virtual void backward_weight(StepContext& ctx, const AttentionSaved& saved) const = 0;
};

// Multi-head latent attention if the model has a kv_lora_rank, grouped-query attention otherwise.
// `layer` is the key of the key/value exchange.
std::unique_ptr<Attention> make_attention(const ModelConfig& model, const Declare& declare, int layer);

}  // namespace dstrain
