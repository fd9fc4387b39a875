// Compressed sums over ranks: nothing is lost but to the residuals, everybody gets the same bits,
// skipped steps, bytes, and checkpoints at the same and at other numbers of ranks.
#include "parallel/compression.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"
#include "test/support/reducer_rank.h"

namespace dstrain::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

GradReducerOptions topk(double density = 0.05, CompressedValues values = CompressedValues::bf16) {
  GradReducerOptions options;
  options.compression.method = CompressionMethod::topk;
  options.compression.density = density;
  options.compression.value_dtype = values;
  options.compression.block = {1024};
  options.gathers = true;
  return options;
}
GradReducerOptions int8() {
  GradReducerOptions options;
  options.compression.method = CompressionMethod::int8;
  options.gathers = true;
  return options;
}
GradReducerOptions between_nodes(GradReducerOptions options) {
  options.compression.scope = CompressionScope::inter_node;
  return options;
}

// A checkpoint in memory: global tensors by kind and parameter; all parameters here are whole on
// every rank.
class Saved {
 public:
  // All parameters, or the one that is named.
  void save(const GradReducer& reducer, const std::string& only = "") {
    const std::scoped_lock lock(mutex_);
    for (const StateSlice& slice : reducer.saved()) {
      if (!only.empty() && slice.parameter->spec.name != only) continue;
      Floats& tensor = tensors_[slice.kind][slice.parameter->spec.name];
      tensor.resize(static_cast<size_t>(slice.parameter->numel()), kNan);
      for (int64_t i = slice.begin; i < slice.end; ++i) {
        float& element = tensor[static_cast<size_t>(i)];
        rank_check(std::isnan(element), "each element is saved once");
        element = slice.data.data<float>()[i - slice.begin];
      }
    }
  }
  void load(const GradReducer& reducer) const {
    const auto kinds = [&](const Parameter& p) {
      std::vector<std::string> found;
      for (const auto& [kind, parameters] : tensors_)
        if (parameters.contains(p.spec.name)) found.push_back(kind);
      return found;
    };
    for (const StateSlice& slice : reducer.loaded(kinds)) {
      const Floats& tensor = tensors_.at(slice.kind).at(slice.parameter->spec.name);
      for (int64_t i = slice.begin; i < slice.end; ++i) {
        float& element = slice.data.data<float>()[i - slice.begin];
        element = tensor.at(static_cast<size_t>(i)) + (slice.add ? element : 0.0f);
      }
    }
  }
  // The sum over kinds, of all parameters in a row.
  std::vector<double> total() const {
    std::map<std::string, std::vector<double>> sums;
    for (const auto& [kind, parameters] : tensors_)
      for (const auto& [name, tensor] : parameters) {
        sums[name].resize(tensor.size());
        for (size_t i = 0; i < tensor.size(); ++i) sums[name][i] += static_cast<double>(tensor[i]);
      }
    std::vector<double> all;
    for (const auto& [name, sum] : sums) all.insert(all.end(), sum.begin(), sum.end());
    return all;
  }
  std::vector<std::string> kinds() const {
    std::vector<std::string> found;
    for (const auto& [kind, parameters] : tensors_) found.push_back(kind);
    return found;
  }

 private:
  std::mutex mutex_;
  std::map<std::string, std::map<std::string, Floats>> tensors_;
};

double norm(const std::vector<double>& x) {
  return std::sqrt(std::inner_product(x.begin(), x.end(), x.begin(), 0.0));
}
double distance(const std::vector<double>& a, const std::vector<double>& b) {
  REQUIRE(a.size() == b.size());
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += (a[i] - b[i]) * (a[i] - b[i]);
  return std::sqrt(sum);
}

// Steps of a ZeRO-0 run: gradients with the numbers [first, last) are summed and come back whole.
Floats run_steps(ReducerRank& rank, uint32_t first, uint32_t last) {
  Floats whole;
  for (uint32_t step = first; step < last; ++step) {
    rank.reducer->begin_step(step);
    whole = rank.gather(rank.reduce(rank.grad(step)));
    rank.end_step();
  }
  return whole;
}

