#include "core/engine/batch_slot.h"

#include <vector>

#include "core/backend/cpu_backend.h"
#include "test/support/catch.h"

namespace dstrain::test {
namespace {

// The segments of two sequences of 8 tokens with these documents.
AttentionSegments segments_of(const std::vector<int32_t>& offsets, const AxisPlace& context) {
  const std::unique_ptr<Backend> backend = make_cpu_backend(1);
  const std::unique_ptr<Stream> stream = backend->make_stream();
  BatchSlot slot(2, 8, 1, context);
  std::vector<char> device(1 << 14), host(1 << 14);
  Arena device_arena("device", device.data(), std::ssize(device)),
      host_arena("host", host.data(), std::ssize(host));
  slot.make_device(device_arena);
  slot.make_host(host_arena);
  slot.prepare(*backend);
  const std::vector<int32_t> rows(16, 0);
  slot.load(*backend, *stream,
            {2, 8, rows.data(), rows.data(), rows.data(), offsets.data(), std::ssize(offsets) - 1});
  return slot.batch().segments;
}

}  // namespace

TEST_CASE("batch slot: segments of one length are a batch", "[engine]") {
  const AttentionSegments whole = segments_of({0, 8, 16}, {});
  CHECK(whole.uniform);
  CHECK(whole.max_count == 2);
  CHECK(whole.max_queries == 8);
  CHECK(whole.max_keys == 8);
  CHECK(segments_of({0, 4, 8, 12, 16}, {}).uniform);

  const AttentionSegments packed = segments_of({0, 3, 8, 16}, {});
  CHECK_FALSE(packed.uniform);
  CHECK(packed.max_count == 3);
  CHECK(packed.max_queries == 8);
  // As many documents as equal ones would be, but of other lengths.
  CHECK_FALSE(segments_of({0, 3, 8, 12, 16}, {}).uniform);
  // Two chunks of each sequence, with keys of the whole of it.
  CHECK_FALSE(segments_of({0, 8, 16}, {0, 2}).uniform);
}

}  // namespace dstrain::test
