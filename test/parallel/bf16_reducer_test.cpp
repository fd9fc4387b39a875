// Sums of gradients that travel in bf16: their bits against a plain computation, what is sent, what
// they take, and what they cost in loss.
#include <cmath>
#include <limits>
#include <map>
#include <string>

#include "core/base/bf16.h"
#include "parallel/dense_reducer.h"
#include "test/support/catch.h"
#include "test/support/layout_jobs.h"
#include "test/support/reducer_rank.h"

namespace dstrain::test {
namespace {

const GradReducerOptions kRounds{
    .compression = {}, .hierarchical = true, .gathers = true, .rounds = true};

float rounded(float x) {
  return bf16_to_f32(f32_to_bf16(x));
}

Floats rounded(Floats x) {
  for (float& value : x) value = rounded(value);
  return x;
}

// The gradients of all ranks, one after another.
Floats of_all_ranks(RankContext& rank, Floats mine) {
  Floats all(mine.size() * static_cast<size_t>(rank.world.size()));
  rank.world.all_gather(rank.stream, as_tensor(mine), as_tensor(all));
  return all;
}

// What the ranks send to one owner for an element, rounded; summed over the ranks of a node and
// then over nodes, each in ascending order and rounded once.
float plain_sum(const Floats& all, size_t elements, size_t element, size_t ranks, size_t per_node) {
  float sum = 0;
  for (size_t node = 0; node < ranks / per_node; ++node) {
    float of_node = 0;
    for (size_t r = node * per_node; r < (node + 1) * per_node; ++r)
      of_node += rounded(all[r * elements + element]);
    sum += per_node < ranks ? rounded(of_node) : of_node;
  }
  return rounded(sum);
}

Floats plain_shard(RankContext& rank, const ReducerRank& one, const Floats& all, int per_node) {
  const auto ranks = static_cast<size_t>(rank.world.size()),
             elements = static_cast<size_t>(one.elements());
  Floats shard(static_cast<size_t>(one.range.shard));
  const size_t begin = static_cast<size_t>(rank.world.rank()) * shard.size();
  for (size_t i = 0; i < shard.size(); ++i)
    shard[i] = plain_sum(all, elements, begin + i, ranks,
                         per_node > 0 ? static_cast<size_t>(per_node) : ranks);
  return shard;
}

// A part of a whole gathered with bits that are the same on all ranks.
bool agree(RankContext& rank, const Floats& whole) {
  const Floats all = of_all_ranks(rank, whole);
  for (int r = 0; r < rank.world.size(); ++r) {
    const auto begin = all.begin() + r * std::ssize(whole);
    if (!same_bits(Floats(begin, begin + std::ssize(whole)), whole)) return false;
  }
  return true;
}

// Planted fault: the owner of a sum keeps what it has, where the others get it rounded.
class UnroundedOwner : public GradReducer {
 public:
  UnroundedOwner(GradReducer& inner, int rank) : inner_(inner), rank_(rank) {}
  void make_memory(const OwnerVisitor& visit) override { inner_.make_memory(visit); }
  void begin_step(int64_t step) override { inner_.begin_step(step); }
  void reduce_scatter(DistStream dist, int range, const Tensor& whole,
                      const Tensor& shard) override {
    inner_.reduce_scatter(dist, range, whole, shard);
  }
  void all_gather(DistStream dist, int range, const Tensor& shard, const Tensor& whole) override {
    inner_.all_gather(dist, range, shard, whole);
    const int64_t n = shard.numel();
    dist.ops.convert(dist.stream, shard, whole.rows(rank_ * n, (rank_ + 1) * n));
  }
  void end_step(DistStream dist, const StepScalars* scalars) override {
    inner_.end_step(dist, scalars);
  }
  GradTraffic traffic() const override { return inner_.traffic(); }

