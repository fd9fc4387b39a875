// Memory, copies, streams, events and error sentences of the CUDA back end; and what it says where
// there is no GPU.
#include "cuda/cuda_backend.h"

#include <algorithm>
#include <cstdint>
#include <future>
#include <string>
#include <vector>

#include "core/backend/ops.h"
#include "core/base/error.h"
#include "cuda/cuda_check.h"
#include "cuda/cuda_device.h"
#include "test/support/catch.h"
#include "test/support/cuda_device.h"

namespace dstrain::test {
namespace {

std::vector<float> read_floats(Stream& stream, const Tensor& x) {
  std::vector<float> host(static_cast<size_t>(x.numel()));
  gpu_backend().copy(stream, host.data(), x.raw(), x.bytes());
  stream.synchronize();
  return host;
}

TEST_CASE("cuda: without a GPU there is a reason, with one there is none", "[cuda]") {
  const int gpus = visible_gpus();
  const std::string reason = why_no_gpu();
  CHECK(reason.empty() == (gpus > 0));
  CHECK(visible_gpus() == gpus);  // asking again is no different
  CHECK(why_no_gpu() == reason);
  if (gpus > 0) return;
  CHECK_THROWS_AS(make_cuda_backend({}), RuntimeFailure);
  CHECK_THROWS_WITH(make_cuda_backend({}),
                    "no GPU can be used: " + reason + "; run.device: cpu trains without");
}

TEST_CASE("cuda: failures of calls are sentences", "[cuda]") {
  CHECK_NOTHROW(check_cuda(cudaSuccess, "nothing"));
  CHECK_THROWS_AS(check_cuda(cudaErrorInvalidValue, "copying memory"), RuntimeFailure);
  CHECK_THROWS_WITH(check_cuda(cudaErrorInvalidValue, "copying memory"),
                    "the GPU failed: copying memory: invalid argument (cudaErrorInvalidValue)");
}

TEST_CASE("cuda: a GPU that does not exist is named", "[cuda]") {
  if (skipped_without_gpu()) return;
  for (const int device : {-1, 1000}) {
    CudaOptions options;
    options.device = device;
    CHECK_THROWS_WITH(make_cuda_backend(options), Catch::Contains("GPU " + std::to_string(device) +
                                                                  " was asked for, and there"));
  }
}

TEST_CASE("cuda: a back end describes its GPU", "[cuda]") {
  if (skipped_without_gpu()) return;
  CHECK_THAT(gpu_backend().describe(), Catch::Contains("compute capability"));
  CHECK_FALSE(gpu_backend().is_cpu());
  CHECK(gpu_stream().native() != nullptr);
  CHECK(gpu_backend().workspace_bytes() > 0);
}

TEST_CASE("cuda: memory of every size is aligned and keeps what is copied to it", "[cuda]") {
  if (skipped_without_gpu()) return;
  Backend& backend = gpu_backend();
  Stream& stream = gpu_stream();
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{257}, (int64_t{4} << 20) + 3}) {
    CAPTURE(bytes);
    const DeviceMemory host(backend, bytes, MemoryKind::host),
        back(backend, bytes, MemoryKind::host);
    const DeviceMemory one(backend, bytes, MemoryKind::device);
    const DeviceMemory two(backend, bytes, MemoryKind::device);
    for (const DeviceMemory* memory : {&host, &back, &one, &two})
      CHECK(reinterpret_cast<uintptr_t>(memory->data()) % 256 == 0);
    auto* const sent = static_cast<uint8_t*>(host.data());
    auto* const received = static_cast<uint8_t*>(back.data());
    for (int64_t i = 0; i < bytes; ++i) sent[i] = static_cast<uint8_t>(i * 7 + i / 251);
    backend.copy(stream, one.data(), host.data(), bytes);
    backend.copy(stream, two.data(), one.data(), bytes);
    backend.copy(stream, back.data(), two.data(), bytes);
    stream.synchronize();
    CHECK(std::vector<uint8_t>(sent, sent + bytes) ==
          std::vector<uint8_t>(received, received + bytes));
  }
}

