// What measuring the products of a run may cost, and what it found. No CUDA here.
#pragma once

#include <cstdint>
#include <string>

namespace dstrain {

struct MatmulTuning {
  std::string cache_folder;  // where choices are kept from run to run; empty: nowhere
  double seconds = 2;        // after these, what is left keeps the heuristic's choice
};

struct MatmulTiming {
  std::string shape;   // shape_text() of cuda/matmul_product.h
  int64_t calls = 0;   // of a dry run
  double ms = 0;       // of one call
  double tflops = 0;   // 10^12 operations per second
  double speedup = 1;  // over the heuristic's first choice; 1 where the algorithm came from disk
};

}  // namespace dstrain
