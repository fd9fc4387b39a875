// Matrix products, plain and over groups of rows. Each output is cut into tiles (plan_tiles); a
// tile is one task and one or more calls of gemm(). Legend: E groups (experts), R rows of all
// groups, O and I output and input features.
#include <algorithm>
#include <numeric>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_groups.h"
#include "core/backend/cpu_ops.h"

namespace dstrain {
namespace {

int64_t size_of(const Tensor& matrix, Trans trans, int dim) {
  return matrix.size(trans == Trans::yes ? 1 - dim : dim);
}

// y[r, N] = x[index r, K] op(W_e): W_e is [N, K] (transposed) or [K, N].
template <class F>
void multiply_groups(ThreadPool& pool, const Workspace& workspace, const Tensor& x,
                     const Tensor& row_index, Trans weight_trans, const Tensor& weight,
                     const RowGroups& groups, const Tensor& y) {
  const int64_t K = x.size(1), N = y.size(1);
  const TilePlan plan = plan_tiles({Trans::no, weight_trans, y.size(0), N, K}, 1,
                                   rows_that_fit<F>(pool, row_index.defined() ? K : 0));
  const RowTiles tiles(groups, plan.rows, workspace);
  pool.run(tiles.count() * plan.column_tiles, [&](int64_t task, void* scratch) {
    const RowTiles::Tile tile = tiles.tile(task / plan.column_tiles);
    const int64_t n0 = task % plan.column_tiles * plan.columns;
    const Rows<F> rows =
        gather<F>(x, row_index, tile.begin, tile.end, 0, K, static_cast<F*>(scratch));
    const F* const w = row<F>(weight, tile.group) + n0 * (weight_trans == Trans::yes ? K : 1);
    gemm(Trans::no, weight_trans, tile.rows(), std::min(plan.columns, N - n0), K, F(1), rows.data,
         rows.stride, w, weight.size(2), F(0), row<F>(y, tile.begin) + n0, y.row_stride());
  });
}

// Groups in descending order of their rows, so that the last tasks to end are short ones.
int64_t* largest_first(const RowGroups& groups, const Workspace& workspace) {
  int64_t* const order = workspace.get<int64_t>(groups.count());
  std::iota(order, order + groups.count(), int64_t{0});
  std::sort(order, order + groups.count(), [&](int64_t a, int64_t b) {
    return groups.size(a) != groups.size(b) ? groups.size(a) > groups.size(b) : a < b;
  });
  return order;
}

// dweight[o0.., i0..] of one group, over runs of its rows when they have to be gathered.
template <class F>
struct WeightGradientTile {
  const Tensor &dy, &dy_index, &x, &x_index;
  int64_t o0, O, i0, I;  // the tile

