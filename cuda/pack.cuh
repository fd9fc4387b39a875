// Neighbours in memory that are moved together. Kernels that are written over Pack run with 16
// bytes an access where alignment allows it, and with kCount 1 where it does not.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/kernel.cuh"

namespace dstrain {

// The compiler takes an assignment of vectors apart where their elements were computed: hence the
// instruction.
__device__ __forceinline__ void store_word(uint4 word, uint4* to) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y), "r"(word.z),
                 "r"(word.w)
               : "memory");
}
__device__ __forceinline__ void store_word(uint2 word, uint2* to) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};"
               :
               : "l"(__cvta_generic_to_global(to)), "r"(word.x), "r"(word.y)
               : "memory");
}
template <class Word>
__device__ __forceinline__ void store_word(Word word, Word* to) {
  *to = word;
}

template <class T, int kCount>
struct alignas(sizeof(T) * kCount < 16 ? sizeof(T) * kCount : 16) Pack {
  static constexpr int kBytes = static_cast<int>(sizeof(T)) * kCount;
  using Word = std::conditional_t<
      kBytes % 16 == 0, uint4,
      std::conditional_t<
          kBytes % 8 == 0, uint2,
          std::conditional_t<kBytes % 4 == 0, uint32_t,
                             std::conditional_t<kBytes % 2 == 0, uint16_t, uint8_t>>>>;
  static constexpr int kWords = kBytes / static_cast<int>(sizeof(Word));

  T at[kCount];

  __device__ __forceinline__ static Pack load(const T* from) {
    Pack out;
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      reinterpret_cast<Word*>(out.at)[i] = reinterpret_cast<const Word*>(from)[i];
    return out;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int i = 0; i < kWords; ++i)
      store_word(reinterpret_cast<const Word*>(at)[i], reinterpret_cast<Word*>(to) + i);
  }
};

// Elements of F in 16 bytes.
template <class F>
inline constexpr int kVector = static_cast<int>(16 / sizeof(F));

}  // namespace dstrain
