// Saved state from the device to a snapshot in host memory.
#pragma once

#include <span>

#include "core/backend/backend.h"
#include "core/checkpoint/store.h"

namespace dstrain {

// An AsyncSaver::Copy. All copies are queued on the stream, which is then waited for. Halves of f32
// are joined on the device, in `chunk_N` (f32 device memory; may be absent where no tensor comes in
// halves). The back end, the stream and the chunk outlive it.
class StateCopy {
 public:
  StateCopy(Backend& backend, Stream& stream, const Tensor& chunk_N)
      : backend_(backend), stream_(stream), chunk_N_(chunk_N) {}
  void operator()(std::span<const StateTensor> tensors, std::span<void* const> places) const;

 private:
  void queue_joined(const StateTensor& tensor, char* place) const;

  Backend& backend_;
  Stream& stream_;
  Tensor chunk_N_;
};

}  // namespace dstrain
