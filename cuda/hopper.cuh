// Hopper's instructions (sm_90a, PTX ISA 8.0) that C++ has no words for: barriers in shared memory,
// copies of boxes of a tensor by the copy engine, products by a warpgroup. Addresses of shared
// memory are 32-bit and of the block's own window.
#pragma once

#include <cuda.h>

#include <cstdint>

namespace dstrain::hopper {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// --- clusters -----------------------------------------------------------------------------------
__device__ __forceinline__ uint32_t rank_in_cluster() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
// Waits for all threads of the cluster.
__device__ __forceinline__ void synchronize_cluster() {
  asm volatile(
      "barrier.cluster.arrive.release;\n"
      "barrier.cluster.wait.acquire;" ::
          : "memory");
}

// Waits for all threads of a warpgroup. `barrier` is one of the block's 16; __syncthreads() has 0.
__device__ __forceinline__ void synchronize_warpgroup(int barrier) {
  asm volatile("bar.sync %0, 128;" ::"r"(barrier) : "memory");
}

// --- barriers in shared memory ------------------------------------------------------------------
// A phase ends when `count` threads have arrived and all expected bytes are there. Phases are
// numbered from 0; waiting names the parity of a phase.
__device__ __forceinline__ void initialize_barrier(uint32_t barrier, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers visible to the cluster and to the copy engine.
__device__ __forceinline__ void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
// At the barrier of another block of the cluster, at the same address there. What this thread wrote
// before need not be visible there: a fence that makes it so waits for all memory of the GPU.
__device__ __forceinline__ void arrive_at(uint32_t barrier, uint32_t rank) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.relaxed.cluster.shared::cluster.b64 _, [remote];\n"
      "}" ::"r"(barrier),
      "r"(rank)
      : "memory");
}
__device__ __forceinline__ void arrive_and_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ bool has_ended(uint32_t barrier, uint32_t parity) {
  uint32_t ended;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ended)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ended;
}
// With DSTRAIN_BOUNDED_WAITS a wait without end becomes an error.
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
#ifdef DSTRAIN_BOUNDED_WAITS
  for (int i = 0; !has_ended(barrier, parity); ++i)
    if (i > 1 << 22) __trap();
#else
  while (!has_ended(barrier, parity)) {
  }
#endif
}

// A position in a ring of stages, and how often it went round.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t phase = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      phase ^= 1;
    }
  }
};

// --- the copy engine ----------------------------------------------------------------------------
__device__ __forceinline__ void prefetch_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}
// Copies the map's box that begins at element (x, y, z); what lies outside of the tensor becomes
// zeros. All of the box's bytes are reported to the barrier.
__device__ __forceinline__ void copy_box(uint32_t to, const CUtensorMap* map, int x, int y, int z,
                                         uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4}], [%5];" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier)
      : "memory");
}
// The same to every block of the cluster that has its bit in `blocks`, at the same addresses there.
__device__ __forceinline__ void copy_box_to(uint16_t blocks, uint32_t to, const CUtensorMap* map,
                                            int x, int y, int z, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(to),
      "l"(map), "r"(x), "r"(y), "r"(z), "r"(barrier), "h"(blocks)
      : "memory");
}

