// Small jobs against the large ones they stand for: the same paths through the code, and the same
// layouts.
#include "apps/shrink_config.h"

#include <numeric>

#include "core/config/config_io.h"
#include "core/config/validate.h"
#include "core/model/cost.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

struct Job {
  const char* name;
  std::vector<std::string> settings;
};

const std::vector<Job>& jobs() {
  static const std::vector<Job> kJobs = {
      {"quickstart", {"model.preset=quickstart-moe"}},
      {"V2-Lite",
       {"model.preset=v2-lite", "data.seq_len=4096", "parallel.expert=8", "train.global_batch=64"}},
      {"V3, interleaved",
       {"model.preset=deepseek-v3", "data.seq_len=4096", "parallel.tensor=4", "parallel.context=2",
        "parallel.pipeline=4", "parallel.schedule=interleaved", "parallel.virtual_stages=4",
        "parallel.expert=16", "train.global_batch=512", "train.recompute=selective"}},
      {"grouped queries by three",
       {"model.vocab_size=50257", "model.hidden_size=768", "model.num_hidden_layers=12",
        "model.intermediate_size=3072", "model.num_attention_heads=12",
        "model.num_key_value_heads=6", "model.tie_word_embeddings=true", "data.seq_len=768",
        "parallel.tensor=3", "parallel.zero=3", "compression.method=int8"}},
      {"odd everything",
       {"model.vocab_size=1001", "model.num_hidden_layers=7", "model.num_attention_heads=5",
        "model.head_dim=10", "model.intermediate_size=333", "data.seq_len=77",
        "train.micro_batch=6", "train.global_batch=18"}},
      {"groups of experts that do not halve",
       {"model.preset=v2-lite", "model.n_routed_experts=63", "model.n_group=7",
        "model.topk_group=3", "model.topk_method=group_limited_greedy",
        "model.moe_intermediate_size=77", "model.n_shared_experts=3"}},
      {"groups", {"model.preset=deepseek-v3", "model.num_nextn_predict_layers=3"}},
      {"tiny",
       {"model.vocab_size=11", "model.hidden_size=4", "model.num_attention_heads=1",
        "model.num_hidden_layers=1", "model.intermediate_size=3", "data.seq_len=2",
        "train.micro_batch=1", "train.global_batch=1"}}};
  return kJobs;
}

LoadedConfig load(const Job& job) {
  std::vector<Override> overrides = {{"run.name", "x", "--set"}};
  for (const std::string& setting : job.settings) {
    const size_t equals = setting.find('=');
    overrides.push_back({setting.substr(0, equals), setting.substr(equals + 1), "--set"});
  }
  return load_config(std::nullopt, overrides);
}

MeshShape own_of(const Config& config, int64_t ranks) {
  return shrink_shape(smallest_mesh(config), ranks);
}

bool divides_alike(int64_t small, int64_t large, int64_t by) {
  return (small % by == 0) == (large % by == 0);
}

}  // namespace

TEST_CASE("shrink_shape: axes in use stay in use while there is room", "[shrink]") {
  const auto shrunk = [](MeshShape shape, int64_t ranks) { return shrink_shape(shape, ranks); };
  CHECK(shrunk({2, 8, 1, 4, 8}, 8) == MeshShape{2, 2, 1, 2, 2});
  CHECK(shrunk({2, 8, 1, 4, 32}, 8) == MeshShape{2, 2, 1, 2, 4});
  CHECK(shrunk({2, 8, 1, 4, 8}, 4) == MeshShape{2, 1, 1, 2, 2});
  CHECK(shrunk({1, 64, 1, 1, 1}, 8) == MeshShape{1, 8, 1, 1, 1});
  CHECK(shrunk({1, 64, 1, 1, 16}, 4) == MeshShape{1, 4, 1, 1, 2});
  CHECK(shrunk({1, 6, 1, 3, 1}, 8) == MeshShape{1, 2, 1, 3, 1});
  CHECK(shrunk({4, 4, 2, 4, 16}, 16) == MeshShape{2, 2, 2, 2, 4});
  CHECK(shrunk({1, 1, 1, 1, 1}, 8) == MeshShape{1, 1, 1, 1, 1});
  CHECK(shrunk({7, 1, 1, 1, 1}, 4) == MeshShape{1, 1, 1, 1, 1});
  CHECK(shrunk({1, 2, 1, 1, 2}, 8) == MeshShape{1, 2, 1, 1, 2});
}

