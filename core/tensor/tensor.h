// A non-owning view of memory: pointer, element type, shape. It never allocates and is passed by
// value. Rows may be further apart than their length (a column slice of a wider matrix); all other
// dims are contiguous. What the pointer addresses (host or device) is the Backend's business.
#pragma once

#include <cstdint>
#include <initializer_list>
#include <string>

#include "core/base/error.h"

namespace dstrain {

enum class DType : uint8_t { f32, f64, bf16, i32, i64, u8, u16 };

int64_t dtype_bytes(DType dtype);
const char* dtype_name(DType dtype);

template <class T>
struct DTypeOf;
template <> struct DTypeOf<float> { static constexpr DType value = DType::f32; };
template <> struct DTypeOf<double> { static constexpr DType value = DType::f64; };
template <> struct DTypeOf<int32_t> { static constexpr DType value = DType::i32; };
template <> struct DTypeOf<int64_t> { static constexpr DType value = DType::i64; };
template <> struct DTypeOf<uint8_t> { static constexpr DType value = DType::u8; };
template <> struct DTypeOf<uint16_t> { static constexpr DType value = DType::u16; };

class Tensor {
 public:
  static constexpr int kMaxDims = 4;

  Tensor() = default;  // absent: defined() is false, numel() is 0
  Tensor(void* data, DType dtype, std::initializer_list<int64_t> shape)
      : Tensor(data, dtype, shape.begin(), static_cast<int>(shape.size())) {}
  Tensor(void* data, DType dtype, const int64_t* shape, int dims);

  bool defined() const { return dims_ >= 0; }
  DType dtype() const { return dtype_; }
  int dims() const { return dims_; }
  int64_t size(int dim) const {
    DSTRAIN_DCHECK(dim >= 0 && dim < dims_, "dim out of range of " + describe());
    return shape_[dim];
  }
  int64_t numel() const;
  int64_t bytes() const { return numel() * dtype_bytes(dtype_); }
  // Elements from one index of dim 0 to the next; the product of the other dims when contiguous.
  int64_t row_stride() const { return row_stride_; }
  int64_t row_numel() const;  // product of all dims but the first
  bool contiguous() const { return row_stride_ == row_numel() || size0() <= 1; }

  void* raw() const { return data_; }
  template <class T>
  T* data() const {
    DSTRAIN_DCHECK(DTypeOf<T>::value == dtype_, "wrong element type for " + describe());
    return static_cast<T*>(data_);
  }

  // Rows [begin, end) of dim 0.
  Tensor rows(int64_t begin, int64_t end) const;
  // Columns [begin, end) of a matrix: a strided view.
  Tensor columns(int64_t begin, int64_t end) const;
  // Same elements in another shape; only of contiguous tensors.
  Tensor view(std::initializer_list<int64_t> shape) const;
  // dim 0 split into (outer, inner) rows or merged with dim 1 are views too: use view().

  std::string describe() const;  // "f32[16, 256]"

 private:
  int64_t size0() const { return dims_ > 0 ? shape_[0] : 1; }

  void* data_ = nullptr;
  DType dtype_ = DType::f32;
  int8_t dims_ = -1;
  int64_t shape_[kMaxDims] = {0, 0, 0, 0};
  int64_t row_stride_ = 0;
};

}  // namespace dstrain
