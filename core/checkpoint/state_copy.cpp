#include "core/checkpoint/state_copy.h"

#include <algorithm>

#include "core/backend/ops.h"

namespace dstrain {
namespace {

// Of what is copied at once: other copies, which steps wait for, get their turn in between, and a
// stream's queue holds all pieces of a device's memory.
constexpr int64_t kPieceBytes = int64_t{64} << 20;

// Elements [begin, end) of flat device memory that is only read.
Tensor piece(const void* flat, DType dtype, int64_t begin, int64_t end) {
  char* const at = static_cast<char*>(const_cast<void*>(flat)) + begin * dtype_bytes(dtype);
  return Tensor(at, dtype, {end - begin});
}

}  // namespace

StateCopy::StateCopy(Backend& backend, const Tensor& chunks_2N) : backend_(backend) {
  for (size_t i = 0; i < lanes_.size(); ++i) {
    lanes_[i].stream = backend.make_copy_stream();
    lanes_[i].passed = backend.make_event();
    if (!chunks_2N.defined()) continue;
    const auto row = static_cast<int64_t>(i);
    lanes_[i].chunk_N = chunks_2N.rows(row, row + 1).view({chunks_2N.size(1)});
  }
}

void StateCopy::wait(Lane& lane, Lane& other) {
  other.passed->record(*other.stream);
  other.passed->wait_on(*lane.stream);
}

Event& StateCopy::queue(std::span<const StateTensor> tensors, std::span<void* const> places) {
  wait(lanes_[1], lanes_[0]);
  size_t pieces = 0;
  for (size_t i = 0; i < tensors.size(); ++i) {
    const StateTensor& tensor = tensors[i];
    const int64_t elements = tensor.bytes() / dtype_bytes(tensor.dtype);
    const int64_t step = elements > 0 ? piece_elements(tensor) : 1;
    for (int64_t at = 0; at < elements; at += step)
      queue_piece(lanes_[pieces++ % lanes_.size()], tensor, at, std::min(at + step, elements),
                  places[i]);
  }
  wait(lanes_[0], lanes_[1]);
  lanes_[0].passed->record(*lanes_[0].stream);
  return *lanes_[0].passed;
}

int64_t StateCopy::piece_elements(const StateTensor& tensor) const {
  const int64_t at_once = kPieceBytes / dtype_bytes(tensor.dtype);
  if (!tensor.low) return at_once;
  const Tensor& chunk_N = lanes_[0].chunk_N;
  DSTRAIN_CHECK(tensor.dtype == DType::f32 && chunk_N.defined() && chunk_N.numel() > 0,
                "'" + tensor.name + "' cannot be joined");
  return std::min(at_once, chunk_N.numel());
}

// A lane keeps the order: its chunk is filled again when it has been copied.
void StateCopy::queue_piece(Lane& lane, const StateTensor& tensor, int64_t begin, int64_t end,
                            void* place) {
  char* const to = static_cast<char*>(place) + begin * dtype_bytes(tensor.dtype);
  Tensor from = piece(tensor.data, tensor.low ? DType::bf16 : tensor.dtype, begin, end);
  if (tensor.low) {
    const Tensor joined = lane.chunk_N.rows(0, end - begin);
    backend_.ops().join_master(*lane.stream, from, piece(tensor.low, DType::u16, begin, end),
                               joined);
    from = joined;
  }
  backend_.copy(*lane.stream, to, from.raw(), from.bytes());
}

}  // namespace dstrain
