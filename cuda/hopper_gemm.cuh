// A product over groups of rows, and what other warps make of its results: c_e = a_e b_e in bf16
// with sums in f32, on the tensor cores of a Hopper GPU. The grid is one block per SM, in clusters
// of two. Per tile of 128 x 256 of c, in a block,
//   one thread has the copy engine bring stages of both operands,
//   two warpgroups multiply, 64 rows each, and leave the tile in shared memory, rounded to bf16,
//   three warps store it, as Op says, while the next tile is being multiplied.
// The blocks of a cluster compute tiles one above the other, and each loads half of what both need
// of b: without that, the second-level cache could not follow. Clusters take tiles in turn.
#pragma once

#include <cuda_bf16.h>

#include "cuda/group_tables.cuh"
#include "cuda/hopper.cuh"

namespace dstrain::hopper {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kDepth = 64, kStages = 3;  // a stage of a: 128 x 64, of b: 64 x 256
constexpr int kCluster = 2;
constexpr int kClusterRows = kCluster * kTileRows;
constexpr int kStoringWarps = 3, kMultiplyingWarps = 8;
constexpr int kThreads = (1 + kStoringWarps + kMultiplyingWarps) * 32;

// Of a group, kBand rows of clusters get all their columns before the next ones: what concurrent
// clusters read stays in the second-level cache.
constexpr int kBand = 8;

// Group e has the rows offsets[e] .. offsets[e + 1] of a and c; null: one group of all rows. What a
// tile has beyond its group is computed, too, and not stored. `depth` is the length of the sums.
struct Problem {
  const int32_t* offsets_E1;
  int groups, rows, depth, column_tiles;
};

// The tile's rows are the first kTileRows of row .. row_end; there may be none.
struct Tile {
  int group, row, row_end, column;
};

__device__ __forceinline__ int cluster_rows(int rows) {
  return (max(rows, 0) + kClusterRows - 1) / kClusterRows;
}

// The tiles of a block, in the same order for all of its threads.
class TileWalk {
 public:
  __device__ TileWalk(const Problem& problem, const GroupTables& tables)
      : problem_(problem), tables_(tables), tile_(static_cast<int>(blockIdx.x) / kCluster) {}

  __device__ bool next(Tile& tile) {
    if (tile_ >= tables_.first_tile[problem_.groups]) return false;
    while (tile_ >= tables_.first_tile[group_ + 1]) ++group_;
    const int begin = tables_.first_row[group_], end = tables_.first_row[group_ + 1];
    const int local = tile_ - tables_.first_tile[group_];
    const int band = local / (kBand * problem_.column_tiles) * kBand;
    const int in_band = local - band * problem_.column_tiles;
    const int height = min(kBand, cluster_rows(end - begin) - band);
    const int rank = static_cast<int>(blockIdx.x) % kCluster;
    tile = {group_, begin + (band + in_band % height) * kClusterRows + rank * kTileRows, end,
            in_band / height};
    tile_ += static_cast<int>(gridDim.x) / kCluster;
    return true;
  }

 private:
  const Problem& problem_;
  const GroupTables& tables_;
  int tile_, group_ = 0;
};

template <class Op>
struct SharedMemory {
  static constexpr uint32_t kBytesA = kTileRows * kDepth * 2, kBytesB = kTileColumns * kDepth * 2;