  void add(int64_t begin, int64_t end, int64_t run, F beta, F* dweight, int64_t stride,
           F* scratch) const {
    for (int64_t r = begin; r < end; r += run) {
      const int64_t last = std::min(end, r + run);
      const Rows<F> dy_rows = gather<F>(dy, dy_index, r, last, o0, O, scratch);
      const Rows<F> x_rows = gather<F>(x, x_index, r, last, i0, I, scratch + run * O);
      gemm(Trans::yes, Trans::no, O, I, last - r, F(1), dy_rows.data, dy_rows.stride, x_rows.data,
           x_rows.stride, beta, dweight, stride);
      beta = F(1);
    }
    if (begin == end)
      gemm(Trans::yes, Trans::no, O, I, 0, F(1), nullptr, O, nullptr, I, beta, dweight, stride);
  }
};

template <class F>
void weight_gradients(ThreadPool& pool, const Workspace& workspace, const Tensor& dy,
                      const Tensor& dy_index, const Tensor& x, const Tensor& x_index,
                      const RowGroups& groups, Accumulate accumulate, const Tensor& dweight) {
  constexpr int64_t kGatheredRows = 512;
  const int64_t E = dweight.size(0), O = dweight.size(1), I = dweight.size(2);
  const int64_t rows = dy_index.defined() ? dy_index.size(0) : dy.size(0);
  const TilePlan plan =
      plan_tiles({Trans::yes, Trans::no, O, I, std::max<int64_t>(1, rows / E)}, E);
  const bool gathers = dy_index.defined() || x_index.defined();
  const int64_t run =
      gathers ? std::min(kGatheredRows, rows_that_fit<F>(pool, plan.rows + plan.columns))
              : std::max<int64_t>(1, rows);
  const int64_t* const order = largest_first(groups, workspace);
  const int64_t tiles = plan.row_tiles * plan.column_tiles;
  pool.run(E * tiles, [&](int64_t task, void* scratch) {
    const int64_t e = order[task / tiles], tile = task % tiles;
    const int64_t o0 = tile / plan.column_tiles * plan.rows;
    const int64_t i0 = tile % plan.column_tiles * plan.columns;
    const WeightGradientTile<F> gradient{dy, dy_index,
                                         x,  x_index,
                                         o0, std::min(plan.rows, O - o0),
                                         i0, std::min(plan.columns, I - i0)};
    gradient.add(groups.begin(e), groups.end(e), run, accumulate == Accumulate::add ? F(1) : F(0),
                 row<F>(dweight, e) + o0 * I + i0, I, static_cast<F*>(scratch));
  });
}

}  // namespace

void CpuOps::matmul(Stream&, Trans ta, Trans tb, double alpha, const Tensor& a, const Tensor& b,
                    double beta, const Tensor& c) {
  DSTRAIN_CHECK(a.dims() == 2 && b.dims() == 2 && c.dims() == 2, "matmul takes three matrices");
  const int64_t M = c.size(0), N = c.size(1), K = size_of(a, ta, 1);
  expect_strided(a, "matmul: a", c.dtype(), {ta == Trans::yes ? K : M, ta == Trans::yes ? M : K});
  expect_strided(b, "matmul: b", c.dtype(), {tb == Trans::yes ? N : K, tb == Trans::yes ? K : N});
  if (M == 0 || N == 0) return;
  if (log_) log_->add({ta, tb, M, N, K});
  const TilePlan plan = plan_tiles({ta, tb, M, N, K});
  dispatch_float(c.dtype(), [&]<class F>() {
    pool_.run(plan.row_tiles * plan.column_tiles, [&](int64_t task, void*) {
      const int64_t m0 = task / plan.column_tiles * plan.rows;
      const int64_t n0 = task % plan.column_tiles * plan.columns;
      gemm(ta, tb, std::min(plan.rows, M - m0), std::min(plan.columns, N - n0), K, F(alpha),
           a.data<F>() + m0 * (ta == Trans::yes ? 1 : a.row_stride()), a.row_stride(),
           b.data<F>() + n0 * (tb == Trans::yes ? b.row_stride() : 1), b.row_stride(), F(beta),
           row<F>(c, m0) + n0, c.row_stride());
    });
  });
}

void CpuOps::grouped_matmul(Stream&, const Tensor& x_XI, const Tensor& row_index_R,
                            const Tensor& weight_EOI, const Tensor& offsets_E1,
                            const Tensor& y_RO) {
  const int64_t R = y_RO.size(0), E = weight_EOI.size(0), O = weight_EOI.size(1),
                I = weight_EOI.size(2);
  expect_rows(x_XI, row_index_R, "grouped_matmul: x_XI", y_RO.dtype(), R, I);
  expect(weight_EOI, "grouped_matmul: weight_EOI", y_RO.dtype(), {E, O, I});
  expect_strided(y_RO, "grouped_matmul: y_RO", y_RO.dtype(), {R, O});
  const RowGroups groups(offsets_E1, E, R);
  groups.log(log_, [&](int64_t rows) { return ProductShape{Trans::no, Trans::yes, rows, O, I}; });
  dispatch_float(y_RO.dtype(), [&]<class F>() {
    multiply_groups<F>(pool_, workspace_, x_XI, row_index_R, Trans::yes, weight_EOI, groups, y_RO);
  });
}

void CpuOps::grouped_matmul_backward_input(Stream&, const Tensor& dy_XO, const Tensor& row_index_R,
                                           const Tensor& weight_EOI, const Tensor& offsets_E1,
                                           const Tensor& dx_RI) {
  const int64_t R = dx_RI.size(0), E = weight_EOI.size(0), O = weight_EOI.size(1),
                I = weight_EOI.size(2);
  expect_rows(dy_XO, row_index_R, "grouped_matmul_backward_input: dy_XO", dx_RI.dtype(), R, O);
  expect(weight_EOI, "grouped_matmul_backward_input: weight_EOI", dx_RI.dtype(), {E, O, I});
  expect_strided(dx_RI, "grouped_matmul_backward_input: dx_RI", dx_RI.dtype(), {R, I});
  const RowGroups groups(offsets_E1, E, R);
  groups.log(log_, [&](int64_t rows) { return ProductShape{Trans::no, Trans::no, rows, I, O}; });
  dispatch_float(dx_RI.dtype(), [&]<class F>() {
    multiply_groups<F>(pool_, workspace_, dy_XO, row_index_R, Trans::no, weight_EOI, groups, dx_RI);
  });
}

void CpuOps::grouped_matmul_backward_weight(Stream&, const Tensor& dy_XO, const Tensor& dy_index_R,
                                            const Tensor& x_XI, const Tensor& x_index_R,
                                            const Tensor& offsets_E1, Accumulate accumulate,
                                            const Tensor& dweight_EOI) {
  const DType dtype = dweight_EOI.dtype();
  const int64_t E = dweight_EOI.size(0), O = dweight_EOI.size(1), I = dweight_EOI.size(2);
  const int64_t R = dy_index_R.defined() ? dy_index_R.size(0) : dy_XO.size(0);
  expect_rows(dy_XO, dy_index_R, "grouped_matmul_backward_weight: dy_XO", dtype, R, O);
  expect_rows(x_XI, x_index_R, "grouped_matmul_backward_weight: x_XI", dtype, R, I);
  expect(dweight_EOI, "grouped_matmul_backward_weight: dweight_EOI", dtype, {E, O, I});
  if (E == 0 || O == 0 || I == 0) return;
  const RowGroups groups(offsets_E1, E, R);
  groups.log(log_, [&](int64_t rows) { return ProductShape{Trans::yes, Trans::no, O, I, rows}; });
  dispatch_float(dtype, [&]<class F>() {
    weight_gradients<F>(pool_, workspace_, dy_XO, dy_index_R, x_XI, x_index_R, groups, accumulate,
                        dweight_EOI);
  });
}

}  // namespace dstrain