// As a checkpoint's snapshot is: from the allocation to the wait for its contents on other threads.
TEST_CASE("cuda: a large block of host memory is pinned, whichever thread asks for it", "[cuda]") {
  if (skipped_without_gpu()) return;
  Backend& backend = gpu_backend();
  constexpr int64_t kElements = (int64_t{80} << 20) / 4 + 5;
  const auto allocate = [&backend] {
    return DeviceMemory(backend, 4 * kElements, MemoryKind::host);
  };
  auto coming = std::async(std::launch::async, allocate);
  const DeviceMemory source(backend, 4 * kElements, MemoryKind::device);
  const DeviceMemory host = coming.get();
  cudaPointerAttributes attributes{};
  check_cuda(cudaPointerGetAttributes(&attributes, host.data()), "looking at memory");
  CHECK(attributes.type == cudaMemoryTypeHost);
  const auto stream = backend.make_copy_stream();
  CHECK(static_cast<CudaStream&>(*stream).scratch_bytes() == 0);
  const auto arrived = backend.make_event();
  backend.ops().fill(*stream, Tensor(source.data(), DType::f32, {kElements}), 5);
  backend.copy(*stream, host.data(), source.data(), 4 * kElements);
  arrived->record(*stream);
  std::async(std::launch::async, [&arrived] { arrived->synchronize(); }).get();
  const float* const values = static_cast<const float*>(host.data());
  CHECK(std::all_of(values, values + kElements, [](float value) { return value == 5; }));
  for (int i = 0; i < 3; ++i) {  // given back, it can be taken again
    const DeviceMemory again = allocate();
    CHECK(again.data() != host.data());
  }
}

TEST_CASE("cuda: running out of memory is an error that names the size, and does no harm",
          "[cuda]") {
  if (skipped_without_gpu()) return;
  constexpr int64_t kTooMuch = int64_t{1} << 50;
  CHECK_THROWS_AS(gpu_backend().allocate(kTooMuch, MemoryKind::device), RuntimeFailure);
  CHECK_THROWS_WITH(gpu_backend().allocate(kTooMuch, MemoryKind::device),
                    Catch::Contains("1073741824 MiB of GPU memory could not be had"));
  CHECK_THROWS_AS(gpu_backend().allocate(kTooMuch, MemoryKind::host), RuntimeFailure);
  const DeviceMemory memory(gpu_backend(), 400, MemoryKind::device);
  const Tensor x(memory.data(), DType::f32, {100});
  gpu_backend().ops().fill(gpu_stream(), x, 3);  // its launch does not find the errors above
  CHECK(read_floats(gpu_stream(), x) == std::vector<float>(100, 3));
}

// The first stream is kept busy for long enough that the second would be early without the event.
TEST_CASE("cuda: a stream that waits for an event sees what came before it", "[cuda]") {
  if (skipped_without_gpu()) return;
  Backend& backend = gpu_backend();
  const auto early = backend.make_stream(), late = backend.make_stream();
  const auto event = backend.make_event(), done = backend.make_event();
  constexpr int64_t kElements = int64_t{64} << 20;
  const DeviceMemory memory(backend, 4 * kElements, MemoryKind::device);
  const DeviceMemory result(backend, 4, MemoryKind::host);
  const Tensor x(memory.data(), DType::f32, {kElements});
  for (int value = 1; value <= 50; ++value) {
    for (int i = 0; i < 20; ++i) backend.ops().fill(*early, x, value);
    event->record(*early);
    event->wait_on(*late);
    backend.copy(*late, result.data(), x.rows(kElements - 1, kElements).raw(), 4);
    done->record(*late);
    done->synchronize();
    REQUIRE(*static_cast<float*>(result.data()) == static_cast<float>(value));
    done->wait_on(*early);
  }
  early->synchronize();
}

TEST_CASE("cuda: pieces of scratch lie apart and end where they were promised to", "[cuda]") {
  if (skipped_without_gpu()) return;
  ScratchPieces take(gpu_stream(), 3 * ScratchPieces::kAlignment);
  const auto* const first = take.take<float>(3);
  const auto* const second = take.take<double>(33);
  CHECK(reinterpret_cast<uintptr_t>(first) % ScratchPieces::kAlignment == 0);
  CHECK(reinterpret_cast<const char*>(second) - reinterpret_cast<const char*>(first) ==
        ScratchPieces::kAlignment);
  CHECK_THROWS_WITH(take.take<char>(1), Catch::Contains("smaller than its pieces"));
}

TEST_CASE("cuda: scratch that was not planned is found on the way", "[cuda]") {
  if (skipped_without_gpu()) return;
  const auto stream = gpu_backend().make_stream();
  auto& cuda = static_cast<CudaStream&>(*stream);
  const int64_t planned = cuda.scratch_bytes();
  cuda.scratch(planned);
  CHECK(cuda.scratch_bytes() == planned);
  cuda.scratch(planned + 1);
  CHECK(cuda.scratch_bytes() > planned);
}

}  // namespace
}  // namespace dstrain::test
