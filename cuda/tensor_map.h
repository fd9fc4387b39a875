// What the copy engine of a Hopper GPU has to know of a tensor in device memory.
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace dstrain {

// A tensor [z, y, x] and the boxes that are copied of it at a time: 128 bytes of x, box_y of y, one
// of z. In shared memory a box has rows of 128 bytes, whose pieces of 16 bytes are permuted. x lies
// without gaps; the strides of y and z are in elements and multiples of 16 bytes, and the data is
// aligned to 16 bytes.
struct BoxedTensor {
  enum class Element { bf16, f32 };

  const void* data = nullptr;
  std::array<int64_t, 3> sizes_xyz{};
  int64_t y_stride = 0, z_stride = 0;
  int box_y = 0;
  Element element = Element::bf16;

  // Throws RuntimeFailure where the driver is too old.
  CUtensorMap encode() const;
};

}  // namespace dstrain
