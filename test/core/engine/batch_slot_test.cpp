#include "core/engine/batch_slot.h"

#include <algorithm>
#include <memory>
#include <numeric>
#include <set>
#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"

namespace dstrain::test {
namespace {

// The batch of two sequences of 8 tokens with these documents, on the host.
struct Loaded {
  std::unique_ptr<Backend> backend = make_cpu_backend(1);
  std::unique_ptr<Stream> stream = backend->make_stream();
  BatchSlot slot;
  std::vector<char> device = std::vector<char>(1 << 14), host = std::vector<char>(1 << 14);

  Loaded(const std::vector<int32_t>& offsets, const AxisPlace& context) : slot(2, 8, 1, context) {
    Arena device_arena("device", device.data(), std::ssize(device)),
        host_arena("host", host.data(), std::ssize(host));
    slot.make_device(device_arena);
    slot.make_host(host_arena);
    slot.prepare(*backend);
    std::vector<int32_t> rows(16), targets(16, 0);
    std::iota(rows.begin(), rows.end(), 0);
    slot.load(
        *backend, *stream,
        {2, 8, rows.data(), rows.data(), targets.data(), offsets.data(), std::ssize(offsets) - 1});
  }
  const AttentionSegments& segments() const { return slot.batch().segments; }
  const PeerTokens& peer(size_t i) const { return slot.batch().peers.at(i); }
};

using Table = std::vector<std::vector<int32_t>>;

Table table_of(const AttentionSegments& segments) {
  Table table;
  for (int64_t n = 0; n < *segments.count_1.data<int32_t>(); ++n) {
    const int32_t* const row = segments.table_N4.data<int32_t>() + 4 * n;
    table.emplace_back(row, row + 4);
  }
  return table;
}

// By the definition: which tokens of the whole sequences each of this rank's queries sees, from the
// segments over its own rows and those of its peers.
std::vector<std::set<int32_t>> seen_by_queries(const Loaded& loaded) {
  const Batch& batch = loaded.slot.batch();
  std::vector<std::set<int32_t>> seen(static_cast<size_t>(batch.num_tokens()));
  const auto look = [&](const AttentionSegments& segments, const Tensor& tokens_T) {
    for (const std::vector<int32_t>& row : table_of(segments))
      for (int32_t q = 0; q < row[1]; ++q)
        for (int32_t k = 0; k < row[3]; ++k)
          if (!segments.causal || k <= row[3] - row[1] + q)
            CHECK(seen[static_cast<size_t>(row[0] + q)]
                      .insert(tokens_T.data<int32_t>()[row[2] + k])
                      .second);
  };
  look(batch.segments, batch.tokens_T);
  for (const PeerTokens& peer : batch.peers) look(peer.segments, peer.positions_T);
  return seen;
}

}  // namespace

TEST_CASE("batch slot: segments of one length are a batch", "[engine]") {
  const Loaded whole({0, 8, 16}, {});
  CHECK(whole.segments().uniform);
  CHECK(whole.segments().max_count == 2);
  CHECK(whole.segments().max_queries == 8);
  CHECK(whole.segments().max_keys == 8);
  CHECK(Loaded({0, 4, 8, 12, 16}, {}).segments().uniform);

  const Loaded packed({0, 3, 8, 16}, {});
  CHECK_FALSE(packed.segments().uniform);
  CHECK(packed.segments().max_count == 3);
  CHECK(packed.segments().max_queries == 8);
  // As many documents as equal ones would be, but of other lengths.
  CHECK_FALSE(Loaded({0, 3, 8, 12, 16}, {}).segments().uniform);
}

TEST_CASE("batch slot: a rank's own rows, and of its peers what documents reach", "[engine]") {
  // Chunks 0 and 3 of each sequence are here, 1 and 2 on the other rank.
  const Loaded first({0, 8, 16}, {0, 2});
  CHECK(first.segments().uniform);
  CHECK(table_of(first.segments()) == Table{{0, 4, 0, 4}, {4, 4, 4, 4}});
  CHECK(table_of(first.peer(0).segments) == Table{{2, 2, 0, 4}, {6, 2, 4, 4}});
  CHECK(first.peer(0).segments.max_queries == 2);
  CHECK(first.peer(0).segments.max_keys == 4);
  CHECK(first.peer(0).segments.max_count == 2);
  CHECK_FALSE(first.peer(0).segments.causal);

  const Loaded second({0, 8, 16}, {1, 2});
  CHECK(table_of(second.segments()) == Table{{0, 4, 0, 4}, {4, 4, 4, 4}});
  // Of the lower rank there is the first chunk only.
  CHECK(table_of(second.peer(0).segments) == Table{{0, 4, 0, 2}, {4, 4, 2, 2}});
  CHECK(second.peer(0).positions_T.size(0) == 4);

  // No document of the first sequence is on both sides.
  const Loaded apart({0, 2, 6, 8, 16}, {0, 2});
  CHECK(table_of(apart.segments()) == Table{{0, 2, 0, 2}, {2, 2, 2, 2}, {4, 4, 4, 4}});
  CHECK(table_of(apart.peer(0).segments) == Table{{6, 2, 4, 4}});
  const Loaded none({0, 2, 6, 8, 10, 14, 16}, {0, 2});
  CHECK(none.peer(0).segments.max_queries == 0);
  CHECK(table_of(none.peer(0).segments).empty());
}

TEST_CASE("batch slot: every query sees its document up to itself, once", "[engine]") {
  const int ranks = GENERATE(1, 2, 4);
  const auto offsets = GENERATE(
      std::vector<int32_t>{0, 8, 16}, std::vector<int32_t>{0, 1, 8, 11, 16},
      std::vector<int32_t>{0, 3, 5, 8, 9, 15, 16}, std::vector<int32_t>{0, 7, 8, 10, 14, 16},
      std::vector<int32_t>{0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16});
  CAPTURE(ranks, offsets);
  for (int rank = 0; rank < ranks; ++rank) {
    const Loaded loaded(offsets, {rank, ranks});
    const std::vector<std::set<int32_t>> seen = seen_by_queries(loaded);
    for (size_t row = 0; row < seen.size(); ++row) {
      const int32_t token = loaded.slot.batch().tokens_T.data<int32_t>()[row];
      std::set<int32_t> want;
      for (int32_t t = *(std::ranges::upper_bound(offsets, token) - 1); t <= token; ++t)
        want.insert(t);
      CHECK(seen[row] == want);
    }
  }
}

}  // namespace dstrain::test
