// The functions of the CUDA runtime that the back end calls, for a device that is the CPU: each
// has done its work when it returns.
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "test/support/cuda_on_cpu/threads.h"

using cuda_on_cpu::launch_error;

namespace {

constexpr size_t kMemory = size_t{1} << 34;
constexpr size_t kAlignment = 256;

// As on a GPU, after which a failed kernel leaves nothing that works.
cudaError_t state() {
  return launch_error() == cudaErrorLaunchFailure ? cudaErrorLaunchFailure : cudaSuccess;
}

template <class Handle>
cudaError_t create(Handle* handle) {
  *handle = static_cast<Handle>(std::malloc(1));
  return state();
}

cudaError_t allocate(void** memory, size_t bytes) {
  const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  *memory = bytes == 0 ? nullptr : std::aligned_alloc(kAlignment, whole);
  return bytes > 0 && !*memory ? cudaErrorMemoryAllocation : state();
}

}  // namespace

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
  return state();
}
cudaError_t cudaSetDevice(int) {
  return state();
}
cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  *properties = {};
  std::strcpy(properties->name, "the CPU");
  properties->major = 8;
  properties->multiProcessorCount = 3;  // few, so that blocks take more than one part of the work
  properties->totalGlobalMem = kMemory;
  return state();
}
cudaError_t cudaDeviceGetPCIBusId(char* id, int size, int) {
  std::strncpy(id, "0000:00:00.0", static_cast<size_t>(size));
  return state();
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return state();
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return cudaErrorInvalidValue;
  *value = 163 << 10;
  return state();
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return state();
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  return allocate(memory, bytes);
}
cudaError_t cudaFree(void* memory) {
  std::free(memory);
  return state();
}
cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) {
  return allocate(memory, bytes);
}
cudaError_t cudaFreeHost(void* memory) {
  return cudaFree(memory);
}
cudaError_t cudaHostRegister(void*, size_t, unsigned) {
  return state();
}
cudaError_t cudaHostUnregister(void*) {
  return state();
}
cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  *free = *total = kMemory;
  return state();
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return state();
}
cudaError_t cudaMemcpy2DAsync(void* to, size_t to_step, const void* from, size_t from_step,
                              size_t width, size_t rows, cudaMemcpyKind, cudaStream_t) {
  if (width > to_step || width > from_step) return cudaErrorInvalidValue;
  for (size_t row = 0; row < rows; ++row)
    std::memcpy(static_cast<char*>(to) + row * to_step,
                static_cast<const char*>(from) + row * from_step, width);
  return state();
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  std::memset(to, value, bytes);
  return state();
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  return create(stream);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  std::free(stream);
  return state();
}
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return state();
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  return state();
}
cudaError_t cudaEventCreate(cudaEvent_t* event) {
  return create(event);
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return create(event);
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  std::free(event);
  return state();
}
cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) {
  return state();
}
cudaError_t cudaEventSynchronize(cudaEvent_t) {
  return state();
}
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) {
  *ms = 0;
  return state();
}

}  // extern "C"
