// The dispatcher of expert parallelism alone: what arrives where, what comes back, and how many
// bytes cross. "Experts" multiply a token's row by their number + 1 and the choice's weight.
#include "parallel/expert_parallel.h"

#include "test/support/catch.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {
namespace {

constexpr int64_t kTokens = 12, kChoices = 4, kExperts = 8, kHidden = 16;

struct Dispatched {
  int rounds = 0;
  int64_t bytes_out = 0, bytes_back = 0;  // to other ranks
};

// Two on each of two ranks.
int32_t spread(int64_t t, int64_t k) {
  return static_cast<int32_t>(4 * (k % 2) + (t + k / 2) % 4);
}
// All on the first rank of two.
int32_t crowded(int64_t, int64_t k) {
  return static_cast<int32_t>(k);
}

template <class Value>
void fill_with(const Tensor& x, const Value& value) {
  for (int64_t i = 0; i < x.numel(); ++i) x.data<float>()[i] = static_cast<float>(value(i));
}

// What experts do with a round's rows, and the gradients of their weights: 10 per expert.
ExpertResults run_experts(const ExpertRows& rows, int first_expert, int64_t C, Arena& arena) {
  const ExpertResults results{arena.make(DType::f32, {C, kHidden}, "y"),
                              arena.make(DType::f32, {C, 1}, "dweight")};
  const int32_t* const offsets = rows.offsets_E1.data<int32_t>();
  for (int e = 0; e + 1 < rows.offsets_E1.numel(); ++e)
    for (int32_t r = offsets[e]; r < offsets[e + 1]; ++r) {
      const int64_t from = rows.row_index_R.data<int32_t>()[r];
      const auto number = static_cast<float>(first_expert + e + 1);
      for (int64_t d = 0; d < kHidden; ++d)
        results.y_RD.data<float>()[r * kHidden + d] = rows.x_XD.data<float>()[from * kHidden + d] *
                                                      number * rows.row_weight_R.data<float>()[r];
      results.dweight_R1.data<float>()[r] = 10 * number;
    }
  return results;
}

template <class Choose>
Dispatched dispatch_and_check(RankContext& rank, double factor, const Choose& choose) {
  const DeviceMemory memory(rank.backend, 1 << 20, MemoryKind::device);
  Arena arena("test", memory.data(), memory.bytes());
  ExposedTime exposed(rank.backend, false);
  ExpertParallel dispatcher(rank.world, rank.backend, exposed, factor);
  const DistStream dist{rank.backend.ops(), rank.stream, false};
  Routing routing;
  routing.indices_TK = arena.make(DType::i32, {kTokens, kChoices}, "indices");
  routing.weights_TK = arena.make(DType::f32, {kTokens, kChoices}, "weights");
  const auto weight = [&](int64_t slot) { return 1.0 + static_cast<double>(slot % 7) / 8; };
  fill_with(routing.weights_TK, weight);
  for (int64_t slot = 0; slot < kTokens * kChoices; ++slot)
    routing.indices_TK.data<int32_t>()[slot] = choose(slot / kChoices, slot % kChoices);
  const Tensor x_TD = arena.make(DType::f32, {kTokens, kHidden}, "x");
  const Tensor out_TD = arena.make(DType::f32, {kTokens, kHidden}, "out");
  const Tensor dweights_TK = arena.make(DType::f32, {kTokens, kChoices}, "dweights");
  const auto value = [&](int64_t i) { return static_cast<double>(i % 37 + rank.world.rank()); };
  fill_with(x_TD, value);
  fill_with(out_TD, [](int64_t) { return 5; });

  Dispatched result;
  dispatcher.route(dist, kExperts, routing, arena);
  const int64_t local = kExperts / rank.world.size();
  const int64_t C = dispatcher.max_rows(kTokens, kChoices);
  result.rounds = dispatcher.rounds(dist, routing);
  for (int round = 0; round < result.rounds; ++round) {
    const int64_t begin = rank.world.bytes_sent();
    dispatcher.dispatch_start(dist, round, x_TD, routing, arena, arena);
    const ExpertRows rows = dispatcher.dispatch_finish(dist, x_TD, routing);
    const int64_t sent = rank.world.bytes_sent();
    rank_check(rows.offsets_E1.data<int32_t>()[local] <= C, "the round fits");
    const ExpertResults results =
        run_experts(rows, rank.world.rank() * static_cast<int>(local), C, arena);
    dispatcher.return_start(dist, rows, results, routing, arena);
    dispatcher.return_finish(dist, rows, results, routing, {out_TD, out_TD, dweights_TK});
    result.bytes_out += sent - begin;
    result.bytes_back += rank.world.bytes_sent() - sent;
  }
  for (int64_t i = 0; i < kTokens * kHidden; ++i) {
    double want = 5;
    for (int64_t k = 0; k < kChoices; ++k)
      want += value(i) * (choose(i / kHidden, k) + 1) * weight(i / kHidden * kChoices + k);
    rank_check(out_TD.data<float>()[i] == static_cast<float>(want), "the sum over experts");
  }
  for (int64_t slot = 0; slot < kTokens * kChoices; ++slot)
    rank_check(dweights_TK.data<float>()[slot] ==
                   static_cast<float>(10 * (choose(slot / kChoices, slot % kChoices) + 1)),
               "the gradient of a choice's weight");
  return result;
}

TEST_CASE("expert parallelism: a token crosses once to a rank with several of its experts") {
  run_ranks(2, [](RankContext& rank) {
    const Dispatched sent = dispatch_and_check(rank, 1.5, spread);
    constexpr int64_t kRow = kHidden * 4, kSlots = kChoices * 4;
    rank_check(sent.rounds == 1, "one round");
    rank_check(sent.bytes_out == kTokens * (kRow + 2 * kSlots), "rows, experts and weights");
    rank_check(sent.bytes_back == kTokens * (kRow + kSlots), "sums and gradients of weights");
  });
}

TEST_CASE("expert parallelism: crowded experts take further rounds, and nothing is lost") {
  run_ranks(2, [](RankContext& rank) {
    rank_check(dispatch_and_check(rank, 1.0, crowded).rounds == 2, "as many as balanced loads");
    rank_check(dispatch_and_check(rank, 1.3, crowded).rounds == 2, "a part of a round");
  });
}

TEST_CASE("expert parallelism: one rank may be sent nothing") {
  run_ranks(2, [](RankContext& rank) {
    const Dispatched sent = dispatch_and_check(rank, 2.0, crowded);
    rank_check(sent.rounds == 1, "one round");
    rank_check((sent.bytes_out == 0) == (rank.world.rank() == 0), "only the first rank has work");
  });
}

}  // namespace
}  // namespace dstrain::test