 private:
  GradReducer& inner_;
  const int rank_;
};

TEST_CASE("bf16 sums: the bits are those of a plain computation", "[parallel]") {
  const auto [ranks, per_node] = GENERATE(table<int, int>({{2, 0}, {4, 0}, {4, 2}, {6, 3}}));
  CAPTURE(ranks, per_node);
  run_ranks(ranks, [per_node = per_node](RankContext& rank) {
    ReducerRank one(rank, kRounds, per_node);
    for (const uint32_t step : {1u, 2u}) {
      const Floats grad = one.grad(step);
      const Floats expected = plain_shard(rank, one, of_all_ranks(rank, grad), per_node);
      const Floats shard = one.reduce(grad);
      rank_check(same_bits(shard, expected), "a rank's part of the sums");
      rank_check(!same_bits(shard, one.dense_reduce(grad)), "they are rounded");
      rank_check(same_bits(one.gather(shard), of_all_ranks(rank, expected)), "the whole sums");

      // In place, as stores do it.
      Floats whole = grad;
      const int64_t n = one.range.shard, me = rank.world.rank();
      const Tensor own = as_tensor(whole).rows(me * n, (me + 1) * n);
      one.reducer->reduce_scatter(one.dist(), 0, as_tensor(whole), own);
      one.reducer->all_gather(one.dist(), 0, own, as_tensor(whole));
      rank_check(same_bits(whole, of_all_ranks(rank, expected)), "the whole sums in their place");
    }
  });
}

TEST_CASE("bf16 sums: a few by hand", "[parallel]") {
  run_ranks(2, [](RankContext& rank) {
    ReducerRank one(rank, kRounds);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    // Halves of the last bit at 1 go to even; a sum is rounded once more; infinity and NaN arrive.
    const bool first = rank.world.rank() == 0;
    Floats whole(static_cast<size_t>(one.elements()), 0.0f);
    const Floats mine = first ? Floats{1 + 0x1p-8f, 1 + 0x3p-8f, 256, -kInfinity, 3e38f, 1}
                              : Floats{0, 0, 1, 1, 3e38f, std::nanf("")};
    std::copy(mine.begin(), mine.end(), whole.begin());
    const Floats sums = one.gather(one.reduce(whole));
    const Floats expected = {1, 1 + 0x4p-8f, 256, -kInfinity, kInfinity};
    rank_check(std::equal(expected.begin(), expected.end(), sums.begin()), "sums");
    rank_check(std::isnan(sums[5]), "a NaN");
  });
}

TEST_CASE("bf16 sums: all ranks have the same bits of a gathered sum, its owner too",
          "[parallel]") {
  const auto [ranks, per_node] = GENERATE(table<int, int>({{2, 0}, {4, 0}, {4, 2}}));
  run_ranks(ranks, [per_node = per_node](RankContext& rank) {
    ReducerRank one(rank, kRounds, per_node);
    // More digits than bf16 has, as sums over pipeline stages have.
    const Floats sum = random_floats(one.range.shard, 7);
    const Floats whole = one.gather(sum);
    rank_check(agree(rank, whole), "ranks agree");
    rank_check(same_bits(whole, of_all_ranks(rank, rounded(sum))), "rounded sums");

    UnroundedOwner faulty(*one.reducer, rank.world.rank());
    Floats shard = sum, other(whole.size());
    faulty.all_gather(one.dist(), 0, as_tensor(shard), as_tensor(other));
    rank_check(!agree(rank, other), "the planted fault is found");
  });
}

TEST_CASE("bf16 sums: half of the bytes are sent", "[parallel]") {
  const auto [ranks, per_node] = GENERATE(table<int, int>({{2, 0}, {4, 0}, {6, 3}}));
  run_ranks(ranks, [ranks = ranks, per_node = per_node](RankContext& rank) {
    GradReducerOptions exact = kRounds;
    exact.rounds = false;
    ReducerRank half(rank, kRounds, per_node), full(rank, exact, per_node);
    for (ReducerRank* one : {&half, &full}) one->gather(one->reduce(one->grad(1)));
    const GradTraffic of_half = half.reducer->traffic(), of_full = full.reducer->traffic();
    const auto check = [&](const PhaseTraffic& mine, const PhaseTraffic& whole) {
      rank_check(whole.sent == (ranks - 1) * half.range.shard * 4, "all of it in f32");
      rank_check(2 * mine.sent == whole.sent && mine.baseline == whole.baseline, "half is sent");
      rank_check(2 * mine.sent_between_nodes == whole.sent_between_nodes &&
                     mine.baseline_between_nodes == whole.baseline_between_nodes,
                 "half between nodes");
    };
    check(of_half.reduce, of_full.reduce);
    check(of_half.gather, of_full.gather);
  });
}

TEST_CASE("bf16 sums: the largest range is in the plan in bf16, to the byte", "[parallel]") {
  run_ranks(4, [](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    for (const bool has_nodes : {false, true}) {
      const NodeSplit nodes =
          split_by_node(rank.world, has_nodes && rank.world.rank() >= 2 ? "b" : "a");
      const GradRange range = whole_range(parameters, 4), small = {0, 40, 10};
      const auto reducer = make_grad_reducer(kRounds, nodes.ranks, parameters, {small, range});
      std::map<std::string, int64_t> bytes;
      reducer->make_memory([&](const char* owner, MemoryKind, const auto& make) {
        Arena arena(owner);
        make(arena);
        bytes[owner] += arena.peak();
      });
      const auto aligned = [](int64_t n) { return (n + 255) / 256 * 256; };
      const int64_t whole = aligned(4 * range.shard * 2), of_nodes = aligned(2 * range.shard * 2);
      rank_check(bytes.size() == 1 &&
                     bytes.at("gradients on their way") == whole + (has_nodes ? of_nodes : 0),
                 "bytes: " + std::to_string(bytes.at("gradients on their way")));
    }
  });
}

TEST_CASE("bf16 sums: one rank rounds nothing, f64 and compression are refused", "[parallel]") {
  run_ranks(1, [](RankContext& rank) {
    ReducerRank one(rank, kRounds);
    rank_check(same_bits(one.reduce(one.grad(1)), one.grad(1)), "what it has");
  });
  run_ranks(2, [](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const NodeSplit nodes = split_by_node(rank.world, "a");
    const auto refused = [&](const GradReducerOptions& options) -> std::string {
      try {
        make_grad_reducer(options, nodes.ranks, parameters, {});
      } catch (const std::exception& error) {
        return error.what();
      }
      return "";
    };
    GradReducerOptions options = kRounds;
    options.dtype = DType::f64;
    rank_check(refused(options).find("bf16 takes f32") != std::string::npos, refused(options));
    options = kRounds;
    options.compression.method = CompressionMethod::int8;
    rank_check(refused(options).find("not both") != std::string::npos, refused(options));
  });
}

void check_training(const LayoutReference& reference, const MeshShape& shape, int64_t zero) {
  LayoutJob job = job_at(reference.config, shape, zero);
  INFO(to_text(job));
  const LayoutRunOptions options = replay_options(reference);
  const LayoutRun exact = run_layout(job.config, shape, options);
  job.config.precision.reduce = ReduceType::bf16;
  const LayoutRun run = run_layout(job.config, shape, options),
                  again = run_layout(job.config, shape, options);
  CHECK(run.disagreement == "");
  CHECK(bit_difference(run, again) == "");
  CHECK(bit_difference(run, exact) != "");
  REQUIRE(run.steps.size() == reference.run.steps.size());
  for (size_t i = 0; i < run.steps.size(); ++i)
    CHECK(std::fabs(run.steps[i].loss / reference.run.steps[i].loss - 1) < 1e-3);
  CHECK(2 * run.traffic.reduce.sent == exact.traffic.reduce.sent);
  CHECK(2 * run.traffic.gather.sent == exact.traffic.gather.sent);
  CHECK((run.traffic.gather.sent > 0) == (zero == 0));
}

TEST_CASE("bf16 sums: every layout trains as with sums in fp32, and twice to the same bits",
          "[ranks]") {
  const LayoutReference dense(tiny_dense_job(4), /*steps=*/10), moe(tiny_moe_job(4), 10);
  for (int64_t zero = 0; zero <= 3; ++zero) {
    for (const MeshShape& shape :
         {MeshShape{.data = 2}, MeshShape{.data = 4}, MeshShape{.data = 2, .tensor = 2},
          MeshShape{.pipeline = 2, .data = 2}})
      check_training(dense, shape, zero);
    check_training(moe, {.data = 4, .expert = 2}, zero);
  }
}

}  // namespace
}  // namespace dstrain::test
