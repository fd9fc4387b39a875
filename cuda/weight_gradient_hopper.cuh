// dW_e (+)= dy_e^T x_e for groups of rows on the tensor cores of a Hopper GPU: bf16 operands, sums
// and results in f32. The grid is one block per SM, in clusters of two. Per tile of 128 x 256 of
// dW, in a block,
//   one thread has the copy engine bring stages of both operands,
//   two warpgroups multiply, 64 rows each, and leave their halves in shared memory in turn,
//   one thread has the copy engine store the halves or add them to dW, while the next tile is being
//       multiplied. The second-level cache adds: no SM reads dW. An element belongs to one tile, so
//       that its sum has a fixed order.
// The blocks of a cluster compute tiles one above the other, and each loads half of what both need
// of x. Clusters take tiles in turn.
//
// Per 16 rows a tile needs 256 cycles of the tensor cores and 8 KiB from the second-level cache: 32
// bytes a cycle, as ffn_hopper.cuh. A tile of 128 x 192 would need 37, one of 128 x 128 48, to be
// staged as a whole. Of the 227 KiB of shared memory, stages take 3 x 48, the staged half 64, the
// tables 4. Staging a tile takes 2 x 512 cycles, of 24576 for 1536 rows, and storing it 2 x 1024 at
// 64 bytes a cycle. The second warpgroup has to wait for the first one's half to be stored;
// meanwhile the first one goes up to kStages ahead, so that one multiplies while the other stages.
//
// Legend: O rows and I columns of dW_e.
#pragma once

#include "cuda/group_tables.cuh"
#include "cuda/hopper.cuh"

namespace dstrain::hopper::weight_gradient {

constexpr int kTileRows = 128, kTileColumns = 256;
constexpr int kNarrowColumns = 128;  // of the last tile of a row, where these are enough
constexpr int kHalfRows = kTileRows / 2;
constexpr int kDepth = 64, kStages = 3;  // a stage of dy: 64 x 128, of x: 64 x 256
constexpr int kStep = 16;                // rows that an instruction sums over
constexpr int kCluster = 2;
constexpr int kClusterRows = kCluster * kTileRows;
constexpr int kMultiplyingWarps = 8;
constexpr int kThreads = (4 + kMultiplyingWarps) * 32;  // loading, storing, two idle warps

// A box of an operand has 64 columns of a stage, one of dW 32 columns of half a tile. Two of the
// latter make a strip, the unit in which a half is handed on.
constexpr int kBoxColumns = 64, kBoxBytes = kDepth * 128;
constexpr int kStoredBoxColumns = 32, kStoredBoxBytes = kHalfRows * 128;
constexpr int kStripColumns = 2 * kStoredBoxColumns, kStrips = kTileColumns / kStripColumns;

// Of a group, kBand rows of clusters get all their columns before the next ones: what concurrent
// clusters read stays in the second-level cache.
constexpr int kBand = 8;

// Group e has the rows offsets[e] .. offsets[e + 1] of dy and x; null: one group of all rows.
struct Problem {
  const int32_t* offsets_E1;
  int groups, rows, O, I;
  int cluster_tiles, column_tiles;  // down and across dW_e
  bool add;
};

// dW_e of the group from (o, i) on is the sum over the rows begin .. begin + rows.
struct Tile {
  int group, begin, rows, o, i;
};

// The tiles of a block, in the same order for all of its threads.
class TileWalk {
 public:
  __device__ TileWalk(const Problem& problem, const GroupTables& tables)
      : problem_(problem), tables_(tables), tile_(static_cast<int>(blockIdx.x) / kCluster) {}

  __device__ bool next(Tile& tile) {
    if (tile_ >= tables_.first_tile[problem_.groups]) return false;
    while (tile_ >= tables_.first_tile[group_ + 1]) ++group_;
    const int begin = tables_.first_row[group_];
    const int local = tile_ - tables_.first_tile[group_];
    const int band = local / (kBand * problem_.column_tiles) * kBand;
    const int in_band = local - band * problem_.column_tiles;
    const int height = min(kBand, problem_.cluster_tiles - band);
    const int rank = static_cast<int>(blockIdx.x) % kCluster;
    tile = {group_, begin, max(tables_.first_row[group_ + 1] - begin, 0),
            (band + in_band % height) * kClusterRows + rank * kTileRows,
            in_band / height * kTileColumns};
    tile_ += static_cast<int>(gridDim.x) / kCluster;
    return true;
  }

