#include "core/tensor/arena.h"

namespace dstrain {

void* Arena::raw(int64_t bytes, const char* tag) {
  const int64_t begin = used_;
  used_ += (bytes + kAlignment - 1) / kAlignment * kAlignment;
  peak_ = std::max(peak_, used_);
  // Never touched; not null, so that views of it can be formed.
  if (measuring()) return reinterpret_cast<char*>(static_cast<uintptr_t>(kAlignment + begin));
  DSTRAIN_CHECK(used_ <= capacity_, "arena '" + name_ + "' has " + std::to_string(capacity_) +
                                        " bytes; '" + tag + "' needs " + std::to_string(bytes) +
                                        " more than the " + std::to_string(begin) + " in use");
  return base_ + begin;
}

Tensor Arena::make(DType dtype, std::initializer_list<int64_t> shape, const char* tag) {
  int64_t bytes = dtype_bytes(dtype);
  for (int64_t n : shape) bytes *= n;
  return Tensor(raw(bytes, tag), dtype, shape);
}

Tensor Arena::like(const Tensor& x, const char* tag) {
  int64_t shape[Tensor::kMaxDims];
  for (int i = 0; i < x.dims(); ++i) shape[i] = x.size(i);
  return Tensor(raw(x.bytes(), tag), x.dtype(), shape, x.dims());
}

}  // namespace dstrain
