#include "core/checkpoint/state_copy.h"

#include <algorithm>

#include "core/backend/ops.h"

namespace dstrain {
namespace {

// Elements from `at` on of flat device memory that is only read.
Tensor piece(const void* flat, DType dtype, int64_t at, int64_t elements) {
  char* const begin = static_cast<char*>(const_cast<void*>(flat)) + at * dtype_bytes(dtype);
  return Tensor(begin, dtype, {elements});
}

}  // namespace

void StateCopy::operator()(std::span<const StateTensor> tensors,
                           std::span<void* const> places) const {
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].low)
      queue_joined(tensors[i], static_cast<char*>(places[i]));
    else if (tensors[i].bytes() > 0)
      backend_.copy(stream_, places[i], tensors[i].data, tensors[i].bytes());
  }
  stream_.synchronize();
}

// The stream keeps the order: a chunk is filled again when it has been copied.
void StateCopy::queue_joined(const StateTensor& tensor, char* place) const {
  DSTRAIN_CHECK(tensor.dtype == DType::f32 && chunk_N_.numel() > 0,
                "'" + tensor.name + "' cannot be joined");
  const int64_t elements = tensor.bytes() / dtype_bytes(DType::f32);
  for (int64_t at = 0; at < elements; at += chunk_N_.numel()) {
    const Tensor chunk = chunk_N_.rows(0, std::min(chunk_N_.numel(), elements - at));
    backend_.ops().join_master(stream_, piece(tensor.data, DType::bf16, at, chunk.numel()),
                               piece(tensor.low, DType::u16, at, chunk.numel()), chunk);
    backend_.copy(stream_, place + at * dtype_bytes(DType::f32), chunk.raw(), chunk.bytes());
  }
}

}  // namespace dstrain
