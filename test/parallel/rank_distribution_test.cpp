// Which communicators a rank's distribution makes beside those of the mesh.
#include "parallel/rank_distribution.h"

#include <utility>

#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/rank_threads.h"
#include "test/support/slow_link.h"

namespace dstrain::test {
namespace {

// Counts splits of these ranks, and of what comes from them.
class CountedSplits : public SlowLink {
 public:
  CountedSplits(Communicator& inner, int& splits)
      : SlowLink(inner, 1e12), inner_(inner), splits_(splits) {}
  std::unique_ptr<Communicator> split(int color, int key) override {
    ++splits_;
    std::unique_ptr<Communicator> inner = inner_.split(color, key);
    auto split = std::make_unique<CountedSplits>(*inner, splits_);
    split->own_ = std::move(inner);
    return split;
  }

 private:
  Communicator& inner_;
  std::unique_ptr<Communicator> own_;
  int& splits_;
};

// Communicators within and between two nodes of equally many ranks each.
int node_communicators(const Config& config, const MeshShape& shape) {
  int made = 0;
  run_ranks(static_cast<int>(shape.ranks()), [&](RankContext& rank) {
    int splits = 0;
    CountedSplits world(rank.world, splits);
    ProcessMesh mesh(shape, world, rank.backend);
    const int before = splits;
    const bool is_first = rank.world.rank() < rank.world.size() / 2;
    RankDistribution distribution(config, mesh, rank.backend, is_first ? "a" : "b");
    if (rank.world.rank() == 0) made = splits - before;
  });
  return made;
}

}  // namespace

TEST_CASE("rank distribution: communicators of nodes are made where sums may need them",
          "[parallel]") {
  const MeshShape data4{1, 4, 1, 1, 1};
  Config config;
  CHECK(node_communicators(config, data4) == 2);
  config.parallel.hierarchical = false;
  CHECK(node_communicators(config, data4) == 0);

  CompressionConfig& compression = config.compression;
  for (const auto method : {CompressionMethod::int8, CompressionMethod::topk}) {
    compression.method = method;
    for (const bool hierarchical : {false, true}) {  // which compression of all does without
      config.parallel.hierarchical = hierarchical;
      compression.scope = CompressionScope::all;
      CHECK(node_communicators(config, data4) == 0);
      compression.scope = CompressionScope::inter_node;
      CHECK(node_communicators(config, data4) == 2);
    }
  }
  compression.method = CompressionMethod::automatic;
  CHECK(node_communicators(config, data4) == 2);
  compression.scope = CompressionScope::all;
  CHECK(node_communicators(config, data4) == 2);
  config.parallel.hierarchical = false;
  CHECK(node_communicators(config, data4) == 0);
}

TEST_CASE("rank distribution: groups of the same ranks share communicators of nodes",
          "[parallel]") {
  const Config config;
  // Parameters that tensor parallelism cuts, and experts, have ranks of their own here.
  CHECK(node_communicators(config, {1, 4, 1, 2, 1}) == 4);
  CHECK(node_communicators(config, {1, 8, 1, 1, 2}) == 4);
  CHECK(node_communicators(config, {1, 4, 1, 2, 2}) == 4);
  CHECK(node_communicators(config, {1, 2, 1, 4, 1}) == 2);  // one rank per node and tensor part
}

TEST_CASE("rank distribution: training over two nodes is that of one rank", "[parallel]") {
  const LayoutReference reference(tiny_moe_job(4), 3);
  LayoutRunOptions options = replay_options(reference);
  options.nodes = 2;
  for (const MeshShape& shape : {MeshShape{1, 4, 1, 1, 1}, MeshShape{1, 4, 1, 2, 2}})
    for (const int64_t zero : {0, 1, 2}) {
      const LayoutJob job = job_at(reference.config, shape, zero);
      INFO(to_text(job));
      CHECK(failures(reference, job, options) == "");
    }
}

}  // namespace dstrain::test