TEST_CASE("compression: top-k of everything in f32 is the dense sum, bit for bit", "[parallel]") {
  const int ranks = GENERATE(1, 2, 3, 4);
  run_ranks(ranks, [](RankContext& rank) {
    ReducerRank one(rank, topk(1.0, CompressedValues::f32));
    for (uint32_t step = 0; step < 3; ++step) {
      Floats grad = one.grad(step);
      grad[5] = -0.0f;
      const Floats sums = one.reduce(grad), expected = one.dense_reduce(grad);
      rank_check(same_bits(sums, expected), "shard");
      Floats gathered(static_cast<size_t>(one.elements())), shard = expected;
      rank.world.all_gather(rank.stream, as_tensor(shard), as_tensor(gathered));
      rank_check(same_bits(one.gather(sums), gathered), "whole");
    }
    rank_check(one.reducer->saved().empty(), "no residuals where nothing is lost");
  });
}

TEST_CASE("compression: what arrives and what is kept add up to all gradients", "[parallel]") {
  const GradReducerOptions options =
      GENERATE(topk(), topk(0.05, CompressedValues::f32), int8(), between_nodes(topk()));
  const bool has_nodes = options.compression.scope == CompressionScope::inter_node;
  const int ranks = has_nodes ? GENERATE(4, 6) : GENERATE(2, 5);
  Saved saved;
  std::vector<double> arrived, wanted;
  std::mutex mutex;
  constexpr uint32_t kSteps = 40;
  run_ranks(ranks, [&](RankContext& rank) {
    ReducerRank one(rank, options, has_nodes ? 2 : 0);
    const auto n = static_cast<size_t>(one.elements());
    std::vector<double> mine(n), sums(n);
    for (uint32_t step = 0; step < kSteps; ++step) {
      const Floats grad = one.grad(step);
      const Floats whole = run_steps(one, step, step + 1);
      for (size_t i = 0; i < n; ++i) {
        mine[i] += static_cast<double>(grad[i]);
        sums[i] += static_cast<double>(whole[i]);
      }
    }
    saved.save(*one.reducer);
    const std::scoped_lock lock(mutex);
    wanted.resize(n);
    for (size_t i = 0; i < n; ++i) wanted[i] += mine[i];
    if (!arrived.empty()) rank_check(sums == arrived, "the same sums on every rank");
    arrived = sums;
  });
  // In the order of the checkpoint: parameters by name, without the gaps of the flat range.
  ParameterSet set;
  declare_some(set);
  std::map<std::string, const Parameter*> by_name;
  for (const Parameter& p : set.all()) by_name[p.spec.name] = &p;
  std::vector<double> sent, expected;
  for (const auto& [name, p] : by_name) {
    sent.insert(sent.end(), arrived.begin() + p->offset, arrived.begin() + p->offset + p->numel());
    expected.insert(expected.end(), wanted.begin() + p->offset,
                    wanted.begin() + p->offset + p->numel());
  }
  const std::vector<double> kept = saved.total();
  REQUIRE(kept.size() == sent.size());
  CHECK(norm(kept) > 1e-3 * norm(expected));
  for (size_t i = 0; i < sent.size(); ++i) sent[i] += kept[i];
  CHECK(distance(sent, expected) <= 1e-6 * norm(expected));
}

TEST_CASE("compression without error feedback keeps nothing", "[parallel]") {
  run_ranks(2, [](RankContext& rank) {
    GradReducerOptions options = topk();
    options.compression.error_feedback = false;
    ReducerRank one(rank, options);
    const Floats first = one.reduce(one.grad(1));
    rank_check(same_bits(one.reduce(one.grad(1)), first), "the same gradient gives the same sum");
    rank_check(one.reducer->saved().empty(), "no residuals");
  });
}