  alignas(1024) char a[kStages][kBytesA];
  alignas(1024) char b[kStages][kBytesB];
  alignas(1024) char staged[kTileRows * kTileColumns * 2];
  // Stages that are loaded, and that both blocks have used; halves of the tile, of 64 rows, that
  // are staged, and that are stored.
  uint64_t loaded[kStages], used[kStages], staged_half[2], stored_half[2];
  typename Op::Shared op;
  GroupTables tables;
};

// The staged tile has rows of 512 bytes whose pieces of 16 bytes are permuted, so that neither 8
// rows of a piece nor 8 pieces of a row share a bank.
__device__ __forceinline__ uint32_t staged_piece(uint32_t staged, int row, int piece) {
  return staged + static_cast<uint32_t>(row * (kTileColumns * 2) + ((piece ^ (row & 7)) << 4));
}
__device__ __forceinline__ uint32_t pack(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(both);
}

// By one thread.
template <class Op>
__device__ __forceinline__ void load_tiles(const CUtensorMap& a_map, const CUtensorMap& b_map,
                                           const Problem& problem,
                                           const typename Op::Params& params,
                                           SharedMemory<Op>& shared) {
  using Memory = SharedMemory<Op>;
  const int rank = static_cast<int>(rank_in_cluster());
  TileWalk walk(problem, shared.tables);
  Ring<kStages> ring;
  for (Tile tile; walk.next(tile);) {
    for (int k = 0; k < problem.depth; k += kDepth) {
      const uint32_t loaded = shared_address(&shared.loaded[ring.stage]);
      wait(shared_address(&shared.used[ring.stage]), ring.phase ^ 1);
      arrive_and_expect(loaded, Memory::kBytesA + Memory::kBytesB);
      copy_box(shared_address(shared.a[ring.stage]), &a_map, k, tile.row, 0, loaded);
      Op::load_b(params, &b_map, shared_address(shared.b[ring.stage]), loaded, tile, k, rank);
      ring.advance();
    }
  }
}

// By a warpgroup, for its half of the rows.
template <class Op>
__device__ __forceinline__ void multiply_tiles(const Problem& problem, SharedMemory<Op>& shared,
                                               int half) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  // From 16 elements of the sums to the next: 16 elements of a row, or 16 rows.
  constexpr uint32_t kStepA = 32, kStepB = Op::kAcross ? 16 * 128 : 32;
  const uint32_t staged_half = shared_address(&shared.staged_half[half]);
  const uint32_t stored_half = shared_address(&shared.stored_half[half]);
  const uint32_t staged = shared_address(shared.staged);
  const int row = half * (kTileRows / 2) + warp * 16 + lane % 16;
  const auto release = [&](int stage) {
    if (lane < kCluster) arrive_at(shared_address(&shared.used[stage]), lane);
  };
  TileWalk walk(problem, shared.tables);
  Ring<kStages> ring;
  uint32_t stored_phase = 1;
  float sums[kTileColumns / 2];
  for (Tile tile; walk.next(tile); stored_phase ^= 1) {
    int previous = -1;
    for (int k = 0; k < problem.depth; k += kDepth) {
      wait(shared_address(&shared.loaded[ring.stage]), ring.phase);
      const uint64_t a = describe_along(shared_address(shared.a[ring.stage]) +
                                        half * (SharedMemory<Op>::kBytesA / 2));
      const uint32_t b_address = shared_address(shared.b[ring.stage]);
      const uint64_t b =
          Op::kAcross ? describe_across(b_address, kDepth * 128) : describe_along(b_address);
      pin(sums);
      begin_products();
#pragma unroll
      for (int step = 0; step < kDepth / 16; ++step)
        multiply_64x256x16<Op::kAcross>(sums, advance(a, step * kStepA), advance(b, step * kStepB),
                                        k > 0 || step > 0);
      commit_products();
      pin(sums);
      wait_for_products<1>();
      if (previous >= 0) release(previous);
      previous = ring.stage;
      ring.advance();
    }
    wait_for_products<0>();
    pin(sums);
    release(previous);
    wait(stored_half, stored_phase);
#pragma unroll
    for (int j = 0; j < kTileColumns / 8; j += 2)
      store_matrices(staged_piece(staged, row, j + lane / 16), pack(sums[4 * j], sums[4 * j + 1]),
                     pack(sums[4 * j + 2], sums[4 * j + 3]), pack(sums[4 * j + 4], sums[4 * j + 5]),
                     pack(sums[4 * j + 6], sums[4 * j + 7]));
    __syncwarp();
    if (lane == 0) arrive(staged_half);
  }
}

