// SwiGLU at the end of the grouped product of hopper_gemm.cuh.
//   h = silu(gate) * up * w,  silu(g) = g s, s = 1 / (1 + exp(-g)),  silu'(g) = s (1 + g (1 - s))
// Legend: R rows of all groups, I intermediate size, w row weight.
#pragma once

#include "cuda/hopper_gemm.cuh"
#include "cuda/kernel.cuh"

namespace dstrain::hopper {

// 0 where exp(-x) overflows.
__device__ __forceinline__ float sigmoid(float x) {
  float exp, inverse;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(exp) : "f"(x * -1.4426950408889634f));
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(1.f + exp));
  return inverse;
}

// Eight neighbours in f32.
struct Eight {
  float at[8];
  __device__ __forceinline__ static Eight of(uint4 piece) {
    const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
    Eight out;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      out.at[2 * i] = __uint_as_float(words[i] << 16);
      out.at[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
    return out;
  }
  __device__ __forceinline__ void store(bf16* to) const {
    __stcs(reinterpret_cast<uint4*>(to),
           uint4{pack(at[0], at[1]), pack(at[2], at[3]), pack(at[4], at[5]), pack(at[6], at[7])});
  }
};

// A warp stores pairs of rows of a tile: first, first + 1, first + kPairStep, ...
constexpr int kPairStep = 2 * kStoringWarps;

// The weights of a warp's pairs; 1 where there are none.
class PairWeights {
 public:
  __device__ PairWeights(const float* row_weight_R, int64_t tile_row, int first, int rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = first + static_cast<int>(threadIdx.x) % 32 * kPairStep + i;
      if (row_weight_R && row < rows) of_lane_[i] = row_weight_R[tile_row + row];
    }
  }
  // By whole warps.
  __device__ __forceinline__ void get(int pair, float (&weights)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[i] = __shfl_sync(0xffffffffu, of_lane_[i], pair);
  }

 private:
  static_assert(kTileRows <= 32 * kPairStep);
  float of_lane_[2] = {1, 1};  // lane l: of pair l
};

// ffn_up. The columns of a tile are 128 of gate and the same 128 of up.
struct Up {
  struct Params {
    bf16* gate_up_R2I;
    bf16* h_RI;
    const float* row_weight_R;
    int64_t gate_up_stride, h_stride;
    int I;
  };
  struct Shared {};
  static constexpr bool kAcross = false;
  static constexpr int kColumns = kTileColumns / 2;
  static constexpr int kBoxRows = kColumns;

  // One rank loads gate, the other one up. Tiles of gate that hang over its end get rows of up.
  __device__ __forceinline__ static void load_b(const Params& params, const CUtensorMap* map,
                                                uint32_t to, uint32_t loaded, const Tile& tile,
                                                int k, int rank) {
    static_assert(kCluster == 2);
    copy_box_to(0b11, to + rank * kBoxRows * 128, map, k, rank * params.I + tile.column * kColumns,
                tile.group, loaded);
  }

  class Storer {
   public:
    __device__ Storer(const Params& params, Shared&, int warp) : p_(params), first_(2 * warp) {}

    // Half a warp has a row.
    template <class Staged>
    __device__ __forceinline__ void store(const Tile& tile, Staged& staged) {
      const int lane = threadIdx.x % 32, piece = lane % 16;
      const int rows = min(tile.row_end - tile.row, kTileRows);
      const int column = tile.column * kColumns + piece * 8;
      bf16* const gate_up = p_.gate_up_R2I + tile.row * p_.gate_up_stride + column;
      bf16* const h = p_.h_RI + tile.row * p_.h_stride + column;
      const PairWeights weights(p_.row_weight_R, tile.row, first_, rows);
      for (int pair = 0; first_ + pair * kPairStep < rows; ++pair) {
        const int row0 = first_ + pair * kPairStep, row = row0 + lane / 16;
        float both[2];
        weights.get(pair, both);
        const float weight = lane < 16 ? both[0] : both[1];
        staged.await(row0);
        if (row >= rows || column >= p_.I) continue;
        const uint4 gate_piece = staged.piece(row, piece), up_piece = staged.piece(row, 16 + piece);
        const Eight gate = Eight::of(gate_piece), up = Eight::of(up_piece);
        Eight out;
#pragma unroll
        for (int j = 0; j < 8; ++j)
          out.at[j] = gate.at[j] * sigmoid(gate.at[j]) * up.at[j] * weight;
        __stcs(reinterpret_cast<uint4*>(gate_up + row * p_.gate_up_stride), gate_piece);
        __stcs(reinterpret_cast<uint4*>(gate_up + row * p_.gate_up_stride + p_.I), up_piece);
        out.store(h + row * p_.h_stride);
      }
    }

   private:
    const Params& p_;
    const int first_;
  };
};

// ffn_down_backward_input. The tile holds dh; gate and up come from memory.
struct Down {
  struct Params {
    const bf16* gate_up_R2I;
    bf16* dgate_up_R2I;
    bf16* h_RI;
    const float* row_weight_R;
    float* drow_weight_NR;  // partial sums of the N columns of tiles; may be null
    int64_t gate_up_stride, dgate_up_stride, h_stride, R;
    int I;
  };
  static constexpr bool kAcross = true;
  static constexpr int kColumns = kTileColumns;
  static constexpr int kBoxRows = kDepth / kCluster;
  static constexpr int kAhead = 2;  // pairs of rows
  // Pairs of rows of gate and up on their way. A lane reads what it copied itself.
  struct alignas(16) Shared {
    uint4 gate_up[kStoringWarps][kAhead][2][2][kColumns / 8];
  };

