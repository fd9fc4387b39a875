// Attention in bf16 by cuDNN's fused kernels. A plan is built for each shape at first use, which
// takes about a second (cuDNN compiles the kernel), and then kept.
// Legend: T query rows, U key rows, H query heads, G key/value heads, Q and W head widths, B
// sequences.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <optional>

#include "cuda/cuda_device.h"

namespace dstrain {

// What a plan depends on.
struct CudnnAttentionShape {
  bool backward = false;
  // The last of `queries` sees all of `keys`, each one before it a key less. If not causal, which
  // is ragged only, all queries of a sequence see all of its keys.
  bool causal = true;
  // Whether lengths and first elements of the sequences come from device memory. If not, the
  // tensors are B sequences of `queries` rows (of `keys` rows), one after the other.
  bool ragged = false;
  int64_t B = 0;                  // ragged: room for so many
  int64_t queries = 0, keys = 0;  // rows of a sequence; ragged: at most
  int64_t T = 0, U = 0;
  int64_t H = 0, G = 0, Q = 0, W = 0;
  double scale = 1;

  friend auto operator<=>(const CudnnAttentionShape&, const CudnnAttentionShape&) = default;
};

// The memory of a call: all contiguous and aligned to 16 bytes, as in Ops::attention, but lse for
// backward of what is not ragged: [B, H, queries]. Ragged calls also read lengths, i32 [B], and
// offsets in elements, i64 [B + 1].
enum class CudnnTensor {
  q,
  k,
  v,
  o,
  lse,
  dout,
  dq,
  dk,
  dv,
  query_lengths,
  key_lengths,
  q_offsets,
  k_offsets,
  v_offsets,
  o_offsets,
  lse_offsets,
  count
};
class CudnnPointers {
 public:
  void*& operator[](CudnnTensor tensor) { return at_[static_cast<size_t>(tensor)]; }
  void* operator[](CudnnTensor tensor) const { return at_[static_cast<size_t>(tensor)]; }

 private:
  std::array<void*, static_cast<size_t>(CudnnTensor::count)> at_ = {};
};

// Thread-compatible. In a build without cuDNN's headers, and where its library is missing, there
// are no plans.
class CudnnAttention {
 public:
  // Warns where the library cannot be loaded.
  explicit CudnnAttention(const CudaDevice& device);
  ~CudnnAttention();

  // Work space that run() takes for this shape, or nothing where cuDNN refuses it. Builds the plan.
  std::optional<int64_t> workspace_bytes(const CudnnAttentionShape& shape);

  // Asynchronous on the stream. workspace_bytes() has accepted the shape; `workspace` is aligned to
  // 256 bytes.
  void run(Stream& stream, const CudnnAttentionShape& shape, const CudnnPointers& pointers,
           void* workspace);

 private:
  class Plans;
  std::unique_ptr<Plans> plans_;
};

}  // namespace dstrain
