// In place of the header of this name, which says what the functions do.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "test/support/cuda_on_cpu/kernel_words.h"

namespace dstrain {

inline uint32_t pair_of(__nv_bfloat16 low, __nv_bfloat16 high) {
  return uint32_t{__bfloat16_as_ushort(low)} | uint32_t{__bfloat16_as_ushort(high)} << 16;
}

inline cuda_on_cpu::Lanes<const __nv_bfloat16*> rows_of_matrices(const char* function,
                                                                 const __nv_bfloat16* row) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    cuda_on_cpu::fail("a row of a matrix of 8 x 8 is not aligned to 16 bytes");
  return {function, 0xffffffffu, row};
}

inline void load_matrices(uint32_t (&to)[4], const __nv_bfloat16* row) {
  const auto rows = rows_of_matrices(__func__, row);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const __nv_bfloat16* const at = rows[8 * i + lane / 4] + 2 * (lane % 4);
    to[i] = pair_of(at[0], at[1]);
  }
}

inline void load_matrices_trans(uint32_t (&to)[4], const __nv_bfloat16* row) {
  const auto rows = rows_of_matrices(__func__, row);
  const int lane = cuda_on_cpu::lane();
  for (int i = 0; i < 4; ++i) {
    const int first = 8 * i + 2 * (lane % 4);
    to[i] = pair_of(rows[first][lane / 4], rows[first + 1][lane / 4]);
  }
}

inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  struct Words {
    uint32_t a[4], b[2];
  };
  const cuda_on_cpu::Lanes<Words> all(__func__, 0xffffffffu, {{a[0], a[1], a[2], a[3]}, {b0, b1}});
  const auto product = [](uint32_t x, uint32_t y) {
    return __uint_as_float(x << 16) * __uint_as_float(y << 16) +
           __uint_as_float(x & 0xffff0000u) * __uint_as_float(y & 0xffff0000u);
  };
  const int g = cuda_on_cpu::lane() / 4, t = cuda_on_cpu::lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int below = i / 2, column = 2 * t + i % 2;
    float sum = 0;
    for (int k = 0; k < 4; ++k) {
      const Words &row = all[4 * g + k], &of_column = all[4 * column + k];
      sum += product(row.a[below], of_column.b[0]) + product(row.a[2 + below], of_column.b[1]);
    }
    c[i] += sum;
  }
}

inline void copy_async(void* to, const void* from, bool clear) {
  cuda_on_cpu::begin_copy(to, from, clear ? 0 : 16, clear ? 16 : 0);
}
inline void commit_copies() {
  cuda_on_cpu::commit_copies();
}
template <int kGroups>
void wait_for_copies() {
  cuda_on_cpu::wait_for_copies(kGroups);
}

}  // namespace dstrain
