#include "core/model/cost.h"

#include "core/model/model.h"

namespace dstrain {

ModelCost model_cost(const ModelConfig& model, int64_t seq_len) {
  ModelCost cost;
  const DeepSeekModel shapes(model);
  double product_elements = 0;  // of weights that a token is multiplied with
  for (const Parameter& p : shapes.parameters().all()) {
    if (!p.spec.trainable) continue;
    const int64_t n = p.global_numel();
    const bool embedding_only =
        p.spec.name == "model.embed_tokens.weight" && !model.tie_word_embeddings;
    int64_t active = n;
    if (p.is_expert()) active = n / model.n_routed_experts * model.num_experts_per_tok;
    if (embedding_only) active = model.hidden_size;
    cost.parameters_total += n;
    cost.parameters_active += active;
    const bool matrix = p.spec.init == Init::normal;  // not a gain, nor a bias by head
    if (matrix && !embedding_only) product_elements += static_cast<double>(active);
  }
  // Each prediction module uses the head once more.
  const double mtp = static_cast<double>(model.num_nextn_predict_layers);
  product_elements += mtp * static_cast<double>(model.vocab_size * model.hidden_size);
  const double pairs = static_cast<double>(seq_len + 1) / 2;  // keys that an average query sees
  const double attention = static_cast<double>(model.num_attention_heads) *
                           static_cast<double>(model.qk_dim() + model.v_dim()) * pairs *
                           (static_cast<double>(model.num_hidden_layers) + mtp);
  cost.flops_per_token = 6 * product_elements + 6 * attention;
  return cost;
}

}  // namespace dstrain
