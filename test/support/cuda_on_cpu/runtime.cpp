// The functions of the CUDA runtime that the back end calls, for a device that is the CPU (streams
// and events: streams.cpp).
#include "test/support/cuda_on_cpu/runtime.h"

#include <malloc.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>

#include "test/support/cuda_on_cpu/streams.h"
#include "test/support/cuda_on_cpu/threads.h"

namespace cuda_on_cpu {
namespace {

constexpr size_t kMemory = size_t{1} << 34;
constexpr size_t kAlignment = 256;
constexpr size_t kMostFilled = size_t{8} << 20;  // tests use less of larger blocks
constexpr int kSharedMemory = 163 << 10;         // of a block, of compute capability 8.0

cudaError_t allocate(void** memory, size_t bytes) {
  *memory = bytes > 0 ? allocate_memory(bytes) : nullptr;
  return bytes > 0 && !*memory ? cudaErrorMemoryAllocation : device_state();
}

// Host memory that is registered with the driver, from its begin on.
std::map<const char*, size_t>& registered() {
  static std::map<const char*, size_t> ranges;
  return ranges;
}
int64_t registrations_left = std::numeric_limits<int64_t>::max();

// Whether all of the bytes are in one registration, or none in any.
bool is_copyable(const void* memory, size_t bytes) {
  const std::lock_guard lock(device_mutex());
  const auto* const begin = static_cast<const char*>(memory);
  for (const auto& [range, length] : registered()) {
    const bool is_inside = range <= begin && begin + bytes <= range + length;
    if (!is_inside && begin < range + length && range < begin + bytes) return false;
  }
  return true;
}

cudaError_t queue_copy(void* to, size_t to_step, const void* from, size_t from_step, size_t width,
                       size_t rows, cudaStream_t stream) {
  if (width > to_step || width > from_step) return cudaErrorInvalidValue;
  if (!is_copyable(to, width) || !is_copyable(from, width)) return cudaErrorInvalidValue;
  queue(stream, [=] {
    for (size_t row = 0; row < rows; ++row)
      std::memcpy(static_cast<char*>(to) + row * to_step,
                  static_cast<const char*>(from) + row * from_step, width);
  });
  return device_state();
}

}  // namespace

cudaError_t device_state() {
  const std::lock_guard lock(device_mutex());
  return launch_error() == cudaErrorLaunchFailure ? cudaErrorLaunchFailure : cudaSuccess;
}

void* allocate_memory(size_t bytes) {
  void* memory = nullptr;
  if (bytes > kMemory || posix_memalign(&memory, kAlignment, bytes) != 0) return nullptr;
  return std::memset(memory, 0xff, std::min(bytes, kMostFilled));
}
size_t allocated_bytes(void* memory) {
  return malloc_usable_size(memory);
}
void free_memory(void* memory) {
  std::free(memory);
}

std::vector<size_t> registered_pieces(const void* block) {
  const std::lock_guard lock(device_mutex());
  std::vector<size_t> pieces;
  const auto* at = static_cast<const char*>(block);
  for (auto piece = registered().find(at); piece != registered().end();
       piece = registered().find(at += piece->second))
    pieces.push_back(piece->second);
  return pieces;
}
size_t registered_count() {
  const std::lock_guard lock(device_mutex());
  return registered().size();
}
void refuse_registrations_after(int64_t count) {
  registrations_left = count;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorLaunchFailure          ? "a kernel failed (see standard error)"
         : error == cudaErrorInvalidConfiguration ? "a launch of an impossible shape"
                                                  : "an error";
}
const char* cudaGetErrorName(cudaError_t) {
  return "on the CPU";
}
cudaError_t cudaGetLastError() {
  const std::lock_guard lock(device_mutex());
  const cudaError_t error = launch_error();
  if (error != cudaErrorLaunchFailure) launch_error() = cudaSuccess;
  return error;
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return device_state();
}
cudaError_t cudaSetDevice(int) {
  return device_state();
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "the CPU");
  properties->major = 8;
  properties->multiProcessorCount = 3;  // few, so that blocks take more than one part of the work
  properties->totalGlobalMem = kMemory;
  return device_state();
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::strncpy(id, "0000:00:00.0", static_cast<size_t>(size));
  return device_state();
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = kSharedMemory;
  return device_state();
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value < 0 || value > kSharedMemory) return cudaErrorInvalidValue;
    allow_shared_memory(kernel, static_cast<size_t>(value));
  }
  return device_state();
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return allocate(memory, bytes);
}
cudaError_t cudaFree(void* memory) {
  free_when_unused(memory);
  return device_state();
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return allocate(memory, bytes);
}
cudaError_t cudaFreeHost(void* memory) {
  return cudaFree(memory);
}
cudaError_t cudaHostRegister(void* memory, size_t bytes, unsigned) {
  const std::lock_guard lock(device_mutex());
  if (registrations_left-- <= 0) return cudaErrorNotSupported;
  registered().emplace(static_cast<const char*>(memory), bytes);
  return device_state();
}
cudaError_t cudaHostUnregister(void* memory) {
  const std::lock_guard lock(device_mutex());
  if (registered().erase(static_cast<const char*>(memory)) == 0)
    return cudaErrorHostMemoryNotRegistered;
  return device_state();
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = kMemory;
  return device_state();
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t stream) {
  return queue_copy(to, bytes, from, bytes, bytes, 1, stream);
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_step, const void* from, size_t from_step,
                              size_t width, size_t rows, cudaMemcpyKind, cudaStream_t stream) {
  return queue_copy(to, to_step, from, from_step, width, rows, stream);
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  queue(stream, [=] { std::memset(to, value, bytes); });
  return device_state();
}

}  // extern "C"