TEST_CASE("compression: what a checkpoint brings of an owner's piece is added to its sum, once",
          "[parallel]") {
  const GradReducerOptions options = GENERATE(topk(), int8());
  const bool in_place = GENERATE(false, true);
  run_ranks(GENERATE(1, 3), [&](RankContext& rank) {
    ReducerRank one(rank, options);
    const int64_t shard = one.range.shard, own = rank.world.rank() * shard;
    // Calls body(element of a residual, its number in its parameter, its place in this rank's
    // piece).
    const auto for_each_own = [&](const auto& body) {
      for (const StateSlice& slice : one.reducer->saved()) {
        if (!is_residual(slice.kind) || slice.kind == "residual.sum") continue;
        for (int64_t i = slice.begin; i < slice.end; ++i) {
          const int64_t at = slice.parameter->offset + i - own;
          if (at >= 0 && at < shard)
            body(slice.data.data<float>()[i - slice.begin], i, static_cast<size_t>(at));
        }
      }
    };
    const auto sum_of_nothing = [&] {
      Floats whole(static_cast<size_t>(one.elements()), 0.0f);
      if (!in_place) return one.reduce(whole);
      const Tensor all = as_tensor(whole);
      one.reducer->reduce_scatter(one.dist(), 0, all, all.rows(own, own + shard));
      return Floats(whole.begin() + own, whole.begin() + own + shard);
    };
    for (int resume = 0; resume < 2; ++resume) {
      one.reducer->clear(one.dist());
      Floats brought(static_cast<size_t>(shard), 0.0f);
      for_each_own([&](float& residual, int64_t i, size_t at) {
        brought[at] = residual = static_cast<float>(i + 1);
      });
      rank_check(sum_of_nothing() == brought, "what was brought");
      rank_check(sum_of_nothing() == Floats(brought.size(), 0.0f), "nothing is left");
      for_each_own([](float residual, int64_t, size_t) { rank_check(residual == 0, "saved"); });
    }
  });
}

TEST_CASE("compression: fewer elements than ranks, and elements that do not divide", "[parallel]") {
  const int64_t elements = GENERATE(0, 1, 3, 5);
  const GradReducerOptions options = GENERATE(topk(1.0, CompressedValues::f32), topk(1.0), int8());
  run_ranks(4, [&](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const NodeSplit nodes = split_by_node(rank.world, "a");
    const int64_t shard = (elements + 3) / 4;
    const auto reducer =
        make_grad_reducer(options, nodes.ranks, parameters, {{0, elements, shard}});
    const auto memory = make_reducer_memory(rank.backend, *reducer);
    const DistStream dist{rank.backend.ops(), rank.stream};
    reducer->clear(dist);
    Floats whole(static_cast<size_t>(4 * shard), 0.0f), sums(static_cast<size_t>(shard));
    for (int64_t i = 0; i < elements; ++i) whole[static_cast<size_t>(i)] = 64.0f;
    reducer->reduce_scatter(dist, 0, as_tensor(whole), as_tensor(sums));
    reducer->all_gather(dist, 0, as_tensor(sums), as_tensor(whole));
    for (int64_t i = 0; i < 4 * shard; ++i)
      rank_check(std::fabs(whole[static_cast<size_t>(i)] - (i < elements ? 256.0f : 0.0f)) < 0.1f,
                 "element " + std::to_string(i));
  });
}

TEST_CASE("compression: NaN and infinity reach every rank, and a skipped step leaves no trace",
          "[parallel]") {
  const GradReducerOptions options = GENERATE(topk(), int8(), between_nodes(topk()));
  const float bad = GENERATE(as<float>{}, kInf, -kInf, kNan);
  run_ranks(4, [&](RankContext& rank) {
    ReducerRank one(rank, options, 2), fresh(rank, options, 2);
    run_steps(one, 0, 3);
    Floats grad = one.grad(3);
    const auto at = static_cast<size_t>(one.range.shard) * 2 + 17;
    if (rank.world.rank() == 1) grad[at] = bad;
    const Floats shard = one.reduce(grad), whole = one.gather(shard);
    const bool owner = rank.world.rank() == 2;
    rank_check(
        owner == std::any_of(shard.begin(), shard.end(), [](float x) { return !std::isfinite(x); }),
        "its owner gets it");
    rank_check(!std::isfinite(whole[at]), "all get it");
    one.end_step(/*finite=*/false);

    rank_check(same_bits(run_steps(one, 4, 6), run_steps(fresh, 4, 6)), "as a new run goes on");
  });
}

