// Copies of host tensors in a back end's memory, with bytes between them that nothing may change.
#pragma once

#include <cstddef>
#include <vector>

#include "core/backend/backend.h"
#include "test/support/host_tensor.h"

namespace dstrain::test {

class DeviceTensors {
 public:
  // Copies are queued on the stream, with which this object must end.
  DeviceTensors(Backend& backend, Stream& stream, const std::vector<HostTensor>& tensors);

  // Of the same types and shapes; each begins at a multiple of 256 bytes.
  const std::vector<Tensor>& views() const { return views_; }
  // Waits for the stream. Throws RuntimeFailure if a byte before, between or after the tensors is
  // another: something wrote beyond the end of a tensor, which is named.
  void read_back(std::vector<HostTensor>& tensors);

 private:
  Backend& backend_;
  Stream& stream_;
  std::vector<std::byte> image_;  // of the memory
  DeviceMemory memory_;
  std::vector<size_t> offsets_;
  std::vector<Tensor> views_;
};

}  // namespace dstrain::test
