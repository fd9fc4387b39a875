// Instructions of a warp that C++ has no words for (PTX ISA, from compute capability 8.0).
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace dstrain {

// Four 8 x 8 matrices of bf16 from shared memory: lane 8 i + r names row r of matrix i (16 bytes,
// aligned to them). Lane l gets the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each; with
// `trans`, of column l / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&to)[4], const __nv_bfloat16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}
__device__ __forceinline__ void load_matrices_trans(uint32_t (&to)[4], const __nv_bfloat16* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(address)
               : "memory");
}

// c[16,8] += a[16,16] b[16,8] with f32 sums. With g = lane / 4 and t = lane % 4, c holds the
// elements (g, 2t), (g, 2t+1), (g+8, 2t), (g+8, 2t+1); each word of a and b holds two neighbours
// along the dim that is summed over: a the rows g, g+8, g, g+8 at 2t, 2t, 2t+8, 2t+8, and b the
// column g at 2t, 2t+8.
__device__ __forceinline__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                             uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Begins to copy 16 bytes to shared memory, or to clear them there; both sides are aligned to 16
// bytes.
__device__ __forceinline__ void copy_async(void* to, const void* from, bool clear) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  const uint32_t bytes = clear ? 0 : 16;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void commit_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// This thread's copies have arrived, but for the last kGroups that were committed.
template <int kGroups>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

}  // namespace dstrain
