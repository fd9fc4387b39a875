// In place of the toolkit's header of this name: the products of 16 x 16 matrices by a warp. Of the
// sum, a lane has eight neighbours in a row, and of the operands the row and the columns for them.
#pragma once

#include "test/support/cuda_on_cpu/kernel_words.h"

namespace nvcuda::wmma {

struct row_major {};
struct col_major {};
enum layout_t { mem_row_major, mem_col_major };
struct accumulator {};
struct matrix_a {};
struct matrix_b {};

inline int row_of_lane() {
  return cuda_on_cpu::lane() / 2;
}
inline int first_column_of_lane() {
  return cuda_on_cpu::lane() % 2 * 8;
}

template <class Use, int m, int n, int k, class T, class Layout = void>
struct fragment {
  static_assert(m == 16 && n == 16 && k == 16);
  T at[16][8];  // matrix_a: [k][0]; matrix_b: [k][column]; accumulator: [0][column]
};

template <class T>
void fill_fragment(fragment<accumulator, 16, 16, 16, T>& sum, T value) {
  for (T& x : sum.at[0]) x = value;
}

template <class Use, class T, class Layout>
void load_matrix_sync(fragment<Use, 16, 16, 16, T, Layout>& to, const T* matrix, unsigned stride) {
  constexpr bool kIsA = std::is_same_v<Use, matrix_a>;
  if (reinterpret_cast<uintptr_t>(matrix) % 32 != 0 || stride * sizeof(T) % 16 != 0)
    cuda_on_cpu::fail("load_matrix_sync: the matrix is not aligned as wmma asks");
  __syncwarp();
  for (int k = 0; k < 16; ++k) {
    for (int i = 0; i < (kIsA ? 1 : 8); ++i) {
      const unsigned row = kIsA ? row_of_lane() : k;
      const unsigned column = kIsA ? k : first_column_of_lane() + i;
      to.at[k][i] = std::is_same_v<Layout, row_major> ? matrix[row * stride + column]
                                                      : matrix[column * stride + row];
    }
  }
  __syncwarp();
}

template <class A, class B>
void mma_sync(fragment<accumulator, 16, 16, 16, float>& to, const A& a, const B& b,
              const fragment<accumulator, 16, 16, 16, float>& sum) {
  __syncwarp();
  for (int i = 0; i < 8; ++i) {
    float product = 0;
    for (int k = 0; k < 16; ++k)
      product += static_cast<float>(a.at[k][0]) * static_cast<float>(b.at[k][i]);
    to.at[0][i] = sum.at[0][i] + product;
  }
}

inline void store_matrix_sync(float* matrix, const fragment<accumulator, 16, 16, 16, float>& sum,
                              unsigned stride, layout_t layout) {
  __syncwarp();
  for (unsigned i = 0; i < 8; ++i) {
    const unsigned row = row_of_lane(), column = first_column_of_lane() + i;
    matrix[layout == mem_row_major ? row * stride + column : column * stride + row] = sum.at[0][i];
  }
  __syncwarp();
}

}  // namespace nvcuda::wmma