 private:
  const Problem& problem_;
  const GroupTables& tables_;
  int tile_, group_ = 0;
};

__device__ __forceinline__ bool is_narrow(const Problem& problem, const Tile& tile) {
  return problem.I - tile.i <= kNarrowColumns;
}

struct SharedMemory {
  alignas(1024) char dy[kStages][kTileRows / kBoxColumns][kBoxBytes];
  alignas(1024) char x[kStages][kTileColumns / kBoxColumns][kBoxBytes];
  alignas(1024) char staged[kTileColumns / kStoredBoxColumns][kStoredBoxBytes];  // half a tile
  // Stages that are loaded, and that both blocks have used; strips of the halves of a tile that are
  // staged, and that are stored.
  uint64_t loaded[kStages], used[kStages];
  uint64_t staged_strip[2][kStrips], stored_strip[2][kStrips];
  GroupTables tables;
};

// By one thread.
__device__ __forceinline__ void load_tiles(const CUtensorMap& dy_map, const CUtensorMap& x_map,
                                           const Problem& problem, SharedMemory& shared) {
  const int rank = static_cast<int>(rank_in_cluster());
  TileWalk walk(problem, shared.tables);
  Ring<kStages> ring;
  for (Tile tile; walk.next(tile);) {
    const int columns = is_narrow(problem, tile) ? kNarrowColumns : kTileColumns;
    const int own_boxes = columns / kBoxColumns / kCluster;
    for (int k = 0; k < tile.rows; k += kDepth) {
      const int row = tile.begin + k;
      const uint32_t loaded = shared_address(&shared.loaded[ring.stage]);
      wait(shared_address(&shared.used[ring.stage]), ring.phase ^ 1);
      arrive_and_expect(loaded, (kTileRows + columns) / kBoxColumns * kBoxBytes);
#pragma unroll
      for (int i = 0; i < kTileRows / kBoxColumns; ++i)
        copy_box(shared_address(shared.dy[ring.stage][i]), &dy_map, tile.o + i * kBoxColumns, row,
                 0, loaded);
      for (int i = rank * own_boxes; i < (rank + 1) * own_boxes; ++i)
        copy_box_to((1 << kCluster) - 1, shared_address(shared.x[ring.stage][i]), &x_map,
                    tile.i + i * kBoxColumns, row, 0, loaded);
      ring.advance();
    }
  }
}

// A warpgroup, which has half of a tile's rows.
class Multiplier {
 public:
  __device__ Multiplier(const Problem& problem, SharedMemory& shared, int half)
      : problem_(problem), shared_(shared), half_(half) {}

  __device__ __forceinline__ void run() {
    TileWalk walk(problem_, shared_.tables);
    uint32_t tile_phase = 0;
    for (Tile tile; walk.next(tile); tile_phase ^= 1) {
      float sums[kTileColumns / 2];
      if (is_narrow(problem_, tile))
        multiply<kNarrowColumns>(tile, sums);
      else
        multiply<kTileColumns>(tile, sums);
      stage(tile, tile_phase, sums);
    }
  }

 private:
  template <int kColumns>
  __device__ __forceinline__ void multiply(const Tile& tile, float (&sums)[kTileColumns / 2]) {
    int previous = -1;
    const int whole = tile.rows / kDepth * kDepth;
    for (int k = 0; k < whole; k += kDepth) {
      wait(shared_address(&shared_.loaded[ring_.stage]), ring_.phase);
      const uint64_t dy = describe_dy(), x = describe_x();
      pin(sums);
      begin_products();
#pragma unroll
      for (int step = 0; step < kDepth / kStep; ++step)
        multiply_step<kColumns>(sums, dy, x, step, k > 0 || step > 0);
      commit_products();
      pin(sums);
      wait_for_products<1>();
      if (previous >= 0) release(previous);
      previous = ring_.stage;
      ring_.advance();
    }
    if (whole < tile.rows) {
      wait(shared_address(&shared_.loaded[ring_.stage]), ring_.phase);
      clear_others_rows<kColumns>(tile.rows - whole);
      const uint64_t dy = describe_dy(), x = describe_x();
#pragma unroll 1
      for (int step = 0; step * kStep < tile.rows - whole; ++step) {
        pin(sums);
        begin_products();
        multiply_step<kColumns>(sums, dy, x, step, whole > 0 || step > 0);
        commit_products();
        pin(sums);
      }
      wait_for_products<0>();
      release(ring_.stage);
      ring_.advance();
    }
    wait_for_products<0>();
    pin(sums);
    if (previous >= 0) release(previous);
  }

