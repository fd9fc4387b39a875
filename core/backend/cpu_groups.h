// What the grouped products share: the rows of each group cut into tiles, and gathered rows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_parallel.h"

namespace dstrain {

// The groups' row ranges. Offsets are read once per op; absent offsets mean one group of all rows.
// Rows after the last group belong to nobody and are not touched.
class RowGroups {
 public:
  RowGroups(const Tensor& offsets_E1, int64_t groups, int64_t rows) : groups_(groups), rows_(rows) {
    if (!offsets_E1.defined()) {
      DSTRAIN_CHECK(groups == 1, "a product without offsets has one group");
      return;
    }
    expect(offsets_E1, "offsets_E1", DType::i32, {groups + 1});
    offsets_ = offsets_E1.data<int32_t>();
    DSTRAIN_CHECK(offsets_[0] >= 0 && offsets_[groups] <= rows,
                  "group offsets outside of the rows");
    for (int64_t e = 0; e < groups; ++e)
      DSTRAIN_CHECK(offsets_[e] <= offsets_[e + 1], "group offsets that do not ascend");
  }
  int64_t count() const { return groups_; }
  int64_t begin(int64_t e) const { return offsets_ ? offsets_[e] : 0; }
  int64_t end(int64_t e) const { return offsets_ ? offsets_[e + 1] : rows_; }
  int64_t size(int64_t e) const { return end(e) - begin(e); }

  // Adds product(rows) of each group that has rows.
  template <class Product>
  void log(MatmulLog* log, const Product& product) const {
    if (!log) return;
    for (int64_t e = 0; e < groups_; ++e) {
      if (size(e) > 0) log->add(product(size(e)));
    }
  }

 private:
  int64_t groups_, rows_;
  const int32_t* offsets_ = nullptr;
};

// The rows of every group in tiles of at most `tile_rows` rows, as even as they come.
class RowTiles {
 public:
  struct Tile {
    int64_t group, begin, end;
    int64_t rows() const { return end - begin; }
  };

  RowTiles(const RowGroups& groups, int64_t tile_rows, const Workspace& workspace)
      : groups_(groups), first_tile_(workspace.get<int64_t>(groups.count() + 1)) {
    first_tile_[0] = 0;
    for (int64_t e = 0; e < groups.count(); ++e)
      first_tile_[e + 1] = first_tile_[e] + (groups.size(e) + tile_rows - 1) / tile_rows;
  }
  int64_t count() const { return first_tile_[groups_.count()]; }
  Tile tile(int64_t index) const {
    const int64_t* const after =
        std::upper_bound(first_tile_, first_tile_ + groups_.count() + 1, index);
    const int64_t e = after - first_tile_ - 1;
    const int64_t tiles = first_tile_[e + 1] - first_tile_[e], i = index - first_tile_[e];
    return {e, groups_.begin(e) + groups_.size(e) * i / tiles,
            groups_.begin(e) + groups_.size(e) * (i + 1) / tiles};
  }

 private:
  const RowGroups& groups_;
  int64_t* first_tile_;
};

// A matrix with its leading dimension.
template <class F>
struct Rows {
  const F* data;
  int64_t stride;
};

// Rows index[begin..end) of x, columns [column, column + columns), packed into `scratch`; or,
// without an index, rows begin..end where they lie.
template <class F>
Rows<F> gather(const Tensor& x, const Tensor& index, int64_t begin, int64_t end, int64_t column,
               int64_t columns, F* scratch) {
  if (!index.defined()) return {row<F>(x, begin) + column, x.row_stride()};
  const int32_t* const source = index.data<int32_t>();
  for (int64_t r = begin; r < end; ++r) {
    DSTRAIN_DCHECK(source[r] >= 0 && source[r] < x.size(0), "a row index outside of its matrix");
    std::memcpy(scratch + (r - begin) * columns, row<F>(x, source[r]) + column,
                static_cast<size_t>(columns) * sizeof(F));
  }
  return {scratch, columns};
}

// Rows of a tile for which `elements_per_row` numbers fit into a thread's scratch memory.
template <class F>
int64_t rows_that_fit(const ThreadPool& pool, int64_t elements_per_row) {
  const int64_t elements = pool.scratch_bytes() / static_cast<int64_t>(sizeof(F));
  DSTRAIN_CHECK(elements_per_row <= elements, "one row is larger than a thread's scratch memory");
  return elements / std::max<int64_t>(1, elements_per_row);
}

// Checks an operand whose rows are read through `index`: [rows, columns] without one, else any
// number of rows and an index of `rows`.
inline void expect_rows(const Tensor& x, const Tensor& index, const char* name, DType dtype,
                        int64_t rows, int64_t columns) {
  DSTRAIN_CHECK(x.defined() && x.dims() == 2, std::string(name) + " must be a matrix");
  if (index.defined()) expect(index, "the row index", DType::i32, {rows});
  expect_strided(x, name, dtype, {index.defined() ? x.size(0) : rows, columns});
}

}  // namespace dstrain