  // Each rank loads half of the stage's depth, in boxes of 64 columns.
  __device__ __forceinline__ static void load_b(const Params&, const CUtensorMap* map, uint32_t to,
                                                uint32_t loaded, const Tile& tile, int k,
                                                int rank) {
#pragma unroll
    for (int i = 0; i < kColumns / 64; ++i)
      copy_box_to(0b11, to + (i * kDepth + rank * kBoxRows) * 128, map,
                  tile.column * kColumns + i * 64, k + rank * kBoxRows, tile.group, loaded);
  }

  class Storer {
   public:
    __device__ Storer(const Params& params, Shared& shared, int warp)
        : p_(params),
          first_(2 * warp),
          gate_up_(shared_address(&shared.gate_up[warp][0][0][0][threadIdx.x % 32])) {}

    template <class Staged>
    __device__ __forceinline__ void store(const Tile& tile, Staged& staged) {
      const int lane = threadIdx.x % 32;
      const int rows = min(tile.row_end - tile.row, kTileRows);
      const int column = tile.column * kColumns + lane * 8;
      const bool inside = column < p_.I;
      const int64_t row0 = tile.row + first_;
      const bf16* gate_up = p_.gate_up_R2I + row0 * p_.gate_up_stride + column;
      bf16* dgate_up = p_.dgate_up_R2I + row0 * p_.dgate_up_stride + column;
      bf16* h = p_.h_RI + row0 * p_.h_stride + column;
      const auto load = [&](int row, int slot) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          if (row + i < rows && inside) {
            copy_piece(slot_of(slot, i), gate_up + i * p_.gate_up_stride, policy_);
            copy_piece(slot_of(slot, i) + kRowBytes, gate_up + i * p_.gate_up_stride + p_.I,
                       policy_);
          }
        }
        commit_pieces();
        gate_up += kPairStep * p_.gate_up_stride;
      };
#pragma unroll
      for (int slot = 0; slot < kAhead; ++slot) load(first_ + slot * kPairStep, slot);
      const PairWeights weights(p_.row_weight_R, tile.row, first_, rows);
      int row = first_;
      for (int pair0 = 0; row < rows; pair0 += kAhead) {
#pragma unroll
        for (int slot = 0; slot < kAhead; ++slot) {
          if (row >= rows) break;
          Pair pair;
          weights.get(pair0 + slot, pair.weight);
          staged.await(row);
          wait_for_pieces<kAhead - 1>();
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            pair.gate[i] = load_piece(slot_of(slot, i));
            pair.up[i] = load_piece(slot_of(slot, i) + kRowBytes);
            pair.dh[i] = staged.piece(row + i, lane);
          }
          load(row + kAhead * kPairStep, slot);
          pair.compute();
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (row + i >= rows || !inside) continue;
            pair.dgate[i].store(dgate_up + i * p_.dgate_up_stride);
            pair.dup[i].store(dgate_up + i * p_.dgate_up_stride + p_.I);
            pair.h[i].store(h + i * p_.h_stride);
          }
          if (p_.drow_weight_NR) {
#pragma unroll
            for (int i = 0; i < 2; ++i) pair.sum[i] = warp_sum(inside ? pair.sum[i] : 0.f);
            if (lane < 2 && row + lane < rows)
              p_.drow_weight_NR[tile.column * p_.R + tile.row + row + lane] =
                  lane == 0 ? pair.sum[0] : pair.sum[1];
          }
          dgate_up += kPairStep * p_.dgate_up_stride;
          h += kPairStep * p_.h_stride;
          row += kPairStep;
        }
      }
    }

   private:
    static constexpr uint32_t kRowBytes = kColumns * sizeof(bf16);

    struct Pair {
      uint4 gate[2], up[2], dh[2];
      float weight[2], sum[2] = {};
      Eight dgate[2], dup[2], h[2];

      __device__ __forceinline__ void compute() {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const Eight g = Eight::of(gate[i]), u = Eight::of(up[i]), d = Eight::of(dh[i]);
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float s = sigmoid(g.at[j]), activated = g.at[j] * s;
            const float product = activated * u.at[j], dproduct = d.at[j] * weight[i];
            sum[i] += d.at[j] * product;
            h[i].at[j] = product * weight[i];
            dup[i].at[j] = dproduct * activated;
            dgate[i].at[j] = dproduct * u.at[j] * (s + activated * (1.f - s));
          }
        }
      }
    };

    // Where this lane's pieces of gate are; those of up follow a row later.
    __device__ __forceinline__ uint32_t slot_of(int slot, int i) const {
      return gate_up_ + (2 * slot + i) * 2 * kRowBytes;
    }

    const Params& p_;
    const int first_;
    const uint32_t gate_up_;
    const uint64_t policy_ = evict_first();
  };
};

}  // namespace dstrain::hopper
