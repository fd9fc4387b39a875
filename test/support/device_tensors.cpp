#include "test/support/device_tensors.h"

#include <algorithm>
#include <cstring>
#include <string>

#include "core/base/error.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#endif

namespace dstrain::test {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kGuard = 256;         // at least, on each side of a tensor
constexpr std::byte kGuardByte{0xff};  // NaN to whom reads it

size_t bytes_of(const HostTensor& tensor) {
  return static_cast<size_t>(tensor.view().bytes());
}

// With AddressSanitizer, kernels that run on the CPU (test/support/cuda_on_cpu) end the process
// where they read or write bytes that are closed.
void close_bytes([[maybe_unused]] const DeviceMemory& memory) {
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(memory.data(), static_cast<size_t>(memory.bytes()));
#endif
}
void open_bytes([[maybe_unused]] void* at, [[maybe_unused]] size_t bytes) {
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(at, bytes);
#endif
}

}  // namespace

DeviceTensors::DeviceTensors(Backend& backend, Stream& stream,
                             const std::vector<HostTensor>& tensors)
    : backend_(backend), stream_(stream) {
  size_t end = kGuard;
  for (const HostTensor& tensor : tensors) {
    offsets_.push_back(end);
    end += (bytes_of(tensor) + kAlignment - 1) / kAlignment * kAlignment + kGuard;
  }
  image_.assign(end, kGuardByte);
  memory_ = DeviceMemory(backend, static_cast<int64_t>(end), MemoryKind::device);
  for (size_t i = 0; i < tensors.size(); ++i) {
    const Tensor host = tensors[i].view();
    if (host.bytes() > 0)
      std::memcpy(image_.data() + offsets_[i], host.raw(), bytes_of(tensors[i]));
    int64_t shape[Tensor::kMaxDims];
    for (int d = 0; d < host.dims(); ++d) shape[d] = host.size(d);
    views_.emplace_back(static_cast<std::byte*>(memory_.data()) + offsets_[i], host.dtype(), shape,
                        host.dims());
  }
  backend.copy(stream, memory_.data(), image_.data(), memory_.bytes());
  if (backend.is_cpu()) return;
  stream.synchronize();
  close_bytes(memory_);
  for (const Tensor& view : views_) open_bytes(view.raw(), static_cast<size_t>(view.bytes()));
}

void DeviceTensors::read_back(std::vector<HostTensor>& tensors) {
  stream_.synchronize();
  open_bytes(memory_.data(), image_.size());
  backend_.copy(stream_, image_.data(), memory_.data(), memory_.bytes());
  stream_.synchronize();
  auto expect_guard = [&](size_t begin, size_t end, const std::string& where) {
    const auto changed = std::find_if(image_.begin() + static_cast<ptrdiff_t>(begin),
                                      image_.begin() + static_cast<ptrdiff_t>(end),
                                      [](std::byte byte) { return byte != kGuardByte; });
    const auto at = static_cast<size_t>(changed - image_.begin());
    if (at != end)
      throw RuntimeFailure("byte " + std::to_string(at - begin) + " " + where + " was written");
  };
  expect_guard(0, kGuard, "of the 256 before all tensors");
  for (size_t i = 0; i < tensors.size(); ++i) {
    const size_t begin = offsets_[i], end = begin + bytes_of(tensors[i]);
    if (end > begin) std::memcpy(tensors[i].view().raw(), image_.data() + begin, end - begin);
    expect_guard(end, i + 1 < tensors.size() ? offsets_[i + 1] : image_.size(),
                 "after the end of slot " + std::to_string(i) + ", " + views_[i].describe() + ",");
  }
}

}  // namespace dstrain::test