TEST_CASE("compression: a NaN leaves no residual that is not finite", "[parallel]") {
  const GradReducerOptions options = GENERATE(topk(), int8());
  run_ranks(2, [&](RankContext& rank) {
    ReducerRank one(rank, options);
    one.gather(one.reduce(Floats(static_cast<size_t>(one.elements()), kNan)));
    for (const StateSlice& slice : one.reducer->saved())
      for (int64_t i = 0; i < slice.end - slice.begin; ++i)
        rank_check(std::isfinite(slice.data.data<float>()[i]), "a finite residual");
  });
}

TEST_CASE("compression: the same bits in every run", "[parallel]") {
  const GradReducerOptions options = GENERATE(topk(), int8(), between_nodes(int8()));
  Floats first;
  for (int run = 0; run < 2; ++run)
    run_ranks(4, [&](RankContext& rank) {
      ReducerRank one(rank, options, 2);
      const Floats whole = run_steps(one, 0, 4);
      if (rank.world.rank() != 0) return;
      if (run == 0) first = whole;
      rank_check(same_bits(whole, first), "the same bits");
    });
}

TEST_CASE("compression: the first steps are dense where that is asked for", "[parallel]") {
  run_ranks(3, [](RankContext& rank) {
    GradReducerOptions options = topk();
    options.compression.dense_steps = 2;
    ReducerRank one(rank, options), without(rank, topk());
    for (uint32_t step = 0; step < 2; ++step) {
      one.reducer->begin_step(step);
      const Floats sums = one.reduce(one.grad(step));
      rank_check(same_bits(sums, one.dense_reduce(one.grad(step))), "dense sums");
      const Floats whole = one.gather(sums);
      const int64_t mine = rank.world.rank() * one.range.shard;
      rank_check(
          same_bits(Floats(whole.begin() + mine, whole.begin() + mine + one.range.shard), sums),
          "whole sums");
    }
    const PhaseTraffic dense = one.reducer->traffic().reduce;
    rank_check(dense.sent == dense.baseline, "as much as dense");
    rank_check(same_bits(run_steps(one, 2, 5), run_steps(without, 2, 5)),
               "then as if these steps had not been");
  });
}

TEST_CASE("compression: bytes on the wire", "[parallel]") {
  const auto [options, most] = GENERATE(table<GradReducerOptions, double>(
      {{topk(), 0.055}, {topk(0.05, CompressedValues::f32), 0.08}, {int8(), 0.26}}));
  const bool two_levels = GENERATE(false, true);
  run_ranks(4, [&, options = options, most = most](RankContext& rank) {
    ReducerRank one(rank, two_levels ? between_nodes(options) : options, 2);
    const int64_t before = rank.world.bytes_sent();
    run_steps(one, 0, 2);
    const GradTraffic traffic = one.reducer->traffic();
    const int64_t shard_bytes = 2 * one.range.shard * 4;  // of two steps
    for (const PhaseTraffic& phase : {traffic.reduce, traffic.gather}) {
      rank_check(phase.baseline == 3 * shard_bytes, "baseline");
      rank_check(phase.baseline_between_nodes == 2 * shard_bytes, "baseline between nodes");
      const int64_t inside = two_levels ? 2 * shard_bytes : 0;
      const auto sent = static_cast<double>(phase.sent - inside);
      rank_check(sent <= most * static_cast<double>((two_levels ? 1 : 3) * shard_bytes), "sent");
      // To the ranks of the other node: one of two, or two of three.
      rank_check(
          phase.sent_between_nodes == (two_levels ? phase.sent - inside : phase.sent / 3 * 2),
          "between nodes");
      rank_check(
          static_cast<double>(phase.sent_between_nodes) <=
              most * static_cast<double>(phase.baseline_between_nodes) / (two_levels ? 2 : 1),
          "less between nodes");
    }
    if (!two_levels)
      rank_check(rank.world.bytes_sent() - before == traffic.reduce.sent + traffic.gather.sent,
                 "what the communicator counts");
  });
}

