// The words of CUDA C++ that kernels use without an include, for a C++ compiler: in front of every
// source that rewrite.sed has turned into C++.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include "test/support/cuda_on_cpu/threads.h"

#undef __launch_bounds__
#undef __forceinline__
#define __launch_bounds__(...)
#define __forceinline__ inline

template <class... T>
cudaError_t cudaFuncSetAttribute(void (*kernel)(T...), cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// --- numbers

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmin(a, b);
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  if constexpr (std::is_floating_point_v<std::common_type_t<A, B>>) return std::fmax(a, b);
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
using std::isfinite;
inline float __expf(float x) {
  return std::exp(x);
}
inline float __fdividef(float a, float b) {
  return a / b;
}
inline float __fdiv_rn(float a, float b) {
  return a / b;
}
inline float rsqrtf(float x) {
  return 1 / std::sqrt(x);
}
inline float __uint_as_float(unsigned x) {
  return std::bit_cast<float>(x);
}
inline unsigned __float_as_uint(float x) {
  return std::bit_cast<unsigned>(x);
}
inline int __popc(unsigned x) {
  return std::popcount(x);
}
inline int __ffs(int x) {
  return x == 0 ? 0 : std::countr_zero(static_cast<unsigned>(x)) + 1;
}
inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>(uint64_t{a} * b >> 32);
}

// --- memory

template <class T>
T __ldcs(const T* from) {
  return *from;
}
template <class T>
void __stcs(T* to, T value) {
  *to = value;
}
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to = before + value;
  return before;
}
template <class T>
T atomicMin(T* to, T value) {
  const T before = *to;
  if (value < before) *to = value;
  return before;
}
template <class T>
T atomicMax(T* to, T value) {
  const T before = *to;
  if (before < value) *to = value;
  return before;
}

// --- the block and the warp

inline void __syncthreads() {
  cuda_on_cpu::wait_for_block();
}
[[noreturn]] inline void __trap() {
  cuda_on_cpu::fail("__trap");
}

namespace cuda_on_cpu {

// The values that the lanes of a mask gave.
template <class T>
class Lanes {
 public:
  static_assert(std::is_trivially_copyable_v<T>);

  Lanes(const char* function, unsigned mask, const T& value)
      : function_(function), present_(meet(function, mask, &value, values_, sizeof value)) {}
  const T& operator[](int source) const {
    if (source < 0 || source >= 32 || !(present_ >> source & 1))
      fail(std::string(function_) + ": lane " + std::to_string(source) + " gave no value");
    return values_[source];
  }
  template <class Function>
  T reduce(const Function& function) const {
    T result = values_[std::countr_zero(present_)];
    for (unsigned rest = present_ & (present_ - 1); rest; rest &= rest - 1)
      result = function(result, values_[std::countr_zero(rest)]);
    return result;
  }
  unsigned where(const T& value) const {
    unsigned lanes = 0;
    for (int i = 0; i < 32; ++i)
      if (present_ >> i & 1 && values_[i] == value) lanes |= 1u << i;
    return lanes;
  }
  unsigned present() const { return present_; }

 private:
  const char* function_;
  T values_[32];
  unsigned present_;
};

}  // namespace cuda_on_cpu

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  cuda_on_cpu::Lanes<int>(__func__, mask, 0);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int source) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value)[source & 31];
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value)[cuda_on_cpu::lane() ^ lanes];
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, int lanes) {
  const cuda_on_cpu::Lanes<T> all(__func__, mask, value);
  const int source = cuda_on_cpu::lane() - lanes;
  return source < 0 ? value : all[source];
}
inline unsigned __ballot_sync(unsigned mask, bool value) {
  return cuda_on_cpu::Lanes<bool>(__func__, mask, value).where(true);
}
inline int __any_sync(unsigned mask, bool value) {
  return cuda_on_cpu::Lanes<bool>(__func__, mask, value).where(true) != 0;
}
inline int __all_sync(unsigned mask, bool value) {
  return cuda_on_cpu::Lanes<bool>(__func__, mask, value).where(false) == 0;
}
template <class T>
unsigned __match_any_sync(unsigned mask, T value) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value).where(value);
}
template <class T>
T __reduce_add_sync(unsigned mask, T value) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value).reduce([](T a, T b) { return a + b; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value).reduce([](T a, T b) { return min(a, b); });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value) {
  return cuda_on_cpu::Lanes<T>(__func__, mask, value).reduce([](T a, T b) { return max(a, b); });
}
