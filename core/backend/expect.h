// Checks of the arguments of operations, for every back end.
#pragma once

#include <initializer_list>

#include "core/tensor/tensor.h"

namespace dstrain {

// Throw unless `tensor` has this type and shape; the message begins with `name` ("add_rms_norm:
// weight_D"). The first also asks for rows without gaps.
void expect(const Tensor& tensor, const char* name, DType dtype,
            std::initializer_list<int64_t> shape);
void expect_strided(const Tensor& tensor, const char* name, DType dtype,
                    std::initializer_list<int64_t> shape);

}  // namespace dstrain
