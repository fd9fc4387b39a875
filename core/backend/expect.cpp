#include "core/backend/expect.h"

#include <string>

namespace dstrain {
namespace {

bool has_shape(const Tensor& tensor, std::initializer_list<int64_t> shape) {
  if (tensor.dims() != static_cast<int>(shape.size())) return false;
  int dim = 0;
  for (const int64_t size : shape) {
    if (tensor.size(dim++) != size) return false;
  }
  return true;
}

}  // namespace

void expect_strided(const Tensor& tensor, const char* name, DType dtype,
                    std::initializer_list<int64_t> shape) {
  if (tensor.dtype() == dtype && has_shape(tensor, shape)) [[likely]]
    return;
  const Tensor wanted(nullptr, dtype, shape);
  DSTRAIN_CHECK(false, std::string(name) + " is " + tensor.describe() + " where " +
                           wanted.describe() + " belongs");
}

void expect(const Tensor& tensor, const char* name, DType dtype,
            std::initializer_list<int64_t> shape) {
  expect_strided(tensor, name, dtype, shape);
  DSTRAIN_CHECK(tensor.contiguous(), std::string(name) + " has gaps between its rows");
}

}  // namespace dstrain
