// Rows on their way to shared memory while a block computes others.
#pragma once

#include "cuda/pack.cuh"
#include "cuda/warp_instructions.cuh"

namespace dstrain {

// 16 bytes of a row. They stay as they were loaded, and elements are taken out, a word's at a time,
// where they are used: kept as elements, each bf16 would have a register.
template <class F>
struct RowVector {
  static constexpr int kWords = 4;
  static constexpr int kOfWord = 4 / sizeof(F);
  using Elements = Pack<float, kOfWord>;

  Pack<uint32_t, kWords> words;

  __device__ __forceinline__ static RowVector load(const F* from) {
    return {Pack<uint32_t, kWords>::load(reinterpret_cast<const uint32_t*>(from))};
  }
  __device__ __forceinline__ void store(F* to) const {
    words.store(reinterpret_cast<uint32_t*>(to));
  }
  // Keeps the compiler from holding elements, in registers of their own, from here to later uses.
  __device__ __forceinline__ void forget_elements() {
#pragma unroll
    for (int w = 0; w < kWords; ++w) asm volatile("" : "+r"(words.at[w]));
  }
  __device__ __forceinline__ Elements get(int w) const {
    const uint32_t word = words.at[w];
    if constexpr (kOfWord == 1) {
      return {{__uint_as_float(word)}};
    } else {
      return {{__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)}};
    }
  }
  __device__ __forceinline__ void set(int w, const Elements& x) {
    if constexpr (kOfWord == 1) {
      words.at[w] = __float_as_uint(x.at[0]);
    } else {
      const __nv_bfloat162 pair = __floats2bfloat162_rn(x.at[0], x.at[1]);
      words.at[w] = reinterpret_cast<const uint32_t&>(pair);
    }
  }
};

// A block's dynamic shared memory as [kStages][kOperands] rows: blockDim.x threads for each of
// blockDim.y rows at a time, kPacks vectors of a row a thread, blockDim.x apart. A thread reads the
// vectors that it copied itself, so that it waits for its own copies only.
template <class F, int kPacks, int kOperands, int stages>
class RowRing {
 public:
  static constexpr int kStages = stages;
  static constexpr int kSize = kVector<F>;

  static constexpr int bytes(int threads) { return kStages * kOperands * kPacks * 16 * threads; }

  __device__ explicit RowRing(int64_t columns)
      : columns_(static_cast<int>(columns)),
        threads_(static_cast<int>(blockDim.x * blockDim.y)),
        at_(memory() + threadIdx.y * blockDim.x + threadIdx.x) {}

  // The first column of this thread's vector p, and whether rows reach it.
  __device__ static int column(int p) {
    return static_cast<int>(threadIdx.x + p * blockDim.x) * kSize;
  }
  __device__ bool has(int p) const { return column(p) < columns_; }

  // Begins to copy an operand's row; a stage's copies end with commit_copies(), also if there were
  // none.
  __device__ __forceinline__ void fetch(int stage, int operand, const F* row) const {
#pragma unroll
    for (int p = 0; p < kPacks; ++p)
      if (has(p)) copy_async(at(stage, operand, p), row + column(p), /*clear=*/false);
  }
  // The oldest stage has arrived.
  __device__ __forceinline__ void wait() const {
    wait_for_copies<kStages - 1>();
  }
  __device__ __forceinline__ RowVector<F> get(int stage, int operand, int p) const {
    const uint4 word = *at(stage, operand, p);
    return {{{word.x, word.y, word.z, word.w}}};
  }

  // For other uses once no thread needs the rows any more.
  __device__ static uint4* memory() {
    extern __shared__ uint4 row_ring_memory[];
    return row_ring_memory;
  }

 private:
  __device__ uint4* at(int stage, int operand, int p) const {
    return at_ + ((stage * kOperands + operand) * kPacks + p) * threads_;
  }

  int columns_, threads_;
  uint4* at_;
};

}  // namespace dstrain
