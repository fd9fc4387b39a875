// Where the groups of a grouped product begin, in shared memory.
#pragma once

#include <cstdint>

#include "cuda/scan.cuh"

namespace dstrain::hopper {

constexpr int kMaxGroups = 512;

// In tiles of clusters and in rows; the last entry in use is that of the end.
struct GroupTables {
  int first_tile[kMaxGroups + 1];
  int first_row[kMaxGroups + 1];
};

// By one warp. Group e has the rows offsets_E1[e] .. offsets_E1[e + 1]; null: one group of all
// rows. tiles_of(begin, end) is how many tiles a group of these rows has.
template <class TilesOf>
__device__ __forceinline__ void fill_tables(const int32_t* offsets_E1, int groups, int rows,
                                            GroupTables& tables, const TilesOf& tiles_of) {
  for (int e = static_cast<int>(threadIdx.x % 32); e <= groups; e += 32) {
    const int begin = offsets_E1 ? offsets_E1[e] : e == 0 ? 0 : rows;
    const int end = e == groups ? begin : offsets_E1 ? offsets_E1[e + 1] : rows;
    tables.first_row[e] = begin;
    tables.first_tile[e] = e == groups ? 0 : tiles_of(begin, end);
  }
  exclusive_scan(tables.first_tile, groups + 1);  // each lane reads what it has written
}

}  // namespace dstrain::hopper
