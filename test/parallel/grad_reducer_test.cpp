// Dense sums over one and two levels, how ranks are split into nodes, and what is counted as sent.
#include "parallel/grad_reducer.h"

#include <cmath>

#include "test/support/catch.h"
#include "test/support/reducer_rank.h"

namespace dstrain::test {
namespace {

const GradReducerOptions kHierarchical{.compression = {}, .hierarchical = true, .gathers = true};

Floats rounded(Floats x) {
  for (float& value : x) value = std::nearbyint(16 * value);
  return x;
}

// Node names of a job, and the split that its rank 0 sees.
std::vector<int> split_of(const std::vector<std::string>& nodes, bool& two_levels) {
  std::vector<int> found(2);
  run_ranks(static_cast<int>(nodes.size()), [&](RankContext& rank) {
    const NodeSplit split =
        split_by_node(rank.world, nodes[static_cast<size_t>(rank.world.rank())]);
    const bool has_both = split.ranks.intra && split.ranks.inter;
    rank_check(has_both == (split.ranks.intra || split.ranks.inter), "both levels or none");
    if (rank.world.rank() != 0) return;
    found = {split.ranks.nodes, split.ranks.elsewhere};
    two_levels = has_both;
  });
  return found;
}

TEST_CASE("grad reducer: ranks are split by the name of their node", "[parallel]") {
  bool two_levels = false;
  CHECK(split_of({"a", "a", "b", "b"}, two_levels) == std::vector<int>{2, 2});
  CHECK(two_levels);
  CHECK(split_of({"a", "a", "a"}, two_levels) == std::vector<int>{1, 0});
  CHECK_FALSE(two_levels);
  CHECK(split_of({"a", "b", "c"}, two_levels) == std::vector<int>{3, 2});
  CHECK_FALSE(two_levels);
  CHECK(split_of({"a", "a", "a", "b"}, two_levels) == std::vector<int>{2, 1});
  CHECK_FALSE(two_levels);
  CHECK(split_of({"a", "b", "a", "b"}, two_levels) == std::vector<int>{2, 2});
  CHECK_FALSE(two_levels);
  CHECK(split_of({"a", "a", "b", "b", "b"}, two_levels) == std::vector<int>{2, 3});
  CHECK_FALSE(two_levels);
}

TEST_CASE("grad reducer: two levels give the sums of one", "[parallel]") {
  const auto [ranks, per_node] = GENERATE(table<int, int>({{4, 2}, {6, 2}, {6, 3}, {8, 4}}));
  CAPTURE(ranks, per_node);
  run_ranks(ranks, [per_node = per_node](RankContext& rank) {
    ReducerRank one(rank, kHierarchical, per_node);
    // Small whole numbers: any order of summation gives the same bits.
    const Floats exact = one.reduce(rounded(one.grad(1)));
    rank_check(same_bits(exact, one.dense_reduce(rounded(one.grad(1)))), "sums of whole numbers");
    const Floats sums = one.reduce(one.grad(2)), expected = one.dense_reduce(one.grad(2));
    for (size_t i = 0; i < sums.size(); ++i)
      rank_check(std::fabs(sums[i] - expected[i]) <= 4e-6f, "sums up to rounding");

    Floats gathered(static_cast<size_t>(one.elements())), shard = sums;
    rank.world.all_gather(rank.stream, as_tensor(shard), as_tensor(gathered));
    rank_check(same_bits(one.gather(sums), gathered), "shards in rank order");
  });
}

TEST_CASE("grad reducer: the shard may be its own place in the whole", "[parallel]") {
  const int per_node = GENERATE(0, 2);
  run_ranks(4, [&](RankContext& rank) {
    ReducerRank one(rank, kHierarchical, per_node);
    Floats whole = rounded(one.grad(3));
    const Floats expected = one.dense_reduce(whole), all = one.gather(expected);
    const int64_t n = one.range.shard, me = rank.world.rank();
    const Tensor shard = as_tensor(whole).rows(me * n, (me + 1) * n);
    one.reducer->reduce_scatter(one.dist(), 0, as_tensor(whole), shard);
    rank_check(same_bits(Floats(shard.data<float>(), shard.data<float>() + n), expected), "reduce");
    one.reducer->all_gather(one.dist(), 0, shard, as_tensor(whole));
    rank_check(same_bits(whole, all), "gather");
  });
}

TEST_CASE("grad reducer: between nodes, two levels send less by the ranks of a node",
          "[parallel]") {
  run_ranks(6, [](RankContext& rank) {
    GradReducerOptions flat = kHierarchical;
    flat.hierarchical = false;
    ReducerRank one(rank, flat, 3), two(rank, kHierarchical, 3);
    for (ReducerRank* r : {&one, &two}) {
      const int64_t before = rank.world.bytes_sent();
      r->gather(r->reduce(r->grad(1)));
      const GradTraffic traffic = r->reducer->traffic();
      for (const PhaseTraffic& phase : {traffic.reduce, traffic.gather}) {
        const int64_t shard_bytes = r->range.shard * 4;
        rank_check(phase.baseline == 5 * shard_bytes, "the baseline sends to all others");
        rank_check(phase.baseline_between_nodes == 3 * shard_bytes, "three are elsewhere");
        rank_check(phase.sent == 5 * shard_bytes, "all in all, as much is sent");
        rank_check(phase.sent_between_nodes == (r == &one ? 3 : 1) * shard_bytes,
                   "a third between nodes");
      }
      const int64_t flat_bytes = r == &one ? traffic.reduce.sent + traffic.gather.sent : 0;
      rank_check(rank.world.bytes_sent() - before == flat_bytes, "what the communicator counts");
    }
  });
}

TEST_CASE("grad reducer: a dry run sends nothing", "[parallel]") {
  CompressionConfig topk;
  topk.method = CompressionMethod::topk;
  const CompressionConfig compression = GENERATE_REF(CompressionConfig{}, topk);
  const int per_node = GENERATE(0, 1, 2);
  run_ranks(4, [&](RankContext& rank) {
    GradReducerOptions options = kHierarchical;
    options.compression = compression;
    ReducerRank one(rank, options, per_node);
    if (rank.world.rank() != 0) return;  // nobody else comes
    Floats whole = one.grad(1), shard(static_cast<size_t>(one.range.shard));
    DistStream dry = one.dist();
    dry.dry = true;
    one.reducer->reduce_scatter(dry, 0, as_tensor(whole), as_tensor(shard));
    one.reducer->all_gather(dry, 0, as_tensor(shard), as_tensor(whole));
    rank_check(one.reducer->traffic().reduce.baseline == 0, "nothing counted");
  });
}

TEST_CASE("grad reducer: f64 is summed in f64, and not compressed", "[parallel]") {
  run_ranks(4, [](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const NodeSplit nodes = split_by_node(rank.world, rank.world.rank() < 2 ? "a" : "b");
    GradReducerOptions options = kHierarchical;
    options.dtype = DType::f64;
    const auto reducer = make_grad_reducer(options, nodes.ranks, parameters, {{0, 4, 1}});
    const auto memory = make_reducer_memory(rank.backend, *reducer);
    std::vector<double> whole(4, 1 + 1e-12), shard(1);
    reducer->reduce_scatter({rank.backend.ops(), rank.stream}, 0,
                            Tensor(whole.data(), DType::f64, {4}),
                            Tensor(shard.data(), DType::f64, {1}));
    rank_check(shard[0] == 4 * (1 + 1e-12), "the sum in f64");

    options.compression.method = CompressionMethod::topk;
    try {
      make_grad_reducer(options, nodes.ranks, parameters, {{0, 4, 1}});
      rank_check(false, "compression of f64 is refused");
    } catch (const std::exception& e) {
      rank_check(std::string(e.what()).find("compression takes f32") != std::string::npos,
                 e.what());
    }
  });
}

TEST_CASE("grad reducer: compression between uneven nodes is refused", "[parallel]") {
  std::string text;
  run_ranks(3, [&](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const NodeSplit nodes = split_by_node(rank.world, rank.world.rank() < 2 ? "a" : "b");
    GradReducerOptions options;
    options.compression.method = CompressionMethod::int8;
    options.compression.scope = CompressionScope::inter_node;
    try {
      make_grad_reducer(options, nodes.ranks, parameters, {});
      rank_check(false, "an error");
    } catch (const ConfigError& e) {
      if (rank.world.rank() == 0) text = e.what();
    }
    options.compression.scope = CompressionScope::all;
    make_grad_reducer(options, nodes.ranks, parameters, {});
  });
  CHECK(text ==
        "compression.scope: inter_node needs the same number of consecutive ranks on every node, "
        "but 3 ranks that sum gradients lie unevenly on 2 nodes; scope: all works");
}

TEST_CASE("grad reducer: traffic as a line", "[parallel]") {
  CHECK(describe(GradTraffic{}) == "nothing sent");
  GradTraffic sum{{1, 2, 3, 4}, {5, 6, 7, 8}};
  sum += sum;
  CHECK(describe(sum) == describe(GradTraffic{{2, 4, 6, 8}, {10, 12, 14, 16}}));
  CHECK(describe(GradTraffic{{1 << 20, 20 << 20, 0, 0}, {}}) ==
        "reduce-scatter 1.00 MiB sent, 5.0% of 20.0 MiB in fp32 at once");
  CHECK(
      describe(GradTraffic{{1 << 20, 4 << 20, 1 << 19, 2 << 20}, {1 << 20, 1 << 20, 0, 0}}) ==
      "reduce-scatter 1.00 MiB sent, 25.0% of 4.00 MiB in fp32 at once (between nodes 512 KiB, "
      "25.0% "
      "of 2.00 MiB in fp32 at once); all-gather 1.00 MiB sent, 100.0% of 1.00 MiB in fp32 at once");
}

}  // namespace
}  // namespace dstrain::test
