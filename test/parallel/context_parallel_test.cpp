// The exchange of context parallelism alone: whose rows come in which turn, of them those that are
// seen, and that their gradients find the way back, whether transfers happen when they are queued
// or as late as they may.
#include "parallel/context_parallel.h"

#include <vector>

#include "test/support/catch.h"
#include "test/support/host_tensor.h"
#include "test/support/late_backend.h"
#include "test/support/rank_threads.h"

namespace dstrain::test {
namespace {

constexpr int64_t kChunk = 3, kKeyWidth = 5, kValueWidth = 3;

// Runs as late as the stream that it is called on.
class LateExchanges : public LocalCommunicator {
 public:
  LateExchanges(Communicator& inner, Backend& backend, Stream& stream)
      : LocalCommunicator(backend), inner_(inner), stream_(stream) {}
  int rank() const override { return inner_.rank(); }
  int size() const override { return inner_.size(); }
  void all_to_all(Stream& stream, const Tensor& send, std::span<const int64_t> send_offsets,
                  const Tensor& recv, std::span<const int64_t> recv_offsets) override {
    run_on(stream, [=, this, out = std::vector(send_offsets.begin(), send_offsets.end()),
                    in = std::vector(recv_offsets.begin(), recv_offsets.end())] {
      inner_.all_to_all(stream_, send, out, recv, in);
    });
  }

 private:
  Communicator& inner_;
  Stream& stream_;  // where it really runs
};

// Small numbers, whose sums are exact.
float row_value(int rank, int64_t i) {
  return static_cast<float>(100 * rank + i);
}
float gradient_value(int from, int to, int64_t i) {
  return static_cast<float>(1000 * (from + 1) + 100 * to + i);
}

template <class Value>
void set(const Tensor& x, const Value& value) {
  for (int64_t i = 0; i < x.numel(); ++i) x.data<float>()[i] = value(i);
}
template <class Value>
bool all_are(const Tensor& x, const Value& value) {
  for (int64_t i = 0; i < x.numel(); ++i)
    if (x.data<float>()[i] != value(i)) return false;
  return true;
}

KeyRows make_rows(int64_t sequences, Arena& arena) {
  const int64_t rows = sequences * 2 * kChunk;
  return {arena.make(DType::f32, {rows, kKeyWidth}, "keys"),
          arena.make(DType::f32, {rows, 1, kValueWidth}, "values")};
}

// Of the rows of `other` those that `rank` sees: which element of other's tensor is element i.
int64_t element_of(const Tensor& seen, int rank, int other, int64_t i) {
  const int64_t chunk = kChunk * seen.row_numel();
  return other > rank ? i : i / chunk * 2 * chunk + i % chunk;
}
bool is_seen(const Tensor& own, int rank, int other, int64_t i) {
  return other > rank || i / (kChunk * own.row_numel()) % 2 == 0;
}

void check_pass(RankContext& rank, Backend& backend, Communicator& ranks, int64_t sequences) {
  const DeviceMemory memory(rank.backend, 1 << 16, MemoryKind::device);
  Arena arena("test", memory.data(), memory.bytes());
  ExposedTime exposed(backend, false);
  ContextParallel context(ranks, backend, exposed);
  const DistStream dist{backend.ops(), rank.stream, false};
  const int me = ranks.rank(), size = ranks.size();
  const KeyRows rows = make_rows(sequences, arena), own = make_rows(sequences, arena);
  for (const auto returns : {KvExchange::Returns::gradients, KvExchange::Returns::nothing,
                             KvExchange::Returns::gradients}) {
    ArenaScope scope(arena);
    const bool gives = returns == KvExchange::Returns::gradients;
    for (const Tensor& x : rows) set(x, [&](int64_t i) { return row_value(me, i); });
    for (const Tensor& x : own) set(x, [](int64_t) { return 0.5f; });
    context.pass_start(dist, rows, sequences, returns, arena);
    for (int i = 0; i < context.peers(); ++i) {
      const KvExchange::Peer peer = context.next(dist);
      const int other = peer_of({me, size}, i);
      for (const Tensor& x : peer.rows) {
        rank_check(x.size(0) == sequences * kChunk * (other > me ? 2 : 1), "as many as are seen");
        rank_check(
            all_are(x, [&](int64_t j) { return row_value(other, element_of(x, me, other, j)); }),
            "rows of a peer");
      }
      rank_check(peer.gradients[0].defined() == gives, "gradients where they are returned");
      if (!gives) continue;
      for (const Tensor& x : peer.gradients)
        set(x, [&](int64_t j) { return gradient_value(me, other, element_of(x, me, other, j)); });
      context.give(dist);
    }
    context.pass_finish(dist, gives ? own : KeyRows{});
    for (const Tensor& x : own)
      rank_check(all_are(x,
                         [&](int64_t j) {
                           float sum = 0.5f;
                           for (int other = 0; gives && other < size; ++other)
                             if (other != me && is_seen(x, other, me, j))
                               sum += gradient_value(other, me, j);
                           return sum;
                         }),
                 "gradients of own rows");
  }
}

// Sums that a CPU back end does not have: of bf16, and of bf16 and f32, rounded once.
class Bf16Sums : public NullOps {
 public:
  explicit Bf16Sums(Ops& ops) : ops_(ops) {}
  void convert(Stream& stream, const Tensor& source, const Tensor& destination) override {
    ops_.convert(stream, source, destination);
  }
  void add(Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) override {
    const std::vector<int64_t> shape = {out.size(0), out.row_numel()};
    const HostTensor left(DType::f32, shape), right(DType::f32, shape);
    convert(stream, a, left);
    convert(stream, b, right);
    ops_.add(stream, left, right, left);
    convert(stream, left, out);
  }

