// Saved state from the device to a snapshot in host memory, on streams of its own beside those that
// compute.
#pragma once

#include <array>
#include <span>

#include "core/backend/backend.h"
#include "core/checkpoint/store.h"

namespace dstrain {

// Halves of f32 are joined on the device on their way. Pieces of tensors alternate between two
// streams, so that one is joined while the other is copied. Thread-compatible.
class StateCopy {
 public:
  // chunks_2N: f32 device memory, which outlives the copies as the back end does; may be absent
  // where no tensor comes in halves.
  StateCopy(Backend& backend, const Tensor& chunks_2N);

  // What is queued here before queue() happens before the copies.
  Stream& stream() { return *lanes_[0].stream; }
  // Queues copies of tensor i to places[i], in host memory. The event is behind them all until the
  // next call.
  Event& queue(std::span<const StateTensor> tensors, std::span<void* const> places);

 private:
  struct Lane {
    std::unique_ptr<Stream> stream;
    std::unique_ptr<Event> passed;
    Tensor chunk_N;
  };

  static void wait(Lane& lane, Lane& other);  // for what the other has queued
  int64_t piece_elements(const StateTensor& tensor) const;
  void queue_piece(Lane& lane, const StateTensor& tensor, int64_t begin, int64_t end, void* place);

  Backend& backend_;
  std::array<Lane, 2> lanes_;
};

}  // namespace dstrain