// This thread's accesses to shared memory come before what the copy engine and products do after
// the barrier that follows.
__device__ __forceinline__ void publish_accesses() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
// Copies a box of shared memory to the tensor; what lies outside of it is left out.
__device__ __forceinline__ void store_box(const CUtensorMap* map, int x, int y, int z,
                                          uint32_t from, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.global.shared::cta.bulk_group.L2::cache_hint "
      "[%0, {%1, %2, %3}], [%4], %5;" ::"l"(map),
      "r"(x), "r"(y), "r"(z), "r"(from), "l"(policy)
      : "memory");
}
// The same, added to what the tensor holds. The second-level cache adds.
__device__ __forceinline__ void add_box(const CUtensorMap* map, int x, int y, int z, uint32_t from,
                                        uint64_t policy) {
  asm volatile(
      "cp.reduce.async.bulk.tensor.3d.global.shared::cta.add.bulk_group.L2::cache_hint "
      "[%0, {%1, %2, %3}], [%4], %5;" ::"l"(map),
      "r"(x), "r"(y), "r"(z), "r"(from), "l"(policy)
      : "memory");
}
// Closes a group of this thread's boxes to the tensor.
__device__ __forceinline__ void commit_boxes() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}
// Their shared memory has been read, but for the last kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_boxes() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// --- a thread's own accesses --------------------------------------------------------------------
// For data that passes through the second-level cache once.
__device__ __forceinline__ uint64_t evict_first() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
  return policy;
}
// Begins to copy 16 bytes to shared memory.
__device__ __forceinline__ void copy_piece(uint32_t to, const void* from, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "l"(policy)
               : "memory");
}
// Closes a group of copies.
__device__ __forceinline__ void commit_pieces() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// This thread's copies have arrived, but for its last kGroups groups.
template <int kGroups>
__device__ __forceinline__ void wait_for_pieces() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}
__device__ __forceinline__ uint4 load_piece(uint32_t from) {
  uint4 piece;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(piece.x), "=r"(piece.y), "=r"(piece.z), "=r"(piece.w)
               : "r"(from)
               : "memory");
  return piece;
}
__device__ __forceinline__ void store_zeros(uint32_t piece) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %1, %1, %1};" ::"r"(piece), "r"(0) : "memory");
}
__device__ __forceinline__ void store_pair(uint32_t to, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(to), "f"(low), "f"(high) : "memory");
}
// Four 8 x 8 matrices of bf16 to shared memory: lane 8 i + r names row r of matrix i (16 bytes).
// Lane l has the elements 2 (l % 4) and 2 (l % 4) + 1 of row l / 4 of each.
__device__ __forceinline__ void store_matrices(uint32_t row, uint32_t m0, uint32_t m1, uint32_t m2,
                                               uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// --- products by a warpgroup --------------------------------------------------------------------
// Orders the warpgroup's accesses to registers before the products that follow.
__device__ __forceinline__ void begin_products() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Waits for all products but for the last kGroups that were committed.
template <int kGroups>
__device__ __forceinline__ void wait_for_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}
// Keeps the compiler from moving accesses to the sums over this point.
template <int kCount>
__device__ __forceinline__ void pin(float (&sums)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// A matrix in shared memory as the copy engine stores it: rows of 128 bytes, whose pieces of 16
// bytes are permuted with a period of 8 rows. `address` is that of the first element.
// Summed over along the rows: neighbours along the sum lie in a row; rows follow each other.
__device__ __forceinline__ uint64_t describe_along(uint32_t address) {
  constexpr uint64_t kPattern = uint64_t{1} << 62, kEightRows = 8 * 128;
  return kPattern | (kEightRows >> 4) << 32 | (address & 0x3ffff) >> 4;
}
// Summed over across the rows: a row has 64 of the other dim, the next 64 lie `column_bytes` on.
__device__ __forceinline__ uint64_t describe_across(uint32_t address, uint32_t column_bytes) {
  return describe_along(address) | uint64_t{column_bytes >> 4} << 16;
}
// Advances a description.
__device__ __forceinline__ uint64_t advance(uint64_t matrix, uint32_t bytes) {
  return matrix + (bytes >> 4);
}

// sums[64,256] (+)= a[64,16] b[256,16]^T in bf16; b[16,256] lies across the sum (kAcross), or so
// does a[16,64] (kAcrossA). Of the sums, warp w has the rows 16 w .. 16 w + 15. With g = lane / 4
// and t = lane % 4, sums[4 j .. 4 j + 3] are the elements (g, c), (g, c+1), (g+8, c), (g+8, c+1)
// with c = 8 j + 2 t.
#define DSTRAIN_SUMS8(i)                                                                     \
  "+f"(sums[i]), "+f"(sums[i + 1]), "+f"(sums[i + 2]), "+f"(sums[i + 3]), "+f"(sums[i + 4]), \
      "+f"(sums[i + 5]), "+f"(sums[i + 6]), "+f"(sums[i + 7])
#define DSTRAIN_SUMS32(i) \
  DSTRAIN_SUMS8(i), DSTRAIN_SUMS8(i + 8), DSTRAIN_SUMS8(i + 16), DSTRAIN_SUMS8(i + 24)
template <bool kAcross, bool kAcrossA = false>
__device__ __forceinline__ void multiply_64x256x16(float (&sums)[128], uint64_t a, uint64_t b,
                                                   bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %130, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, %65, %66, %67, %68, %69, "
      "%70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, %83, %84, %85, %86, "
      "%87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, "
      "%103, %104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, "
      "%117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127}, "
      "%128, %129, p, 1, 1, %131, %132;\n"
      "}"
      : DSTRAIN_SUMS32(0), DSTRAIN_SUMS32(32), DSTRAIN_SUMS32(64), DSTRAIN_SUMS32(96)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kAcrossA)),
        "n"(static_cast<int>(kAcross)));
}
// The same for 128 columns: the first 64 sums.
template <bool kAcross, bool kAcrossA = false>
__device__ __forceinline__ void multiply_64x128x16(float (&sums)[128], uint64_t a, uint64_t b,
                                                   bool add) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, %67, %68;\n"
      "}"
      : DSTRAIN_SUMS32(0), DSTRAIN_SUMS32(32)
      : "l"(a), "l"(b), "r"(static_cast<int>(add)), "n"(static_cast<int>(kAcrossA)),
        "n"(static_cast<int>(kAcross)));
}
#undef DSTRAIN_SUMS32
#undef DSTRAIN_SUMS8

}  // namespace dstrain::hopper
