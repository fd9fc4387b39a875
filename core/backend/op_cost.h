// What an operation cannot do without, from the shapes of its operands.
#pragma once

#include <initializer_list>

#include "core/tensor/tensor.h"

namespace dstrain {

// Of all that are there.
inline double bytes_of(std::initializer_list<const Tensor*> tensors) {
  double bytes = 0;
  for (const Tensor* x : tensors)
    if (x->defined()) bytes += static_cast<double>(x->bytes());
  return bytes;
}

inline double size_of(const Tensor& x, int dim) {
  return static_cast<double>(x.size(dim));
}

}  // namespace dstrain
