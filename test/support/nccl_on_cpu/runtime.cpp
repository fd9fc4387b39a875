// The functions of the CUDA runtime that parallel/ calls, on streams that are threads.
#include <cuda_runtime_api.h>

#include <cstring>
#include <map>
#include <mutex>

#include "test/support/nccl_on_cpu/queue.h"

using nccl_on_cpu::Queue;
using nccl_on_cpu::queue_of;
using nccl_on_cpu::StreamObject;

namespace {

thread_local int device_of_thread = 0;

struct EventObject {
  std::mutex mutex;
  std::shared_ptr<Queue> queue;  // null: not recorded
  int64_t count = 0;
};
EventObject& object_of(cudaEvent_t event) {
  return *reinterpret_cast<EventObject*>(event);
}
std::pair<std::shared_ptr<Queue>, int64_t> recorded(cudaEvent_t event) {
  EventObject& object = object_of(event);
  const std::lock_guard lock(object.mutex);
  return {object.queue, object.count};
}

struct DeviceMemory {
  std::mutex mutex;
  std::map<const void*, int64_t> ranges;  // bytes by begin
};
DeviceMemory& device_memory() {
  static DeviceMemory memory;
  return memory;
}

cudaError_t state_of(Queue& queue) {
  return queue.failure().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace

namespace nccl_on_cpu {

void add_device_memory(const void* begin, int64_t bytes) {
  const std::lock_guard lock(device_memory().mutex);
  device_memory().ranges[begin] = bytes;
}

void remove_device_memory(const void* begin) {
  const std::lock_guard lock(device_memory().mutex);
  device_memory().ranges.erase(begin);
}

}  // namespace nccl_on_cpu

extern "C" {

const char* cudaGetErrorString(cudaError_t) {
  return "work on a stream threw";
}
const char* cudaGetErrorName(cudaError_t) {
  return "on the CPU";
}
cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = device_of_thread;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  device_of_thread = device;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = *greatest = 0;
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(device_memory().mutex);
  const auto& ranges = device_memory().ranges;
  auto range = ranges.upper_bound(pointer);
  *attributes = {};
  attributes->type = cudaMemoryTypeUnregistered;
  if (range == ranges.begin()) return cudaSuccess;
  --range;
  if (pointer < static_cast<const char*>(range->first) + range->second)
    attributes->type = cudaMemoryTypeDevice;
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  queue_of(stream).push([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int) {
  *stream = reinterpret_cast<cudaStream_t>(new StreamObject(device_of_thread));
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete reinterpret_cast<StreamObject*>(stream);
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t stream) {
  Queue& queue = queue_of(stream);
  return queue.has_done(queue.pushed()) ? state_of(queue) : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  queue_of(stream).wait_for_all();
  return state_of(queue_of(stream));
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  const auto [queue, count] = recorded(event);
  Queue& own = queue_of(stream);
  if (queue && queue.get() != &own) own.push_wait(queue, count);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = reinterpret_cast<cudaEvent_t>(new EventObject);
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete &object_of(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  EventObject& object = object_of(event);
  const std::lock_guard lock(object.mutex);
  object.queue = reinterpret_cast<StreamObject*>(stream)->queue;
  object.count = object.queue->pushed();
  return cudaSuccess;
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  const auto [queue, count] = recorded(event);
  if (!queue) return cudaSuccess;
  queue->wait(count);
  return state_of(*queue);
}

}  // extern "C"
