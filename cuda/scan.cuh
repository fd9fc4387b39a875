// Sums of what comes before, within one warp.
#pragma once

#include <cuda_runtime.h>

namespace dstrain {

// In place: values become the sums of those before them. Called by all lanes of one warp.
template <class T>
__device__ __forceinline__ void exclusive_scan(T* values, int size) {
  constexpr unsigned kAllLanes = 0xffffffffu;
  const int lane = threadIdx.x % 32;
  T carry = 0;
  for (int first = 0; first < size; first += 32) {
    const T own = first + lane < size ? values[first + lane] : T(0);
    T sum = own;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const T before = __shfl_up_sync(kAllLanes, sum, step);
      if (lane >= step) sum += before;
    }
    if (first + lane < size) values[first + lane] = carry + sum - own;
    carry += __shfl_sync(kAllLanes, sum, 31);
  }
}

}  // namespace dstrain