// The staged tile, as a storing warp sees it.
template <class Op>
class StagedTile {
 public:
  __device__ StagedTile(SharedMemory<Op>& shared, uint32_t phase)
      : shared_(shared), staged_(shared_address(shared.staged)), phase_(phase) {}

  // Before pieces of this row and of smaller ones are read; in ascending order.
  __device__ __forceinline__ void await(int row) {
    while (row >= awaited_ * (kTileRows / 2)) {
      if (awaited_ > 0) give_back(awaited_ - 1);
      wait(shared_address(&shared_.staged_half[awaited_]), phase_);
      ++awaited_;
    }
  }
  __device__ __forceinline__ uint4 piece(int row, int piece) const {
    return load_piece(staged_piece(staged_, row, piece));
  }
  // After the last piece was read.
  __device__ __forceinline__ void finish() {
    await(kTileRows - 1);
    give_back(1);
  }

 private:
  __device__ __forceinline__ void give_back(int half) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) arrive(shared_address(&shared_.stored_half[half]));
  }

  SharedMemory<Op>& shared_;
  uint32_t staged_, phase_;
  int awaited_ = 0;  // halves
};

// By a warp.
template <class Op>
__device__ __forceinline__ void store_tiles(const Problem& problem,
                                            const typename Op::Params& params,
                                            SharedMemory<Op>& shared, int warp) {
  TileWalk walk(problem, shared.tables);
  typename Op::Storer storer(params, shared.op, warp);
  uint32_t phase = 0;
  for (Tile tile; walk.next(tile); phase ^= 1) {
    StagedTile<Op> staged(shared, phase);
    storer.store(tile, staged);
    staged.finish();
  }
}

// a is [rows, depth] in boxes of kDepth x kTileRows. Op has
//   Params, Shared: arguments, and what storing warps keep in shared memory
//   kAcross: whether a row of b lies across the sums
//   load_b(params, map, to, loaded, tile, k, rank): has the rank's half of a stage of b copied to
//       both blocks
//   Storer(params, shared, warp), with store(tile, staged tile): a warp's part of a tile
// A compilation for other GPUs leaves the kernel empty.
template <class Op>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_kernel(const __grid_constant__ CUtensorMap a_map,
                   const __grid_constant__ CUtensorMap b_map,
                   const __grid_constant__ Problem problem,
                   const __grid_constant__ typename Op::Params params) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<SharedMemory<Op>*>(raw);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    prefetch_map(&a_map);
    prefetch_map(&b_map);
    for (int i = 0; i < kStages; ++i) {
      initialize_barrier(shared_address(&shared.loaded[i]), 1);
      initialize_barrier(shared_address(&shared.used[i]), kMultiplyingWarps * kCluster);
    }
    for (int i = 0; i < 2; ++i) {
      initialize_barrier(shared_address(&shared.staged_half[i]), kMultiplyingWarps / 2);
      initialize_barrier(shared_address(&shared.stored_half[i]), kStoringWarps);
    }
    publish_barriers();
  }
  if (warp == 1) {
    fill_tables(
        problem.offsets_E1, problem.groups, problem.rows, shared.tables,
        [&](int begin, int end) { return cluster_rows(end - begin) * problem.column_tiles; });
  }
  __syncthreads();
  synchronize_cluster();

  if (warp == 0) {
    if (threadIdx.x == 0) load_tiles<Op>(a_map, b_map, problem, params, shared);
  } else if (warp <= kStoringWarps) {
    store_tiles<Op>(problem, params, shared, warp - 1);
  } else {
    multiply_tiles<Op>(problem, shared, warp / 4 - 1);
  }
  // The other block may still write here and arrive at barriers.
  __syncwarp();
  synchronize_cluster();
#endif
}

}  // namespace dstrain::hopper
