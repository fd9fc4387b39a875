// Plans of single ranks against ranks that exist: what a dry run prints is what a run takes.
#include "parallel/rank_job.h"

#include <map>
#include <mutex>

#include "core/backend/cpu_backend.h"
#include "parallel/thread_communicator.h"
#include "test/support/catch.h"
#include "test/support/slow_link.h"

namespace dstrain {
namespace {

Config tiny_config(int64_t zero) {
  Config config;
  ModelConfig& m = config.model;
  m.vocab_size = 67;
  m.hidden_size = 32;
  m.num_hidden_layers = 4;
  m.intermediate_size = 48;
  m.moe_intermediate_size = 16;
  m.n_routed_experts = 8;
  m.num_experts_per_tok = 2;
  m.n_shared_experts = 1;
  m.num_attention_heads = 4;
  m.num_key_value_heads = 2;
  config.data.seq_len = 16;
  config.train.micro_batch = 2;
  config.train.global_batch = 16;
  config.parallel.zero = zero;
  return config;
}

std::string memory_text(const TrainEngine& engine) {
  std::string text;
  for (const MemoryOwner& owner : engine.memory())
    text += owner.name + " " + std::to_string(owner.bytes) + "\n";
  return text;
}

}  // namespace

TEST_CASE("RankJob: the plan of a rank is what the rank of a job takes", "[rank_job]") {
  const int64_t zero = GENERATE(0, 1, 2, 3);
  const MeshShape shape = GENERATE(MeshShape{2, 2, 1, 2, 4}, MeshShape{1, 2, 2, 1, 2},
                                   MeshShape{4, 1, 1, 1, 1}, MeshShape{1, 1, 1, 1, 1});
  Config config = tiny_config(zero);
  SECTION("dense gradients") {}
  SECTION("compressed gradients") {
    config.compression.method = CompressionMethod::topk;
  }
  SECTION("gradients in bf16") {
    config.precision.reduce = ReduceType::bf16;
  }
  CAPTURE(zero, to_text(shape));
  std::mutex mutex;
  std::map<int, std::string> taken;
  run_rank_threads(static_cast<int>(shape.ranks()), [&](Communicator& world) {
    const auto backend = make_cpu_backend(1);
    RankJob job(config, shape, world, *backend, "here", /*training=*/true);
    const std::scoped_lock lock(mutex);
    taken[world.rank()] = memory_text(job.engine());
  });
  const auto backend = make_cpu_backend(1);
  for (int rank = 0; rank < shape.ranks(); ++rank) {
    RankJob plan(config, shape, rank, *backend, /*training=*/true);
    CHECK(memory_text(plan.engine()) == taken.at(rank));
  }
}

TEST_CASE("RankJob: compression.method auto plans residuals for what it compresses", "[rank_job]") {
  Config config = tiny_config(GENERATE(0, 1, 2, 3));
  config.compression.method = CompressionMethod::automatic;
  config.compression.density = 0;
  const MeshShape shape{2, 2, 1, 2, 2};
  const bool is_slow = GENERATE(false, true);
  CAPTURE(config.parallel.zero, is_slow);
  std::mutex mutex;
  std::map<int, std::string> taken, told;
  run_rank_threads(static_cast<int>(shape.ranks()), [&](Communicator& world) {
    const auto backend = make_cpu_backend(1);
    test::SlowLink link(world, is_slow ? 2e6 : 1e12);
    RankJob job(config, shape, link, *backend, "here", /*training=*/true);
    const std::scoped_lock lock(mutex);
    taken[world.rank()] = memory_text(job.engine());
    told[world.rank()] = job.distribution().auto_compression()->describe();
  });
  const auto backend = make_cpu_backend(1);
  for (int rank = 0; rank < shape.ranks(); ++rank) {
    CAPTURE(rank, told.at(rank));
    // A plan without ranks holds all that could be chosen.
    RankJob plan(config, shape, rank, *backend, /*training=*/true);
    CHECK(plan.distribution().auto_compression() == nullptr);
    const bool has_residuals = taken.at(rank).find("gradient residuals") != std::string::npos;
    CHECK(has_residuals == is_slow);
    CHECK((memory_text(plan.engine()) == taken.at(rank)) == is_slow);
    CHECK(told.at(rank).find(is_slow ? "auto: int8 for " : "auto: none for ") == 0);
  }
}

TEST_CASE("RankJob: the printed bytes of parameters are those of their owners", "[rank_job]") {
  const int64_t zero = GENERATE(0, 1, 2, 3);
  const Config config = tiny_config(zero);
  const MeshShape shape{2, 2, 1, 2, 4};
  const auto backend = make_cpu_backend(1);
  for (int rank = 0; rank < shape.ranks(); ++rank) {
    RankJob plan(config, shape, rank, *backend, /*training=*/true);
    std::map<std::string, int64_t> owners;
    for (const MemoryOwner& owner : plan.engine().memory()) owners[owner.name] += owner.bytes;
    const ShardBytes bytes = plan.distribution().parameter_bytes();
    CHECK(owners["parameters"] + owners["router bias"] == bytes.values);
    CHECK(owners["gathered parameters"] == bytes.gather_slots);
    CHECK(owners["gradients"] == bytes.gradients);
    CHECK(owners["gradients of blocks in flight"] == bytes.gradient_slots);
    CHECK(owners["optimizer state"] == bytes.moments);
    CHECK((bytes.gather_slots > 0) == (zero == 3));
    CHECK((bytes.gradient_slots > 0) == (zero >= 2));
  }
}

}  // namespace dstrain