  // What follows the group's rows in the last step is other groups', or no one's and maybe NaN.
  // Both warpgroups clear x without waiting for each other: with the same zeros.
  template <int kColumns>
  __device__ __forceinline__ void clear_others_rows(int rows) {
    const int others = -rows & (kStep - 1);
    if (others == 0) return;
    static_assert(kStep * 8 == 128);  // a thread per piece of 16 bytes
    const int thread = threadIdx.x % 128, row = thread / 8;
    if (row < others) {
      const uint32_t piece = static_cast<uint32_t>((rows + row) * 128 + thread % 8 * 16);
      store_zeros(shared_address(shared_.dy[ring_.stage][half_]) + piece);
#pragma unroll
      for (int i = 0; i < kColumns / kBoxColumns; ++i)
        store_zeros(shared_address(shared_.x[ring_.stage][i]) + piece);
    }
    publish_accesses();
    synchronize_warpgroup(1 + half_);
  }

  __device__ __forceinline__ uint64_t describe_dy() const {
    return describe_across(shared_address(shared_.dy[ring_.stage][half_]), kBoxBytes);
  }
  __device__ __forceinline__ uint64_t describe_x() const {
    return describe_across(shared_address(shared_.x[ring_.stage]), kBoxBytes);
  }
  template <int kColumns>
  __device__ __forceinline__ static void multiply_step(float (&sums)[kTileColumns / 2], uint64_t dy,
                                                       uint64_t x, int step, bool add) {
    static_assert(kTileColumns == 256 && kNarrowColumns == 128);
    const uint32_t bytes = step * kStep * 128;
    if constexpr (kColumns == kTileColumns)
      multiply_64x256x16<true, true>(sums, advance(dy, bytes), advance(x, bytes), add);
    else
      multiply_64x128x16<true, true>(sums, advance(dy, bytes), advance(x, bytes), add);
  }
  __device__ __forceinline__ void release(int stage) const {
    const uint32_t lane = threadIdx.x % 32;
    if (lane < kCluster) arrive_at(shared_address(&shared_.used[stage]), lane);
  }

  // Leaves the sums where the copy engine stores them from. The halves take turns: each waits until
  // the other one, of this tile or of the one before, is stored.
  __device__ __forceinline__ void stage(const Tile& tile, uint32_t tile_phase,
                                        const float (&sums)[kTileColumns / 2]) const {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, g = lane / 4, t = lane % 4;
    // A box has rows of 128 bytes, whose pieces of 16 bytes are permuted by row % 8. A store of 8
    // bytes per lane is done for half a warp, four rows, at a time. For these not to meet in the
    // same banks, lanes of odd rows exchange columns c and c + 16.
    const bool odd = g % 2;
    const int piece = 2 * (g / 2 ^ 2 * (g % 2)) + (t / 2 ^ g % 2);
    const uint32_t to = shared_address(shared_.staged) +
                        static_cast<uint32_t>((16 * warp + g) * 128 + piece * 16 + t % 2 * 8);
    const uint32_t phase = half_ == 0 ? tile_phase ^ 1 : tile_phase;
#pragma unroll
    for (int strip = 0; strip < kStrips; ++strip) {
      wait(shared_address(&shared_.stored_strip[1 - half_][strip]), phase);
      if (tile.i + strip * kStripColumns < problem_.I) {
#pragma unroll
        for (int box = 2 * strip; box < 2 * strip + 2; ++box) {
          if (tile.rows == 0) {
            const uint32_t first = shared_address(shared_.staged[box]) + threadIdx.x % 128 * 16;
            for (uint32_t at = 0; at < kStoredBoxBytes; at += 128 * 16) store_zeros(first + at);
            continue;
          }
#pragma unroll
          for (int i = 0; i < 4; ++i) {  // 8 columns of the first or last 16 of 8 rows of the box
            const float* const one = sums + 16 * box + 4 * (i % 2) + 2 * (i / 2);
            const float* const other = one + 8;
            const uint32_t at = box * kStoredBoxBytes + i / 2 * 8 * 128;
            store_pair((to ^ (i % 2) << 5) + at, odd ? other[0] : one[0], odd ? other[1] : one[1]);
            store_pair((to ^ (i % 2 + 2) << 5) + at, odd ? one[0] : other[0],
                       odd ? one[1] : other[1]);
          }
        }
      }
      publish_accesses();
      // All lanes arrive: of one that does for its warp, racecheck does not see that the others are
      // done.
      arrive(shared_address(&shared_.staged_strip[half_][strip]));
    }
  }