 private:
  Ops& ops_;
};

}  // namespace

TEST_CASE("context parallel: rows of all peers, and sums of their gradients", "[ranks]") {
  const int ranks = GENERATE(2, 3, 4, 5);
  const int64_t sequences = GENERATE(1, 3);
  CAPTURE(ranks, sequences);
  run_ranks(ranks, [&](RankContext& rank) {
    check_pass(rank, rank.backend, rank.world, sequences);
    // Lower ranks get both chunks of a sequence and return gradients of the first, higher ones the
    // other way round. Rows in three passes, gradients in two.
    const int64_t lower = rank.world.rank(), higher = ranks - 1 - lower;
    const int64_t chunks = 3 * (2 * lower + higher) + 2 * (lower + 2 * higher);
    rank_check(
        rank.world.bytes_sent() == chunks * sequences * kChunk * (kKeyWidth + kValueWidth) * 4,
        "each row that a peer sees goes to it once");
  });
}

// A bf16 of 256 does not change if 1 is added to it.
TEST_CASE("context parallel: gradients in bf16 are rounded when all are there", "[ranks]") {
  const int ranks = GENERATE(2, 3, 5);
  CAPTURE(ranks);
  run_ranks(ranks, [&](RankContext& rank) {
    const DeviceMemory memory(rank.backend, 1 << 16, MemoryKind::device);
    Arena arena("test", memory.data(), memory.bytes());
    ExposedTime exposed(rank.backend, false);
    ContextParallel context(rank.world, rank.backend, exposed);
    Bf16Sums ops(rank.backend.ops());
    const DistStream dist{ops, rank.stream, false};
    const KeyRows rows = {arena.make(DType::bf16, {2 * kChunk, kKeyWidth}, "keys")};
    const Tensor own = arena.like(rows[0], "gradients");
    rank.backend.ops().fill(rank.stream, rows[0], 0);
    rank.backend.ops().fill(rank.stream, own, 1);
    context.pass_start(dist, rows, 1, KvExchange::Returns::gradients, arena);
    for (int i = 0; i < context.peers(); ++i) {
      const KvExchange::Peer peer = context.next(dist);
      rank.backend.ops().fill(rank.stream, peer.gradients[0], i == 0 ? 256 : 1);
      context.give(dist);
    }
    context.pass_finish(dist, {own});
    // The first chunk is seen by all, the second by lower ranks: the next lower one gives 256.
    const int lower = rank.world.rank();
    const auto exact = [&](int64_t i) {
      if (i < kChunk * kKeyWidth) return 256.0 + context.peers();
      return lower == 0 ? 1.0 : 256.0 + lower;
    };
    const HostTensor got(DType::f32, {2 * kChunk, kKeyWidth});
    ops.convert(rank.stream, own, got);
    rank_check(all_are(got.view(),
                       [&](int64_t i) {
                         return static_cast<float>(HostTensor(DType::bf16, {1}, {exact(i)}).get(0));
                       }),
               "256 and a 1 for each other rank, rounded once");
  });
}

TEST_CASE("context parallel: computing waits for transfers that come late", "[ranks]") {
  const int ranks = GENERATE(2, 4);
  CAPTURE(ranks);
  run_ranks(ranks, [&](RankContext& rank) {
    LateBackend late(rank.backend, rank.stream);
    LateExchanges exchanges(rank.world, late, rank.stream);
    check_pass(rank, late, exchanges, 2);
  });
}

}  // namespace dstrain::test
