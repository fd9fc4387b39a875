// The gated feed-forward's products joined with SwiGLU: a tile of gate_up or of dh is computed and
// used while it is in cache.
//   h = silu(gate) * up * w,  silu(g) = g s, s = 1 / (1 + exp(-g)),  silu'(g) = s (1 + g (1 - s))
// Legend: E groups (experts), R rows of all groups, D hidden size, I intermediate size, w row
// weight.
#include <algorithm>

#include "core/backend/cpu_gemm.h"
#include "core/backend/cpu_groups.h"
#include "core/backend/cpu_ops.h"
#include "core/backend/simd_math.h"

namespace dstrain {
namespace {

template <class F>
void swiglu(const F* __restrict__ gate, const F* __restrict__ up, F weight, int64_t n,
            F* __restrict__ h) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) h[j] = silu(gate[j]) * up[j] * weight;
}

// Returns sum dh silu(gate) up, the gradient of the row weight.
template <class F>
F swiglu_backward(const F* __restrict__ dh, const F* __restrict__ gate, const F* __restrict__ up,
                  F weight, int64_t n, F* __restrict__ dgate, F* __restrict__ dup,
                  F* __restrict__ h) {
  F dweight = 0;
#pragma omp simd reduction(+ : dweight)
  for (int64_t j = 0; j < n; ++j) {
    const F s = sigmoid(gate[j]);
    const F activated = gate[j] * s;
    const F product = activated * up[j];
    const F dproduct = dh[j] * weight;
    dweight += dh[j] * product;
    h[j] = product * weight;
    dup[j] = dproduct * activated;
    dgate[j] = dproduct * up[j] * (s + activated * (F(1) - s));
  }
  return dweight;
}

struct FfnUp {
  const Tensor &x, &row_index, &weight, &row_weight, &gate_up, &h;

  // gate and up columns [i0, i0 + columns) of a row tile, then h.
  template <class F>
  void tile(const RowTiles::Tile& tile, int64_t i0, int64_t columns, F* scratch) const {
    const int64_t D = x.size(1), I = h.size(1);
    const Rows<F> rows = gather<F>(x, row_index, tile.begin, tile.end, 0, D, scratch);
    const auto multiply = [&](int64_t first, int64_t n) {
      gemm(Trans::no, Trans::yes, tile.rows(), n, D, F(1), rows.data, rows.stride,
           row<F>(weight, tile.group) + first * D, D, F(0), row<F>(gate_up, tile.begin) + first,
           gate_up.row_stride());
    };
    if (columns == I) {
      multiply(0, 2 * I);
    } else {
      multiply(i0, columns);
      multiply(I + i0, columns);
    }
    for (int64_t r = tile.begin; r < tile.end; ++r) {
      const F* const gate = row<F>(gate_up, r) + i0;
      const F w = row_weight.defined() ? row_weight.data<F>()[r] : F(1);
      swiglu(gate, gate + I, w, columns, row<F>(h, r) + i0);
    }
  }

  template <class F>
  void run(ThreadPool& pool, const Workspace& workspace, const RowGroups& groups) const {
    const int64_t D = x.size(1), I = h.size(1);
    const TilePlan plan = plan_tiles({Trans::no, Trans::yes, h.size(0), I, 2 * D}, 1,
                                     rows_that_fit<F>(pool, row_index.defined() ? D : 0));
    const RowTiles tiles(groups, plan.rows, workspace);
    pool.run(tiles.count() * plan.column_tiles, [&](int64_t task, void* scratch) {
      const int64_t i0 = task % plan.column_tiles * plan.columns;
      tile<F>(tiles.tile(task / plan.column_tiles), i0, std::min(plan.columns, I - i0),
              static_cast<F*>(scratch));
    });
  }
};

struct FfnDownBackwardInput {
  const Tensor &dy, &row_index, &weight, &gate_up, &row_weight, &dgate_up, &h, &drow_weight;

  // All columns of a row tile, because drow_weight sums over them.
  template <class F>
  void tile(const RowTiles::Tile& tile, int64_t columns, F* scratch) const {
    const int64_t D = dy.size(1), I = h.size(1);
    F* const dh = scratch;
    const Rows<F> rows =
        gather<F>(dy, row_index, tile.begin, tile.end, 0, D, scratch + tile.rows() * columns);
    for (int64_t i0 = 0; i0 < I; i0 += columns) {
      const int64_t n = std::min(columns, I - i0);
      gemm(Trans::no, Trans::no, tile.rows(), n, D, F(1), rows.data, rows.stride,
           row<F>(weight, tile.group) + i0, I, F(0), dh, n);
      for (int64_t r = tile.begin; r < tile.end; ++r) {
        const F* const gate = row<F>(gate_up, r) + i0;
        F* const dgate = row<F>(dgate_up, r) + i0;
        const F w = row_weight.defined() ? row_weight.data<F>()[r] : F(1);
        const F dw = swiglu_backward(dh + (r - tile.begin) * n, gate, gate + I, w, n, dgate,
                                     dgate + I, row<F>(h, r) + i0);
        if (drow_weight.defined()) {
          F& sum = drow_weight.data<F>()[r];
          sum = i0 == 0 ? dw : sum + dw;
        }
      }
    }
  }

