#include "cuda/matmul_product.h"

#include <fmt/format.h>

#include <algorithm>

namespace dstrain {

std::string shape_text(const MatmulKey& key) {
  return fmt::format("{} {}{} {}x{}x{} {}{}", key.tf32 ? "tf32" : dtype_name(key.operands),
                     key.transposed_a ? 't' : 'n', key.transposed_b ? 't' : 'n', key.m, key.n,
                     key.k, key.adds ? "+" : "", dtype_name(key.result));
}

std::string key_text(const MatmulKey& key) {
  std::string text =
      fmt::format("{},{}:{},{}:{},{}:{}", shape_text(key), key.stride_a, key.alignment_a,
                  key.stride_b, key.alignment_b, key.stride_c, key.alignment_c);
  std::replace(text.begin(), text.end(), ' ', ',');
  return text;
}

}  // namespace dstrain
