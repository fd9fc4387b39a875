// Products of an f32 and a bf16 matrix, as one bf16 product. An f32 number is the sum of three of
// bf16 (low, middle, high: three times 8 bits of mantissa), so the f32 operand is written as three
// terms and multiplied exactly. Either
//   the terms lie one after the other along k, the bf16 operand three times likewise, and the
//   product sums them; or they lie along the operand's other dimension, the product is three
//   products in f32, and those are added at last.
// The first copies the bf16 operand, the second writes f32 sums: whichever takes fewer bytes. For a
// router's dx [T,D] = dlogits W it is the first, for its dW [E,D] = dlogits^T x the second. No CUDA
// here.
#pragma once

#include "cuda/matmul_product.h"

namespace dstrain {

// Three matrices of rows x columns, filled up with zeros, below each other or side by side.
struct Stack {
  static constexpr int kTerms = 3;  // low, middle, high
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;  // elements from row to row
  int64_t step = 0;    // elements from term to term
  int64_t numel() const { return kTerms * rows * columns; }
};

struct MixedProduct {
  // p has an f32 and a bf16 operand.
  explicit MixedProduct(const Product& p);

  bool a_is_split;  // or b
  bool along_k;
  Stack split;      // bf16: terms of the f32 operand
  Stack copies;     // bf16: the other operand three times, where along_k
  Stack sums;       // f32: three products, where not
  Product product;  // what cuBLASLt multiplies, once place() was called

  int64_t split_bytes() const { return split.numel() * 2; }
  int64_t copies_bytes() const { return copies.numel() * 2; }
  int64_t sums_bytes() const { return sums.numel() * 4; }

  // Where the pieces above lie; 16-byte aligned.
  void place(void* split_data, void* copies_data, void* sums_data);
};

inline MixedProduct::MixedProduct(const Product& p)
    : a_is_split(p.a.dtype == DType::f32), product(p) {
  constexpr int64_t kTerms = Stack::kTerms, kVector = 8;  // rows begin at multiples of 16 bytes
  auto round_up = [](int64_t n) { return (n + kVector - 1) / kVector * kVector; };
  auto stack = [&](int64_t rows, int64_t columns, bool along_rows) {
    const int64_t padded = round_up(columns);
    return along_rows ? Stack{rows, padded, padded, rows * padded}
                      : Stack{rows, padded, kTerms * padded, padded};
  };
  const int64_t other_numel = a_is_split ? p.k * p.n : p.m * p.k;
  along_k = other_numel * 2 <= p.m * p.n * 4;
  const bool k_is_rows_of_a = p.ta == Trans::yes, k_is_rows_of_b = p.tb == Trans::no;
  if (along_k) {
    product.k = round_up(p.k);  // a term's share of k, alike in both
    const Stack a = stack(rows_of_a(product), columns_of_a(product), k_is_rows_of_a);
    const Stack b = stack(rows_of_b(product), columns_of_b(product), k_is_rows_of_b);
    split = a_is_split ? a : b;
    copies = a_is_split ? b : a;
    product.k *= kTerms;
    return;
  }
  int64_t& outer = a_is_split ? product.m : product.n;
  outer = round_up(outer);
  split = a_is_split ? stack(rows_of_a(product), columns_of_a(product), !k_is_rows_of_a)
                     : stack(rows_of_b(product), columns_of_b(product), !k_is_rows_of_b);
  sums = stack(product.m, product.n, a_is_split);
  outer *= kTerms;
  product.alpha = 1;
  product.beta = 0;
}

inline void MixedProduct::place(void* split_data, void* copies_data, void* sums_data) {
  (a_is_split ? product.a : product.b) = {split_data, DType::bf16, split.stride};
  if (along_k)
    (a_is_split ? product.b : product.a) = {copies_data, DType::bf16, copies.stride};
  else
    product.c = {sums_data, DType::f32, sums.stride};
}

}  // namespace dstrain
