#include "core/tensor/tensor.h"

namespace dstrain {

int64_t dtype_bytes(DType dtype) {
  switch (dtype) {
    case DType::f32:
    case DType::i32: return 4;
    case DType::f64:
    case DType::i64: return 8;
    case DType::bf16:
    case DType::u16: return 2;
    case DType::u8: return 1;
  }
  return 0;
}

const char* dtype_name(DType dtype) {
  switch (dtype) {
    case DType::f32: return "f32";
    case DType::f64: return "f64";
    case DType::bf16: return "bf16";
    case DType::i32: return "i32";
    case DType::i64: return "i64";
    case DType::u8: return "u8";
    case DType::u16: return "u16";
  }
  return "?";
}

Tensor::Tensor(void* data, DType dtype, const int64_t* shape, int dims)
    : data_(data), dtype_(dtype), dims_(static_cast<int8_t>(dims)) {
  DSTRAIN_CHECK(dims <= kMaxDims, "a tensor has at most four dims");
  for (int i = 0; i < dims; ++i) {
    DSTRAIN_CHECK(shape[i] >= 0, "a tensor has no negative dims");
    shape_[i] = shape[i];
  }
  row_stride_ = row_numel();
}

int64_t Tensor::numel() const {
  if (dims_ < 0) return 0;
  int64_t n = 1;
  for (int i = 0; i < dims_; ++i) n *= shape_[i];
  return n;
}

int64_t Tensor::row_numel() const {
  int64_t n = 1;
  for (int i = 1; i < dims_; ++i) n *= shape_[i];
  return n;
}

Tensor Tensor::rows(int64_t begin, int64_t end) const {
  DSTRAIN_CHECK(dims_ > 0 && begin >= 0 && begin <= end && end <= shape_[0],
                "row range outside of " + describe());
  Tensor out = *this;
  out.data_ = static_cast<char*>(data_) + begin * row_stride_ * dtype_bytes(dtype_);
  out.shape_[0] = end - begin;
  return out;
}

Tensor Tensor::columns(int64_t begin, int64_t end) const {
  DSTRAIN_CHECK(dims_ == 2 && begin >= 0 && begin <= end && end <= shape_[1],
                "column range outside of " + describe());
  Tensor out = *this;
  out.data_ = static_cast<char*>(data_) + begin * dtype_bytes(dtype_);
  out.shape_[1] = end - begin;
  return out;
}

Tensor Tensor::view(std::initializer_list<int64_t> shape) const {
  DSTRAIN_CHECK(contiguous(), "only a contiguous tensor takes another shape");
  Tensor out(data_, dtype_, shape);
  DSTRAIN_CHECK(out.numel() == numel(), "view changes the number of elements of " + describe());
  return out;
}

std::string Tensor::describe() const {
  if (!defined()) return "(absent)";
  std::string text = std::string(dtype_name(dtype_)) + "[";
  for (int i = 0; i < dims_; ++i) text += (i ? ", " : "") + std::to_string(shape_[i]);
  return text + "]";
}

}  // namespace dstrain
