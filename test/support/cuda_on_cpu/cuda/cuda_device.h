// The header of this name, and what stands for its ScratchPieces: each piece is a block of memory
// of its own, so that what lies beyond its end is nobody's. It ends with the operation.
#pragma once

#include "test/../cuda/cuda_device.h"

#include "test/support/cuda_on_cpu/streams.h"

namespace dstrain {

class SeparateScratchPieces {
 public:
  // Of a stream's scratch so much comes with its contents, which tests may choose.
  static constexpr int64_t kContents = int64_t{1} << 20;
  static constexpr int64_t kAlignment = ScratchPieces::kAlignment;
  static int64_t padded(int64_t bytes) { return ScratchPieces::padded(bytes); }

  SeparateScratchPieces(Stream& stream, int64_t bytes)
      : stream_(cuda(stream)), begin_(cuda_stream(stream).scratch(bytes)), pieces_(stream, bytes) {}
  template <class T>
  T* take(int64_t count) {
    const T* const piece = pieces_.take<T>(count);
    const int64_t before = reinterpret_cast<const char*>(piece) - static_cast<char*>(begin_);
    return static_cast<T*>(cuda_on_cpu::scratch_piece(
        stream_, std::exchange(is_first_, false), static_cast<size_t>(count) * sizeof(T), piece,
        static_cast<size_t>(std::max<int64_t>(0, kContents - before))));
  }

 private:
  cudaStream_t stream_;
  void* begin_;
  ScratchPieces pieces_;
  bool is_first_ = true;
};

}  // namespace dstrain

#define ScratchPieces SeparateScratchPieces
