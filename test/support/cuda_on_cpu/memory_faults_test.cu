// Faults with memory that running kernels on the CPU must notice: what nobody has written is NaN,
// and with AddressSanitizer the process ends at an access outside of what a kernel was given. Each
// of those runs in a process of its own.
#include <sys/wait.h>
#include <unistd.h>

#include <functional>
#include <string>
#include <vector>

#include "cuda/kernel.cuh"
#include "test/support/catch.h"
#include "test/support/cuda_device.h"
#include "test/support/device_tensors.h"

namespace dstrain::test {
namespace {

__global__ void copy_kernel(const float* from, float* to, int first, int count) {
  for (int i = first; i < first + count; ++i) to[i] = from[i];
}
__global__ void copy_vector_kernel(const float* from, float* to) {
  Vec<float>::load(from).store(to);
}
template <int kWritten>
__global__ void write_shared_kernel(int first) {
  __shared__ float values[kWritten];
  for (int i = 0; i < kWritten; ++i) values[first + i] = 1;
}
__global__ void write_dynamic_kernel(int count) {
  extern __shared__ float values[];
  for (int i = 0; i < count; ++i) values[i] = 1;
}

cudaStream_t stream() {
  return cuda(gpu_stream());
}
void finish() {
  check_launch("a planted fault");
  gpu_stream().synchronize();
}

class DeviceFloats {
 public:
  explicit DeviceFloats(int64_t count) : memory_(gpu_backend(), 4 * count, MemoryKind::device) {}
  float* data() const { return static_cast<float*>(memory_.data()); }
  float read(int64_t i) const {
    float value = 0;
    gpu_backend().copy(gpu_stream(), &value, data() + i, sizeof value);
    gpu_stream().synchronize();
    return value;
  }

 private:
  DeviceMemory memory_;
};

bool is_nan(float value) {
  return value != value;
}

}  // namespace

TEST_CASE("cuda on cpu: memory and scratch that nobody has written are NaN", "[cuda_on_cpu]") {
  const DeviceFloats fresh(5), result(5);
  CHECK(is_nan(fresh.read(4)));
  ScratchPieces pieces(gpu_stream(), 512);
  for (float* const piece : {pieces.take<float>(3), pieces.take<float>(3)}) {
    copy_kernel<<<1, 1, 0, stream()>>>(piece, result.data(), 0, 3);
    finish();
    CHECK(is_nan(result.read(0)));
    CHECK(is_nan(result.read(2)));
  }
}

TEST_CASE("cuda on cpu: a launch with more shared memory than its kernel asked for is refused",
          "[cuda_on_cpu]") {
  constexpr int kBytes = (48 << 10) + 4;
  write_dynamic_kernel<<<1, 1, kBytes, stream()>>>(1);
  CHECK(cudaGetLastError() == cudaErrorInvalidConfiguration);
  CHECK(cudaFuncSetAttribute(write_dynamic_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             kBytes) == cudaSuccess);
  write_dynamic_kernel<<<1, 1, kBytes, stream()>>>(kBytes / 4);
  finish();
}

#ifdef __SANITIZE_ADDRESS__
namespace {

// What a process that does this writes to standard error before it ends, or "it ended well".
std::string death_of(const std::function<void()>& fault) {
  int ends[2];
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    fault();
    _exit(0);
  }
  close(ends[1]);
  std::string text;
  char part[4096];
  for (ssize_t got; (got = read(ends[0], part, sizeof part)) > 0;)
    text.append(part, static_cast<size_t>(got));
  close(ends[0]);
  int status = 0;
  REQUIRE(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) && WEXITSTATUS(status) == 0 ? "it ended well" : text;
}

}  // namespace

TEST_CASE("cuda on cpu: an access outside of device memory ends the process", "[cuda_on_cpu]") {
  const DeviceFloats from(7), to(7), wide(8);
  const auto copy = [&](int first, int count) {
    return death_of([&, first, count] {
      copy_kernel<<<1, 1, 0, stream()>>>(from.data(), to.data(), first, count);
      finish();
    });
  };
  CHECK(copy(0, 7) == "it ended well");
  CHECK_THAT(copy(0, 8), Catch::Contains("heap-buffer-overflow") && Catch::Contains("READ"));
  CHECK_THAT(copy(-1, 1), Catch::Contains("heap-buffer-overflow"));
  CHECK_THAT(death_of([&] {
               copy_kernel<<<1, 1, 0, stream()>>>(wide.data(), to.data(), 7, 1);
               finish();
             }),
             Catch::Contains("heap-buffer-overflow") && Catch::Contains("WRITE of size 4"));
  CHECK_THAT(death_of([&] {
               copy_vector_kernel<<<1, 1, 0, stream()>>>(from.data() + 4, to.data());
               finish();
             }),
             Catch::Contains("heap-buffer-overflow") && Catch::Contains("READ of size 16"));
  CHECK_THAT(death_of([&] {
               copy_vector_kernel<<<1, 1, 0, stream()>>>(from.data() + 1, to.data());
               finish();
             }),
             Catch::Contains("misaligned address"));
}

TEST_CASE("cuda on cpu: an access between the tensors of a test ends the process",
          "[cuda_on_cpu]") {
  std::vector<HostTensor> tensors(2, HostTensor(DType::f32, {65}));
  DeviceTensors memory(gpu_backend(), gpu_stream(), tensors);
  const auto* const from = pointer<const float>(memory.views()[0]);
  auto* const to = pointer<float>(memory.views()[1]);
  CHECK_THAT(death_of([&] {
               copy_kernel<<<1, 1, 0, stream()>>>(from, to, 65, 1);
               finish();
             }),
             Catch::Contains("use-after-poison") && Catch::Contains("READ"));
  memory.read_back(tensors);
}

TEST_CASE(
    "cuda on cpu: an access outside of a piece of scratch, or after its operation, ends the "
    "process",
    "[cuda_on_cpu]") {
  const DeviceFloats floats(8);
  const auto write = [&](int first, bool late) {
    return death_of([&, first, late] {
      float* const piece = ScratchPieces(gpu_stream(), 512).take<float>(3);
      if (late) ScratchPieces(gpu_stream(), 512).take<float>(3);
      copy_kernel<<<1, 1, 0, stream()>>>(floats.data(), piece, first, 1);
      finish();
    });
  };
  CHECK(write(2, false) == "it ended well");
  CHECK_THAT(write(3, false), Catch::Contains("heap-buffer-overflow"));
  CHECK_THAT(write(2, true), Catch::Contains("heap-use-after-free"));
}

TEST_CASE("cuda on cpu: an access outside of shared memory ends the process", "[cuda_on_cpu]") {
  const auto write = [](int first) {
    return death_of([first] {
      write_shared_kernel<9><<<1, 1, 0, stream()>>>(first);
      finish();
    });
  };
  CHECK(write(0) == "it ended well");
  CHECK_THAT(write(1),
             Catch::Contains("index 9 out of bounds") || Catch::Contains("global-buffer-overflow"));
  const auto write_dynamic = [](int count) {
    return death_of([count] {
      write_dynamic_kernel<<<1, 1, 20, stream()>>>(count);
      finish();
    });
  };
  CHECK(write_dynamic(5) == "it ended well");
  CHECK_THAT(write_dynamic(6), Catch::Contains("heap-buffer-overflow"));
}
#endif

}  // namespace dstrain::test
