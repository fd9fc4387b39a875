// Ops that do nothing. A dry run of the step on measuring arenas with these is the memory plan.
#pragma once

#include "core/backend/ops.h"

namespace dstrain {

class NullOps : public Ops {
 public:
  void matmul(Stream&, Trans, Trans, double, const Tensor&, const Tensor&, double,
              const Tensor&) override {}
  void grouped_matmul(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&) override {}
  void grouped_matmul_backward_input(Stream&, const Tensor&, const Tensor&, const Tensor&,
                                     const Tensor&, const Tensor&) override {}
  void grouped_matmul_backward_weight(Stream&, const Tensor&, const Tensor&, const Tensor&,
                                      const Tensor&, const Tensor&, Accumulate,
                                      const Tensor&) override {}
  void ffn_up(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
              const Tensor&, const Tensor&) override {}
  void ffn_down_backward_input(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                               const Tensor&) override {}
  void add_rms_norm(Stream&, const Tensor&, const Tensor&, const Tensor&, double, const Tensor&,
                    const Tensor&, const Tensor&) override {}
  void rms_norm_backward(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                         const Tensor&, Accumulate, const Tensor&, const Tensor&) override {}
  void mla_qkv(Stream&, const Tensor&, const Tensor&, const Tensor&, const RopeTable&,
               const Tensor&, const Tensor&, const Tensor&) override {}
  void mla_qkv_backward(Stream&, const Tensor&, const Tensor&, const Tensor&, const RopeTable&,
                        const Tensor&, const Tensor&, const Tensor&) override {}
  void gqa_qkv(Stream&, const Tensor&, const RopeTable&, const Tensor&, const Tensor&,
               const Tensor&, const Tensor&) override {}
  void gqa_qkv_backward(Stream&, const Tensor&, const Tensor&, const Tensor&, const RopeTable&,
                        const Tensor&, const Tensor&) override {}
  void attention(Stream&, const Tensor&, const Tensor&, const Tensor&, const AttentionSegments&,
                 double, const Tensor&, const Tensor&) override {}
  void attention_backward(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const AttentionSegments&, double,
                          const Tensor&, const Tensor&, const Tensor&) override {}
  void merge_attention(Stream&, const Tensor&, const Tensor&, const AttentionSegments&,
                       const Tensor&, const Tensor&, const Tensor&) override {}
  void add_bias(Stream&, const Tensor&, const Tensor&) override {}
  void bias_backward(Stream&, const Tensor&, Accumulate, const Tensor&) override {}
  void router_topk(Stream&, const Tensor&, const Tensor&, const RouterParams&, const Tensor&,
                   const Tensor&, const Tensor&) override {}
  void router_weights(Stream&, const Tensor&, const RouterParams&, const Tensor&, const Tensor&,
                      const Tensor&) override {}
  void router_backward(Stream&, const Tensor&, const Tensor&, const Tensor&, const RouterParams&,
                       const Tensor&, const RowsOfSequences&, const Tensor&) override {}
  void balance_statistics(Stream&, const Tensor&, const Tensor&, const RowsOfSequences&,
                          const Tensor&, const Tensor&) override {}
  void balance_loss(Stream&, const Tensor&, const Tensor&, int64_t, int64_t, double, const Tensor&,
                    const Tensor&) override {}
  void count_experts(Stream&, const Tensor&, const Tensor&) override {}
  void router_bias_update(Stream&, const Tensor&, double, const StepScalars*,
                          const Tensor&) override {}
  void sort_by_expert(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                      const Tensor&, const Tensor&) override {}
  void combine_rows(Stream&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void gather_rows(Stream&, const Tensor&, const Tensor&, const Tensor&) override {}
  void count_tokens_by_rank(Stream&, const Tensor&, int64_t, const Tensor&) override {}
  void address_tokens(Stream&, const Tensor&, const Tensor&, int64_t, int64_t, int64_t,
                      const Tensor&, const Tensor&, const Tensor&) override {}
  void embedding(Stream&, const Tensor&, const Tensor&, int64_t, const Tensor&) override {}
  void embedding_backward(Stream&, const Tensor&, const Tensor&, int64_t, Accumulate,
                          const Tensor&) override {}
  void cross_entropy_stats(Stream&, const Tensor&, const CrossEntropyTargets&, int64_t,
                           const Tensor&, const Tensor&, const Tensor&) override {}
  void rescale_sum_exp(Stream&, const Tensor&, const Tensor&, const Tensor&) override {}
  void cross_entropy_loss(Stream&, const CrossEntropyTargets&, const Tensor&, const Tensor&,
                          const Tensor&, const Tensor&, const Tensor&, const Tensor&) override {}
  void cross_entropy_backward(Stream&, const Tensor&, const CrossEntropyTargets&, int64_t,
                              const Tensor&, const StepScalars*, double) override {}
  void add_sum_squares(Stream&, const Tensor&, const Tensor&) override {}
  void clip_scale(Stream&, const Tensor&, double, double, double, StepScalars*) override {}
  void adamw(Stream&, const AdamWParams&, const StepScalars*, const Tensor&, const Tensor&,
             const Tensor&, const Tensor&, const Tensor&) override {}
  void fill(Stream&, const Tensor&, double) override {}
  void add(Stream&, const Tensor&, const Tensor&, const Tensor&) override {}
  void convert(Stream&, const Tensor&, const Tensor&) override {}
  void split_master(Stream&, const Tensor&, const Tensor&, const Tensor&) override {}
  void join_master(Stream&, const Tensor&, const Tensor&, const Tensor&) override {}
  void fill_normal(Stream&, const Tensor&, uint64_t, uint64_t, double, const SliceOf&) override {}
  void topk_compress(Stream&, const Tensor&, const TopkFormat&, const Tensor&,
                     const Tensor&) override {}
  void topk_sum(Stream&, const Tensor&, const TopkFormat&, Accumulate, const Tensor&) override {}
  void int8_compress(Stream&, const Tensor&, const Int8Format&, const Tensor&,
                     const Tensor&) override {}
  void int8_sum(Stream&, const Tensor&, const Int8Format&, Accumulate, const Tensor&) override {}
  void clear_if_skipped(Stream&, const StepScalars*, const Tensor&) override {}
};

}  // namespace dstrain