TEST_CASE("shrink_config: small, valid, and its own layout is legal", "[shrink]") {
  for (const Job& job : jobs())
    for (const int64_t ranks : {2, 4, 8}) {
      CAPTURE(job.name, ranks);
      const LoadedConfig loaded = load(job);
      validate(loaded, Purpose::inspect);
      const MeshShape own = own_of(loaded.config, ranks);
      LoadedConfig small;
      small.config = shrink_config(loaded.config, own, ranks);
      CHECK_NOTHROW(validate(small, Purpose::inspect));
      CHECK(check_layout(small.config, own).empty());
      CHECK(model_cost(small.config.model, small.config.data.seq_len).parameters_total < 150000);
      const Config& c = small.config;
      CHECK(c.train.global_batch * c.data.seq_len <= 8192);
      CHECK(micro_batches_per_step(c, own) >= 3);
      CHECK(c.compression.method == CompressionMethod::none);
    }
}

TEST_CASE("shrink_config: what takes another path through the code stays", "[shrink]") {
  for (const Job& job : jobs()) {
    CAPTURE(job.name);
    const Config large = load(job).config;
    const Config c = shrink_config(large, own_of(large, 8), 8);
    const ModelConfig &a = large.model, &b = c.model;
    CHECK(b.is_mla() == a.is_mla());
    CHECK((b.q_lora_rank > 0) == (a.q_lora_rank > 0));
    CHECK((b.num_key_value_heads > 0) == (a.num_key_value_heads > 0));
    CHECK((b.kv_heads() < b.num_attention_heads) == (a.kv_heads() < a.num_attention_heads));
    CHECK((b.head_dim > 0) == (a.head_dim > 0));
    CHECK((b.n_routed_experts > 0) == (a.n_routed_experts > 0));
    CHECK((b.n_shared_experts > 1) == (a.n_shared_experts > 1));
    CHECK((b.n_group > 1) == (a.n_group > 1));
    CHECK((b.topk_group < b.n_group) == (a.topk_group < a.n_group));
    CHECK((b.num_experts_per_tok > 1) == (a.num_experts_per_tok > 1));
    CHECK((b.first_k_dense_replace > 0) == (a.first_k_dense_replace > 0));
    CHECK((b.num_nextn_predict_layers > 0) == (a.num_nextn_predict_layers > 0));
    CHECK(b.tie_word_embeddings == a.tie_word_embeddings);
    CHECK(b.scoring_func == a.scoring_func);
    CHECK(b.aux_loss_alpha == a.aux_loss_alpha);
    CHECK(b.rope_scaling.type == a.rope_scaling.type);
    CHECK((b.vocab_size % 2 != 0) == (a.vocab_size % 2 != 0 || a.vocab_size == 0));
    CHECK(b.num_hidden_layers % 2 == a.num_hidden_layers % 2);
    CHECK(c.train.recompute == large.train.recompute);
    CHECK(c.parallel.schedule == large.parallel.schedule);
    CHECK(c.parallel.zero == large.parallel.zero);
    CHECK((c.optimizer.grad_clip > 0) == (large.optimizer.grad_clip > 0));
    for (const int64_t by : {2, 4, 8}) {
      CHECK(divides_alike(b.kv_heads(), a.kv_heads(), by));
      CHECK(divides_alike(b.intermediate_size, a.intermediate_size, by));
      CHECK(divides_alike(b.n_routed_experts, a.n_routed_experts, by));
      CHECK(divides_alike(b.n_shared_experts * b.moe_intermediate_size,
                          a.n_shared_experts * a.moe_intermediate_size, by));
      CHECK(divides_alike(c.data.seq_len, large.data.seq_len, 2 * by));
      CHECK(divides_alike(c.train.micro_batch * c.data.seq_len,
                          large.train.micro_batch * large.data.seq_len, by));
    }
  }
}

TEST_CASE("shrink_config: an own axis of three ranks stays possible", "[shrink]") {
  const Config large = load(jobs().at(3)).config;
  const Config c = shrink_config(large, {1, 1, 1, 3, 1}, 4);
  CHECK(c.model.kv_heads() == 6);
  CHECK(c.model.num_attention_heads == 12);
  CHECK(c.model.intermediate_size % 3 == 0);
  CHECK(check_layout(c, {1, 1, 1, 3, 1}).empty());
}

}  // namespace dstrain
