// One product of CudaMatmul, described to cuBLASLt. The library's matrices are column-major, so it
// is asked for c^T = op(b)^T op(a)^T: its A is our b, its B our a, and a row-major matrix is its
// own transpose there.
#pragma once

#include "cuda/cuda_matmul.h"

namespace dstrain {

struct CudaMatmul::Plan {
  MatmulKey key;
  LtOperation operation;
  LtLayout a, b, c;
  bool supported = false;  // the library has an algorithm
  cublasLtMatmulAlgo_t algorithm = {};
  int64_t calls = 0;  // of a dry run
  bool tuned = false;
  MatmulChoice choice;  // where tuned
  double speedup = 1;

  double flops() const {
    return 2.0 * static_cast<double>(key.m) * static_cast<double>(key.n) *
           static_cast<double>(key.k);
  }
  std::string name() const { return "matmul " + shape_text(key); }
};

}  // namespace dstrain