TEST_CASE("compression: a run that is saved and goes on elsewhere", "[parallel]") {
  const GradReducerOptions options = GENERATE(topk(), int8(), between_nodes(topk()));
  const int per_node = 2;
  Saved saved;
  Floats expected;
  run_ranks(4, [&](RankContext& rank) {
    ReducerRank one(rank, options, per_node);
    run_steps(one, 0, 4);
    saved.save(*one.reducer);
    const Floats whole = run_steps(one, 4, 6);
    if (rank.world.rank() == 0) expected = whole;
  });
  if (options.compression.scope == CompressionScope::inter_node)
    CHECK(saved.kinds() ==
          std::vector<std::string>{"residual.0of2", "residual.1of2", "residual.sum"});
  else
    CHECK(saved.kinds() == std::vector<std::string>{"residual.0of4", "residual.1of4",
                                                    "residual.2of4", "residual.3of4",
                                                    "residual.sum"});

  SECTION("at the same number of ranks: bit for bit") {
    run_ranks(4, [&](RankContext& rank) {
      ReducerRank one(rank, options, per_node);
      saved.load(*one.reducer);
      rank_check(same_bits(run_steps(one, 4, 6), expected), "the same bits");
    });
  }
  SECTION("at another number: the owners get the sum") {
    const int ranks = GENERATE(2, 3, 6);
    const bool gathers = GENERATE(true, false);
    Saved again;
    run_ranks(ranks, [&](RankContext& rank) {
      GradReducerOptions other = options;
      other.compression.scope = CompressionScope::all;
      other.gathers = gathers;
      ReducerRank one(rank, other, per_node);
      saved.load(*one.reducer);
      again.save(*one.reducer);
    });
    const bool same_count = saved.kinds().size() == again.kinds().size() && gathers;
    CAPTURE(ranks, gathers, same_count);
    CHECK(again.kinds().size() == static_cast<size_t>(ranks) + (gathers ? 1 : 0));
    CHECK(distance(again.total(), saved.total()) <= 1e-6 * norm(saved.total()));
  }
  SECTION("residuals of other ranges and kinds are left alone") {
    run_ranks(4, [&](RankContext& rank) {
      ReducerRank one(rank, options, per_node);
      const auto none = [](const Parameter&) { return std::vector<std::string>{"param", "resid"}; };
      rank_check(one.reducer->loaded(none).empty(), "nothing to load");
    });
  }
}

TEST_CASE("compression: several ranges, whose padding is not taken for the next one's elements",
          "[parallel]") {
  Saved saved, again;
  for (Saved* const to : {&saved, &again})
    run_ranks(3, [&](RankContext& rank) {
      ParameterSet parameters;
      declare_some(parameters);
      std::vector<GradRange> ranges;
      for (const ParameterGroup& group : parameters.groups())
        ranges.push_back({group.begin, group.end, (group.end - group.begin) / 3 + 7});
      const NodeSplit nodes = split_by_node(rank.world, "a");
      const auto reducer = make_grad_reducer(topk(), nodes.ranks, parameters, ranges);
      const auto memory = make_reducer_memory(rank.backend, *reducer);
      const DistStream dist{rank.backend.ops(), rank.stream};
      reducer->clear(dist);
      if (to == &again) saved.load(*reducer);
      for (int i = 0; to == &saved && i < static_cast<int>(ranges.size()); ++i) {
        const int64_t shard = ranges[static_cast<size_t>(i)].shard;
        Floats whole = random_floats(3 * shard, static_cast<uint32_t>(i)), sums(whole.size());
        reducer->reduce_scatter(dist, i, as_tensor(whole), as_tensor(sums).rows(0, shard));
        reducer->all_gather(dist, i, as_tensor(sums).rows(0, shard), as_tensor(whole));
      }
      to->save(*reducer);
    });
  CHECK(norm(saved.total()) > 1);
  CHECK(saved.total() == again.total());
}