  const Problem& problem_;
  SharedMemory& shared_;
  const int half_;
  Ring<kStages> ring_;
};

// By one thread.
__device__ __forceinline__ void store_tiles(const CUtensorMap& dweight_map, const Problem& problem,
                                            SharedMemory& shared) {
  const uint64_t policy = evict_first();
  TileWalk walk(problem, shared.tables);
  uint32_t phase = 0;
  for (Tile tile; walk.next(tile); phase ^= 1) {
#pragma unroll 1
    for (int half = 0; half < 2; ++half) {
      const int o = tile.o + half * kHalfRows;
      const auto give_back = [&](int strip) {
        arrive(shared_address(&shared.stored_strip[half][strip]));
      };
      for (int strip = 0; strip < kStrips; ++strip) {
        wait(shared_address(&shared.staged_strip[half][strip]), phase);
        for (int box = 2 * strip; box < 2 * strip + 2; ++box) {
          const int i = tile.i + box * kStoredBoxColumns;
          if (o >= problem.O || i >= problem.I) continue;
          const uint32_t from = shared_address(shared.staged[box]);
          if (problem.add)
            add_box(&dweight_map, i, o, tile.group, from, policy);
          else
            store_box(&dweight_map, i, o, tile.group, from, policy);
        }
        commit_boxes();
        if (strip > 0) {
          wait_for_boxes<1>();
          give_back(strip - 1);
        }
      }
      wait_for_boxes<0>();
      give_back(kStrips - 1);
    }
  }
}

// dy is [R, O] and x is [R, I] in boxes of kBoxColumns x kDepth rows, dweight is [E, O, I] in boxes
// of kStoredBoxColumns x kHalfRows. A compilation for other GPUs leaves the kernel empty.
__global__ void __launch_bounds__(kThreads, 1)
    weight_gradient_kernel(const __grid_constant__ CUtensorMap dy_map,
                           const __grid_constant__ CUtensorMap x_map,
                           const __grid_constant__ CUtensorMap dweight_map,
                           const __grid_constant__ Problem problem) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  extern __shared__ __align__(1024) char raw[];
  auto& shared = *reinterpret_cast<SharedMemory*>(raw);
  const int warp = threadIdx.x / 32;
  if (threadIdx.x == 0) {
    prefetch_map(&dy_map);
    prefetch_map(&x_map);
    prefetch_map(&dweight_map);
    for (int i = 0; i < kStages; ++i) {
      initialize_barrier(shared_address(&shared.loaded[i]), 1);
      initialize_barrier(shared_address(&shared.used[i]), kMultiplyingWarps * kCluster);
    }
    for (int half = 0; half < 2; ++half) {
      for (int strip = 0; strip < kStrips; ++strip) {
        initialize_barrier(shared_address(&shared.staged_strip[half][strip]),
                           kMultiplyingWarps / 2 * 32);
        initialize_barrier(shared_address(&shared.stored_strip[half][strip]), 1);
      }
    }
    publish_barriers();
  }
  if (warp == 1) {
    // Nothing is to be added for groups without rows.
    fill_tables(problem.offsets_E1, problem.groups, problem.rows, shared.tables,
                [&](int begin, int end) {
                  const bool wanted = end > begin || !problem.add;
                  return wanted ? problem.cluster_tiles * problem.column_tiles : 0;
                });
  }
  __syncthreads();
  synchronize_cluster();

  if (warp == 0) {
    if (threadIdx.x == 0) load_tiles(dy_map, x_map, problem, shared);
  } else if (warp == 1) {
    if (threadIdx.x == 32) store_tiles(dweight_map, problem, shared);
  } else if (warp >= 4) {
    Multiplier(problem, shared, warp / 4 - 1).run();
  }
  // The other block may still write here and arrive at barriers.
  __syncwarp();
  synchronize_cluster();
#endif
}

}  // namespace dstrain::hopper::weight_gradient
