// One GPU: its properties, and streams that own their scratch memory.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "core/backend/backend.h"

namespace dstrain {

struct CudaDevice {
  int index = 0;
  int compute_capability = 0;  // 90 is 9.0
  int num_sms = 0;
  int64_t memory_bytes = 0;
  std::string name;
  bool deterministic = false;  // the same bits in every run, at some cost in attention's backward
  bool tf32 = false;           // f32 products in TF32

  bool is_hopper() const { return compute_capability == 90; }
};

class CudaStream : public Stream {
 public:
  // priority: lower numbers go first; 0 is everyone's.
  explicit CudaStream(int64_t scratch_bytes, int priority = 0);
  ~CudaStream() override;
  CudaStream(const CudaStream&) = delete;
  CudaStream& operator=(const CudaStream&) = delete;

  void* native() const override { return stream_; }
  void synchronize() override;
  void leave_room(int multiprocessors) override { room_ = multiprocessors; }
  int room() const { return room_; }
  cudaStream_t get() const { return stream_; }

  // Device memory for the call under way, aligned to 256 bytes: what an operation takes holds until
  // the next operation of this stream is queued. Grows if a call needs more than was planned, which
  // waits for the stream.
  void* scratch(int64_t bytes);
  int64_t scratch_bytes() const { return scratch_bytes_; }
  void reserve(int64_t bytes);

 private:
  cudaStream_t stream_ = nullptr;
  void* scratch_ = nullptr;
  int64_t scratch_bytes_ = 0;
  int room_ = 0;
};

inline cudaStream_t cuda(Stream& stream) {
  return static_cast<cudaStream_t>(stream.native());
}
inline CudaStream& cuda_stream(Stream& stream) {
  return static_cast<CudaStream&>(stream);
}
// SMs for a kernel that would take all: an even number, some are left to others
// (Stream::leave_room).
inline int sms_for(Stream& stream, int num_sms) {
  return std::max(num_sms / 2, num_sms - cuda_stream(stream).room()) / 2 * 2;
}

// Hands out the scratch of one operation piece by piece:
//   ScratchPieces take(stream, bytes of all pieces, each rounded up by padded());
class ScratchPieces {
 public:
  static constexpr int64_t kAlignment = 256;
  static int64_t padded(int64_t bytes) {
    return (bytes + kAlignment - 1) / kAlignment * kAlignment;
  }

  ScratchPieces(Stream& stream, int64_t bytes)
      : at_(static_cast<char*>(cuda_stream(stream).scratch(bytes))), end_(at_ + bytes) {}
  template <class T>
  T* take(int64_t count) {
    char* const piece = at_;
    at_ += padded(count * static_cast<int64_t>(sizeof(T)));
    DSTRAIN_CHECK(at_ <= end_, "an operation's scratch is smaller than its pieces");
    return reinterpret_cast<T*>(piece);
  }

 private:
  char* at_;
  char* end_;
};

}  // namespace dstrain
