#include "cuda/cuda_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "cuda/cuda_check.h"
#include "cuda/cuda_clock.h"
#include "cuda/cuda_device.h"
#include "cuda/cuda_ops.h"
#include "cuda/pinned_memory.h"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

// What every stream has from the start: the work space that cuBLASLt asks for on Hopper, and the
// small scratch of operations that no dry run sees (sums over gradients, compression).
constexpr int64_t kFirstScratch = int64_t{64} << 20;
constexpr int kLeastCapability = 80;

class CudaEvent : public Event {
 public:
  CudaEvent() {
    check_cuda(cudaGetDevice(&device_), "finding the GPU");
    check_cuda(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming), "creating an event");
  }
  ~CudaEvent() override { cudaEventDestroy(event_); }
  CudaEvent(const CudaEvent&) = delete;
  CudaEvent& operator=(const CudaEvent&) = delete;

  void record(Stream& stream) override {
    check_cuda(cudaEventRecord(event_, cuda(stream)), "recording an event");
  }
  void wait_on(Stream& stream) override {
    check_cuda(cudaStreamWaitEvent(cuda(stream), event_, 0), "making a stream wait");
  }
  // A thread that has not used this GPU would otherwise open the first one.
  void synchronize() override {
    check_cuda(cudaSetDevice(device_), "choosing the GPU");
    check_cuda(cudaEventSynchronize(event_), "waiting for the GPU");
  }

 private:
  int device_ = 0;
  cudaEvent_t event_ = nullptr;
};

// Of streams: it goes first.
int greatest_priority() {
  int least = 0, greatest = 0;
  check_cuda(cudaDeviceGetStreamPriorityRange(&least, &greatest), "reading stream priorities");
  return greatest;
}

class CudaBackend : public Backend {
 public:
  CudaBackend(const CudaDevice& device, std::string cache_folder)
      : device_(device), cache_folder_(std::move(cache_folder)), ops_(device), planning_(ops_) {}

  std::string describe() const override {
    return fmt::format("{}, {} GB, compute capability {}.{}{}", device_.name,
                       device_.memory_bytes / 1000000000, device_.compute_capability / 10,
                       device_.compute_capability % 10,
                       device_.deterministic ? ", deterministic" : "");
  }
  bool is_cpu() const override { return false; }

  void* allocate(int64_t bytes, MemoryKind kind) override {
    void* memory = nullptr;
    const auto size = static_cast<size_t>(bytes);
    if (kind == MemoryKind::host) check_cuda(cudaSetDevice(device_.index), "choosing the GPU");
    const cudaError_t error =
        kind == MemoryKind::device ? cudaMalloc(&memory, size) : pinned_.allocate(bytes, &memory);
    if (error == cudaSuccess) return memory;
    cudaGetLastError();  // it is told below, and must not be found by the next launch
    if (error != cudaErrorMemoryAllocation) throw_cuda(error, "allocating memory");
    size_t free = 0, total = 0;
    cudaMemGetInfo(&free, &total);
    if (kind == MemoryKind::host)
      throw RuntimeFailure(
          fmt::format("{} MiB of pinned host memory could not be had", bytes >> 20));
    throw RuntimeFailure(
        fmt::format("{} MiB of GPU memory could not be had: {} has {} MiB, of which {} MiB are "
                    "free; use a smaller "
                    "train.micro_batch, train.recompute: selective or full, or more ranks",
                    bytes >> 20, device_.name, total >> 20, free >> 20));
  }
  void deallocate(void* memory, int64_t bytes, MemoryKind kind) noexcept override {
    if (kind == MemoryKind::device)
      cudaFree(memory);
    else
      pinned_.free(memory, bytes);
  }

  int64_t workspace_bytes() const override {
    return std::max(kFirstScratch, planning_.scratch_bytes());
  }
  Ops& planning_ops() override { return planning_; }
  void prepare(Stream& stream) override {
    cuda_stream(stream).reserve(workspace_bytes());
    ops_.tune(stream, cache_folder_);
  }

  std::unique_ptr<Stream> make_stream() override {
    return std::make_unique<CudaStream>(kFirstScratch);
  }
  std::unique_ptr<Stream> make_urgent_stream() override {
    return std::make_unique<CudaStream>(kFirstScratch, greatest_priority());
  }
  std::unique_ptr<Stream> make_copy_stream() override {
    return std::make_unique<CudaStream>(0, greatest_priority());
  }
  std::unique_ptr<Event> make_event() override { return std::make_unique<CudaEvent>(); }
  std::unique_ptr<OpClock> make_clock() override { return make_cuda_clock(); }