TEST_CASE("compression: a parameter that two pipeline stages hold", "[parallel]") {
  const GradReducerOptions options = topk();
  // Both stages have both parameters here; only the embedding is tied.
  Saved saved, owner;
  for (const Tie tie : {Tie::owner, Tie::copy})
    run_ranks(3, [&](RankContext& rank) {
      ReducerRank one(rank, options, 0, tie);
      run_steps(one, tie == Tie::owner ? 0 : 10, 12);
      if (tie == Tie::owner) owner.save(*one.reducer);
      saved.save(*one.reducer, tie == Tie::copy ? "embedding" : "");
    });
  CHECK(saved.kinds() == std::vector<std::string>{"residual.0of3", "residual.1of3", "residual.2of3",
                                                  "residual.sum", "tied_residual.0of3",
                                                  "tied_residual.1of3", "tied_residual.2of3"});
  CHECK(distance(saved.total(), owner.total()) > 1e-3 * norm(saved.total()));

  SECTION("each stage gets its own back, and the residual of the sum") {
    Saved again;
    for (const Tie tie : {Tie::owner, Tie::copy})
      run_ranks(3, [&](RankContext& rank) {
        ReducerRank one(rank, options, 0, tie);
        saved.load(*one.reducer);
        again.save(*one.reducer, tie == Tie::copy ? "embedding" : "");
        for (const StateSlice& slice : one.reducer->loaded(
                 [](const Parameter&) { return std::vector<std::string>{"residual.sum"}; }))
          rank_check(!slice.add, "the copy's residual of the sum is the owner's");
      });
    CHECK(again.total() == saved.total());
  }
  SECTION("where sums stay with their owners, the owning stage gets the residual of the sum") {
    GradReducerOptions other = options;
    other.gathers = false;
    Saved again;
    for (const Tie tie : {Tie::owner, Tie::copy})
      run_ranks(3, [&](RankContext& rank) {
        ReducerRank one(rank, other, 0, tie);
        saved.load(*one.reducer);
        again.save(*one.reducer, tie == Tie::copy ? "embedding" : "");
      });
    CHECK(distance(again.total(), saved.total()) <= 1e-6 * norm(saved.total()));
  }
  SECTION("without a copy, the owners get all of it") {
    const bool gathers = GENERATE(true, false);
    const int ranks = GENERATE(2, 3);
    Saved again;
    run_ranks(ranks, [&](RankContext& rank) {
      GradReducerOptions other = options;
      other.gathers = gathers;
      ReducerRank one(rank, other);
      saved.load(*one.reducer);
      again.save(*one.reducer);
    });
    CHECK(distance(again.total(), saved.total()) <= 1e-6 * norm(saved.total()));
  }
}

// A step must not be the first to do it.
TEST_CASE("compression: ranks connect for exchanges before there are any", "[parallel]") {
  struct Prepared : LocalCommunicator {
    using LocalCommunicator::LocalCommunicator;
    void prepare(Connections connections) override { all.push_back(connections); }
    std::vector<Connections> all;
  };
  const auto backend = make_cpu_backend(1);
  Prepared rank(*backend);
  const ParameterSet parameters;
  CompressionConfig config;
  config.method = CompressionMethod::int8;
  const CompressedReducer reducer(config, rank, 0, parameters, {}, false);
  CHECK(rank.all == std::vector{Connections::exchanges});
}

TEST_CASE("compression: residuals are in the plan, to the byte", "[parallel]") {
  run_ranks(4, [](RankContext& rank) {
    ParameterSet parameters;
    declare_some(parameters);
    const NodeSplit nodes = split_by_node(rank.world, "a");
    const GradRange range = whole_range(parameters, 4);
    for (const bool gathers : {false, true}) {
      GradReducerOptions options = int8();
      options.gathers = gathers;
      const auto reducer = make_grad_reducer(options, nodes.ranks, parameters, {range, range});
      std::map<std::string, int64_t> bytes;
      reducer->make_memory([&](const char* owner, MemoryKind, const auto& make) {
        Arena arena(owner);
        make(arena);
        bytes[owner] = arena.peak();
      });
      const auto aligned = [](int64_t n) { return (n + 255) / 256 * 256; };
      const int64_t residuals = 2 * 4 * range.shard * 4, of_sums = 2 * range.shard * 4;
      rank_check(bytes.at("gradient residuals") ==
                     (gathers ? aligned(residuals) + aligned(of_sums) : aligned(residuals)),
                 "residuals: " + std::to_string(bytes.at("gradient residuals")));
      rank_check(bytes.at("gradients on their way") ==
                     2 * aligned(4 * Int8Format{}.payload_bytes(range.shard)),
                 "payloads: " + std::to_string(bytes.at("gradients on their way")));
    }
  });
}

}  // namespace
}  // namespace dstrain::test
