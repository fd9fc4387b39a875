// Chooses experts per token. logits = x W^T in f32; scores, choice and weights as RouterParams say
// (core/backend/ops.h). Balancing: a bias on the choice that follows the counts once a step
// (auxiliary-loss-free, arXiv:2408.15664) and the sequence-wise loss of DeepSeek-V3 (arXiv:2412.19437).
#pragma once

#include "core/config/config.h"
#include "core/layers/declare.h"
#include "core/layers/step_context.h"

namespace dstrain {

struct RouterSaved {
  Tensor scores_TE;         // S
  Tensor balance_coeff_SE;  // S; absent without balance loss
  Routing routing;
  Tensor dlogits_TE;  // for backward_weight
};

class Router {
 public:
  // moe_index counts MoE layers from 0: the row of StepSums::counts_LE.
  Router(const ModelConfig& model, const Declare& declare, int moe_index);

  // Fills saved (in ctx.arena.kept). While recomputing it does nothing: all of it was kept.
  void forward(StepContext& ctx, const Tensor& x_tD, RouterSaved& saved) const;
  // dx += gradient through the logits, which go to saved.dlogits_TE (made by the caller).
  void backward_input(StepContext& ctx, const Tensor& dweights_TK, RouterSaved& saved,
                      const Tensor& dx_tD) const;
  void backward_weight(StepContext& ctx, const RouterSaved& saved, const Tensor& x_tD) const;
  // Once a step, from the counts of the whole global batch.
  void update_bias(Ops& ops, Stream& stream, const Tensor& counts_LE,
                   const StepScalars* scalars) const;

 private:
  void choose(StepContext& ctx, const Tensor& x_tD, RouterSaved& saved) const;
  void balance(StepContext& ctx, RouterSaved& saved) const;
  // Where this rank's tokens lie in the sequences.
  RowsOfSequences rows(StepContext& ctx) const;

  const Parameter& weight_;
  const Parameter* bias_ = nullptr;  // noaux_tc only
  RouterParams params_;
  int64_t experts_;
  int moe_index_;
  double bias_update_speed_;
  bool balance_;
};

}  // namespace dstrain
