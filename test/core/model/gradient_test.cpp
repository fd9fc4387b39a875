// Gradients of whole models against central differences of the loss, in f64.
#include <string>
#include <vector>

#include "test/support/catch.h"
#include "test/support/model_check.h"

namespace dstrain::test {
namespace {

struct Case {
  const char* name;
  ModelConfig model;
  BatchOptions batch;
  int64_t micro_batch;
  Recompute recompute;
};

ModelConfig mla_without_queries_compressed() {
  ModelConfig m = tiny_moe();
  m.q_lora_rank = 0;
  m.attention_bias = true;
  m.norm_topk_prob = false;
  m.aux_loss_alpha = 0;
  m.n_shared_experts = 0;
  return m;
}

ModelConfig dense_without_ties() {
  ModelConfig m = tiny_dense();
  m.tie_word_embeddings = false;
  m.num_key_value_heads = 1;
  m.num_nextn_predict_layers = 1;
  return m;
}

ModelConfig tied_mtp() {
  ModelConfig m = tiny_mtp();
  m.tie_word_embeddings = true;
  return m;
}

std::vector<Case> cases() {
  const BatchOptions plain{.seed = 2}, packed{.seed = 3, .packed = true, .ignored = 0.3};
  const BatchOptions other{.seed = 12, .packed = true, .ignored = 0.3};
  const BatchOptions three{.seed = 4, .sequences = 3, .seq_len = 9, .packed = true, .ignored = 0.2};
  return {
      {"moe", tiny_moe(), plain, 2, Recompute::none},
      {"moe, packed documents", tiny_moe(), packed, 2, Recompute::full},
      {"moe, three micro-batches", tiny_moe(), three, 1, Recompute::selective},
      {"moe, queries not compressed", mla_without_queries_compressed(), other, 2,
       Recompute::selective},
      {"v2", tiny_v2(), plain, 2, Recompute::selective},
      {"v2, three micro-batches", tiny_v2(), three, 1, Recompute::full},
      {"dense", tiny_dense(), packed, 2, Recompute::none},
      {"dense, three micro-batches", tiny_dense(), three, 1, Recompute::full},
      {"dense, own head, one prediction module", dense_without_ties(), packed, 2,
       Recompute::selective},
      {"two prediction modules", tiny_mtp(), other, 2, Recompute::none},
      {"two prediction modules, three micro-batches", tied_mtp(), three, 1, Recompute::full},
  };
}

// Faults that were planted. Each names a parameter whose gradient it spoils and one that it spares.
struct KeyGradientTooLarge : ForwardingOps {
  using ForwardingOps::ForwardingOps;
  static constexpr const char* kSpoils = "model.layers.1.self_attn.kv_b_proj.weight";
  static constexpr const char* kSpares = "lm_head.weight";
  void attention_backward(Stream& s, const Tensor& do_THW, const Tensor& q_THQ, const Tensor& k_UGQ,
                          const Tensor& v_UGW, const Tensor& o_THW, const Tensor& lse_TH,
                          const AttentionSegments& segments, double scale, const Tensor& dq_THQ,
                          const Tensor& dk_UGQ, const Tensor& dv_UGW) override {
    ops_.attention_backward(s, do_THW, q_THQ, k_UGQ, v_UGW, o_THW, lse_TH, segments, scale, dq_THQ,
                            dk_UGQ, dv_UGW);
    for (int64_t i = 0; i < dk_UGQ.numel(); ++i) dk_UGQ.data<double>()[i] *= 1.001;
  }
};

struct BalanceTermDropped : ForwardingOps {
  using ForwardingOps::ForwardingOps;
  static constexpr const char* kSpoils = "model.layers.1.mlp.gate.weight";
  static constexpr const char* kSpares = "lm_head.weight";
  void router_backward(Stream& s, const Tensor& dweights_TK, const Tensor& scores_TE,
                       const Tensor& indices_TK, const RouterParams& params, const Tensor&,
                       const RowsOfSequences& rows, const Tensor& dlogits_TE) override {
    ops_.router_backward(s, dweights_TK, scores_TE, indices_TK, params, Tensor(), rows, dlogits_TE);
  }
};

struct EarlierMicroBatchesOverwritten : ForwardingOps {
  using ForwardingOps::ForwardingOps;
  static constexpr const char* kSpoils = "model.layers.1.mlp.experts.gate_up_proj";
  static constexpr const char* kSpares = "model.layers.1.mlp.gate.weight";
  void grouped_matmul_backward_weight(Stream& s, const Tensor& dy_XO, const Tensor& dy_index_R,
                                      const Tensor& x_XI, const Tensor& x_index_R,
                                      const Tensor& offsets_E1, Accumulate,
                                      const Tensor& dweight_EOI) override {
    ops_.grouped_matmul_backward_weight(s, dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1,
                                        Accumulate::overwrite, dweight_EOI);
  }
};

struct SecondMicroBatchSkipped : ForwardingOps {
  using ForwardingOps::ForwardingOps;
  static constexpr const char* kSpoils = "model.embed_tokens.weight";
  static constexpr const char* kSpares = "model.layers.0.input_layernorm.weight";
  void embedding_backward(Stream& s, const Tensor& tokens_T, const Tensor& dx_TD,
                          int64_t vocab_begin, Accumulate accumulate,
                          const Tensor& dweight_VD) override {
    if (calls_++ % 3 != 1)
      ops_.embedding_backward(s, tokens_T, dx_TD, vocab_begin, accumulate, dweight_VD);
  }
  int64_t calls_ = 0;
};

struct PredictionWeightIgnored : ForwardingOps {
  using ForwardingOps::ForwardingOps;
  static constexpr const char* kSpoils = "model.layers.2.eh_proj.weight";
  static constexpr const char* kSpares = "model.norm.weight";
  void cross_entropy_backward(Stream& s, const Tensor& logits_TV,
                              const CrossEntropyTargets& targets, int64_t vocab_begin,
                              const Tensor& lse_T, const StepScalars* scalars, double) override {
    ops_.cross_entropy_backward(s, logits_TV, targets, vocab_begin, lse_T, scalars, 1.0);
  }
};

}  // namespace

TEST_CASE("model gradients: central differences agree", "[gradient]") {
  const Case c = GENERATE(from_range(cases()));
  SECTION(c.name) {
    CheckedBackend backend;
    const TinyBatch batch(c.model, c.batch);
    const auto result =
        check_model_gradients(backend, c.model, batch.split(c.micro_batch), c.recompute);
    INFO(result.report());
    CHECK(result.worst() <= 1e-6);
  }
}

TEMPLATE_TEST_CASE("model gradients: a planted fault is noticed", "[gradient]", KeyGradientTooLarge,
                   BalanceTermDropped, EarlierMicroBatchesOverwritten, SecondMicroBatchSkipped,
                   PredictionWeightIgnored) {
  ModelConfig model = tiny_moe();
  model.num_nextn_predict_layers = 1;
  CheckedBackend backend;
  backend.replace_ops([](Ops& ops) { return std::make_unique<TestType>(ops); });
  const TinyBatch batch(model, {.seed = 4, .sequences = 3, .seq_len = 9, .packed = true});
  const auto result = check_model_gradients(backend, model, batch.split(1));
  CAPTURE(result.report());
  CHECK(result.worst() > 1e-5);
  CHECK(result.worst_of(TestType::kSpoils).relative > 1e-5);
  CHECK(result.worst_of(TestType::kSpares).relative <= 1e-6);
}

}  // namespace dstrain::test