  template <class F>
  void run(ThreadPool& pool, const Workspace& workspace, const RowGroups& groups) const {
    constexpr int64_t kColumns = 512;  // of dh at a time: a tile stays in the second-level cache
    const int64_t D = dy.size(1), columns = std::clamp<int64_t>(h.size(1), 1, kColumns);
    const int64_t in_scratch = columns + (row_index.defined() ? D : 0);
    const TilePlan plan = plan_tiles({Trans::no, Trans::no, h.size(0), columns, D}, 1,
                                     rows_that_fit<F>(pool, in_scratch));
    const RowTiles tiles(groups, plan.rows, workspace);
    pool.run(tiles.count(), [&](int64_t task, void* scratch) {
      tile<F>(tiles.tile(task), columns, static_cast<F*>(scratch));
    });
  }
};

}  // namespace

void CpuOps::ffn_up(Stream&, const Tensor& x_XD, const Tensor& row_index_R,
                    const Tensor& weight_E2ID, const Tensor& offsets_E1, const Tensor& row_weight_R,
                    const Tensor& gate_up_R2I, const Tensor& h_RI) {
  const DType dtype = h_RI.dtype();
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_E2ID.size(0);
  const int64_t D = weight_E2ID.size(2);
  expect_rows(x_XD, row_index_R, "ffn_up: x_XD", dtype, R, D);
  expect(weight_E2ID, "ffn_up: weight_E2ID", dtype, {E, 2 * I, D});
  expect_strided(gate_up_R2I, "ffn_up: gate_up_R2I", dtype, {R, 2 * I});
  if (row_weight_R.defined()) expect(row_weight_R, "ffn_up: row_weight_R", dtype, {R});
  if (R == 0 || I == 0) return;
  const RowGroups groups(offsets_E1, E, R);
  groups.log(log_, [&](int64_t rows) {
    return ProductShape{Trans::no, Trans::yes, rows, 2 * I, D};
  });
  const FfnUp op{x_XD, row_index_R, weight_E2ID, row_weight_R, gate_up_R2I, h_RI};
  dispatch_float(dtype, [&]<class F>() { op.run<F>(pool_, workspace_, groups); });
}

void CpuOps::ffn_down_backward_input(Stream&, const Tensor& dy_XD, const Tensor& row_index_R,
                                     const Tensor& weight_EDI, const Tensor& offsets_E1,
                                     const Tensor& gate_up_R2I, const Tensor& row_weight_R,
                                     const Tensor& dgate_up_R2I, const Tensor& h_RI,
                                     const Tensor& drow_weight_R) {
  const DType dtype = h_RI.dtype();
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_EDI.size(0);
  const int64_t D = weight_EDI.size(1);
  expect_rows(dy_XD, row_index_R, "ffn_down_backward_input: dy_XD", dtype, R, D);
  expect(weight_EDI, "ffn_down_backward_input: weight_EDI", dtype, {E, D, I});
  expect_strided(gate_up_R2I, "ffn_down_backward_input: gate_up_R2I", dtype, {R, 2 * I});
  expect_strided(dgate_up_R2I, "ffn_down_backward_input: dgate_up_R2I", dtype, {R, 2 * I});
  for (const Tensor* weight : {&row_weight_R, &drow_weight_R})
    if (weight->defined()) expect(*weight, "ffn_down_backward_input: (d)row_weight_R", dtype, {R});
  if (R == 0 || I == 0) return;
  const RowGroups groups(offsets_E1, E, R);
  groups.log(log_, [&](int64_t rows) { return ProductShape{Trans::no, Trans::no, rows, I, D}; });
  const FfnDownBackwardInput op{dy_XD,        row_index_R,  weight_EDI, gate_up_R2I,
                                row_weight_R, dgate_up_R2I, h_RI,       drow_weight_R};
  dispatch_float(dtype, [&]<class F>() { op.run<F>(pool_, workspace_, groups); });
}

}  // namespace dstrain