  void copy(Stream& stream, void* destination, const void* source, int64_t bytes) override {
    DSTRAIN_CHECK(bytes >= 0, "a copy of a negative size");
    auto* to = static_cast<char*>(destination);
    const auto* from = static_cast<const char*>(source);
    for (int64_t part; bytes > 0; to += part, from += part, bytes -= part) {
      part = pinned_.copyable_bytes(from, pinned_.copyable_bytes(to, bytes));
      check_cuda(
          cudaMemcpyAsync(to, from, static_cast<size_t>(part), cudaMemcpyDefault, cuda(stream)),
          "copying memory");
    }
  }

  Ops& ops() override { return ops_; }

 private:
  CudaDevice device_;
  std::string cache_folder_;
  PinnedMemory pinned_;
  CudaOps ops_;
  PlanningOps planning_;
};

CudaDevice open_device(const CudaOptions& options) {
  const std::string reason = why_no_gpu();
  if (!reason.empty())
    throw RuntimeFailure("no GPU can be used: " + reason + "; run.device: cpu trains without");
  const int count = visible_gpus();
  if (options.device < 0 || options.device >= count)
    throw RuntimeFailure(
        fmt::format("GPU {} was asked for, and there are {}", options.device, count));
  cudaDeviceProp properties;
  check_cuda(cudaGetDeviceProperties(&properties, options.device), "reading the GPU's properties");
  CudaDevice device;
  device.index = options.device;
  device.compute_capability = 10 * properties.major + properties.minor;
  device.num_sms = properties.multiProcessorCount;
  device.memory_bytes = static_cast<int64_t>(properties.totalGlobalMem);
  device.name = properties.name;
  device.deterministic = options.deterministic;
  device.tf32 = options.tf32;
  if (device.compute_capability < kLeastCapability)
    throw RuntimeFailure(
        fmt::format("{} has compute capability {}.{}; this program needs 8.0 (A100) or later. "
                    "run.device: cpu trains without it",
                    device.name, properties.major, properties.minor));
  check_cuda(cudaSetDevice(options.device), "choosing the GPU");
  return device;
}

}  // namespace

void throw_cuda(cudaError_t error, const char* what) {
  throw RuntimeFailure(fmt::format("the GPU failed: {}: {} ({})", what, cudaGetErrorString(error),
                                   cudaGetErrorName(error)));
}

int visible_gpus() {
  int count = 0;
  if (cudaGetDeviceCount(&count) != cudaSuccess) {
    cudaGetLastError();
    return 0;
  }
  return count;
}

std::string why_no_gpu() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return "";
  cudaGetLastError();
  if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    if (driver == 0) return "there is no NVIDIA driver";
    return fmt::format("the NVIDIA driver knows CUDA {}.{}, and this program was built with {}.{}",
                       driver / 1000, driver % 1000 / 10, CUDART_VERSION / 1000,
                       CUDART_VERSION % 1000 / 10);
  }
  if (error == cudaErrorNoDevice || error == cudaSuccess) return "no NVIDIA GPU is visible";
  return cudaGetErrorString(error);
}

std::string gpu_bus_id() {
  int device = 0;
  char id[32] = "";
  check_cuda(cudaGetDevice(&device), "finding the GPU");
  check_cuda(cudaDeviceGetPCIBusId(id, sizeof id, device), "naming the GPU");
  return id;
}

int64_t free_gpu_memory() {
  size_t free = 0, total = 0;
  if (cudaMemGetInfo(&free, &total) == cudaSuccess) return static_cast<int64_t>(free);
  cudaGetLastError();
  return 0;
}

std::unique_ptr<Backend> make_cuda_backend(const CudaOptions& options) {
  return std::make_unique<CudaBackend>(open_device(options), options.cache_folder);
}

CudaStream::CudaStream(int64_t scratch_bytes, int priority) {
  check_cuda(cudaStreamCreateWithPriority(&stream_, cudaStreamNonBlocking, priority),
             "creating a stream");
  reserve(scratch_bytes);
}

CudaStream::~CudaStream() {
  cudaStreamSynchronize(stream_);
  cudaFree(scratch_);
  cudaStreamDestroy(stream_);
}

void CudaStream::synchronize() {
  check_cuda(cudaStreamSynchronize(stream_), "waiting for the GPU");
}

void CudaStream::reserve(int64_t bytes) {
  if (bytes <= scratch_bytes_) return;
  synchronize();
  check_cuda(cudaFree(scratch_), "freeing scratch memory");
  scratch_ = nullptr;
  scratch_bytes_ = 0;
  check_cuda(cudaMalloc(&scratch_, static_cast<size_t>(bytes)), "allocating scratch memory");
  scratch_bytes_ = bytes;
}

void* CudaStream::scratch(int64_t bytes) {
  reserve(bytes);
  return scratch_;
}

}  // namespace dstrain
