// Host memory that is registered with the driver in pieces, and copies that go over their borders.
#include "cuda/pinned_memory.h"

#include <cstring>
#include <limits>

#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/cuda_on_cpu/runtime.h"

namespace dstrain::test {
namespace {

using cuda_on_cpu::registered_pieces;
constexpr int64_t kMiB = int64_t{1} << 20;

}  // namespace

TEST_CASE("pinned memory: large blocks are registered in pieces", "[cuda_on_cpu]") {
  PinnedMemory pinned(48 * kMiB);
  void* memory = nullptr;
  const int64_t bytes = 100 * kMiB + 5;
  REQUIRE(pinned.allocate(bytes, &memory) == cudaSuccess);
  CHECK(registered_pieces(memory) == std::vector<size_t>{48 * kMiB, 48 * kMiB, 4 * kMiB + 5});
  auto* const block = static_cast<char*>(memory);
  CHECK(block[0] == 0);
  CHECK(block[bytes - 1] == 0);

  CHECK(pinned.copyable_bytes(block, bytes) == 48 * kMiB);
  CHECK(pinned.copyable_bytes(block + 48 * kMiB - 1, 7) == 1);
  CHECK(pinned.copyable_bytes(block + 48 * kMiB, 7) == 7);
  CHECK(pinned.copyable_bytes(block + 96 * kMiB, 4 * kMiB + 5) == 4 * kMiB + 5);
  CHECK(pinned.copyable_bytes(block + bytes, bytes) == bytes);  // other memory
  CHECK(pinned.copyable_bytes(block - 1, 1) == 1);

  pinned.free(memory, bytes);
  CHECK(registered_pieces(memory).empty());
  CHECK(pinned.copyable_bytes(block, bytes) == bytes);
}

TEST_CASE("pinned memory: where a piece is refused, none stays and the driver's own serves",
          "[cuda_on_cpu]") {
  PinnedMemory pinned(48 * kMiB);
  void* memory = nullptr;
  cuda_on_cpu::refuse_registrations_after(1);
  REQUIRE(pinned.allocate(100 * kMiB, &memory) == cudaSuccess);
  cuda_on_cpu::refuse_registrations_after(std::numeric_limits<int64_t>::max());
  CHECK(cuda_on_cpu::registered_count() == 0);
  CHECK(pinned.copyable_bytes(memory, 100 * kMiB) == 100 * kMiB);
  pinned.free(memory, 100 * kMiB);
}

TEST_CASE("pinned memory: a copy from piece to piece is made in parts", "[cuda_on_cpu]") {
  Backend& gpu = gpu_backend();
  const DeviceMemory snapshot(gpu, 1030 * kMiB, MemoryKind::host);
  REQUIRE(registered_pieces(snapshot.data()).size() == 2);
  auto* const border = static_cast<char*>(snapshot.data()) + 1024 * kMiB;
  const std::string text = "what lies before the border, and what lies behind it";
  const auto size = static_cast<int64_t>(text.size());
  const DeviceMemory state(gpu, size, MemoryKind::device);
  const auto stream = gpu.make_copy_stream();
  std::string back(text.size(), '\0');
  gpu.copy(*stream, state.data(), text.data(), size);
  gpu.copy(*stream, border - 20, state.data(), size);  // to the host
  gpu.copy(*stream, state.data(), border - 20, size);  // and from it
  gpu.copy(*stream, back.data(), state.data(), size);
  stream->synchronize();
  CHECK(std::string(border - 20, text.size()) == text);
  CHECK(back == text);
}

}  // namespace dstrain::test
