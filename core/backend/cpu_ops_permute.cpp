// Rows sorted by expert, rows summed back to their tokens, rows gathered.
// T tokens, K experts per token, E experts, R = T*K routed rows, D columns.
#include <algorithm>
#include <cstring>

#include "core/backend/cpu_ops.h"
#include "core/backend/cpu_routing.h"

namespace dstrain {
namespace {

// Turns the counts of each run of slots into the first row that the run fills for each expert.
// Returns through offsets_E1 where each expert's rows begin.
void make_first_rows(const ExpertCounts& counts, int64_t experts, int32_t* offsets_E1) {
  int32_t next = 0;
  for (int64_t e = 0; e < experts; ++e) {
    offsets_E1[e] = next;
    for (int64_t chunk = 0; chunk < counts.chunks(); ++chunk) {
      const int32_t count = counts.of_chunk(chunk)[e];
      counts.of_chunk(chunk)[e] = next;
      next += count;
    }
  }
  offsets_E1[experts] = next;
}

template <class F>
void add_to(const F* y, int64_t n, F* out) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) out[d] += y[d];
}

template <class F>
void add_four_to(const F* a, const F* b, const F* c, const F* e, int64_t n, F* out) {
#pragma omp simd
  for (int64_t d = 0; d < n; ++d) out[d] += (a[d] + b[d]) + (c[d] + e[d]);
}

int32_t checked_row(int32_t index, int64_t rows, const char* op) {
  DSTRAIN_CHECK(index >= 0 && index < rows,
                std::string(op) + ": row " + std::to_string(index) + " of " + std::to_string(rows));
  return index;
}

template <class Element>
void gather_elements(ThreadPool& pool, const Tensor& x, const int32_t* index, const Tensor& y) {
  const auto* const from = static_cast<const Element*>(x.raw());
  auto* const to = static_cast<Element*>(y.raw());
  pool.run_ranges(y.size(0), 16384, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      to[r * y.row_stride()] =
          from[checked_row(index[r], x.size(0), "gather_rows") * x.row_stride()];
    }
  });
}

}  // namespace

void CpuOps::sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor& weights_TK,
                            const Tensor& offsets_E1, const Tensor& token_of_row_R,
                            const Tensor& row_of_slot_TK, const Tensor& row_weight_R) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), R = T * K;
  const int64_t E = offsets_E1.numel() - 1;
  DSTRAIN_CHECK(R <= INT32_MAX, "sort_by_expert: more rows than an i32 can number");
  expect(weights_TK, "sort_by_expert: weights_TK", weights_TK.dtype(), {T, K});
  expect(offsets_E1, "sort_by_expert: offsets_E1", DType::i32, {E + 1});
  expect(token_of_row_R, "sort_by_expert: token_of_row_R", DType::i32, {R});
  expect(row_of_slot_TK, "sort_by_expert: row_of_slot_TK", DType::i32, {T, K});
  expect(row_weight_R, "sort_by_expert: row_weight_R", weights_TK.dtype(), {R});
  const ExpertCounts counts(pool_, workspace_, indices_TK, E);
  make_first_rows(counts, E, offsets_E1.data<int32_t>());
  dispatch_float(weights_TK.dtype(), [&]<class F>() {
    const int32_t* const chosen = indices_TK.data<int32_t>();
    const F* const weights = weights_TK.data<F>();
    pool_.run(counts.chunks(), [&](int64_t chunk, void*) {
      int32_t* const next_row = counts.of_chunk(chunk);
      for (int64_t slot = counts.begin(chunk); slot < counts.end(chunk); ++slot) {
        const int32_t r = next_row[chosen[slot]]++;
        token_of_row_R.data<int32_t>()[r] = static_cast<int32_t>(slot / K);
        row_of_slot_TK.data<int32_t>()[slot] = r;
        row_weight_R.data<F>()[r] = weights[slot];
      }
    });
  });
}

void CpuOps::combine_rows(Stream&, const Tensor& y_RD, const Tensor& row_of_slot_TK,
                          const Tensor& addend_TD, const Tensor& out_TD) {
  const DType dtype = out_TD.dtype();
  const int64_t T = out_TD.size(0), D = out_TD.size(1), R = y_RD.size(0);
  const int64_t K = row_of_slot_TK.size(1);
  expect_strided(y_RD, "combine_rows: y_RD", dtype, {R, D});
  expect_strided(row_of_slot_TK, "combine_rows: row_of_slot_TK", DType::i32, {T, K});
  if (addend_TD.defined()) expect_strided(addend_TD, "combine_rows: addend_TD", dtype, {T, D});
  if (T == 0 || D == 0) return;
  dispatch_float(dtype, [&]<class F>() {
    pool_.run_ranges(T, rows_per_task((K + 1) * D), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        F* const out = row<F>(out_TD, t);
        if (!addend_TD.defined()) {
          std::fill(out, out + D, F(0));
        } else if (row<F>(addend_TD, t) != out) {
          std::memcpy(out, row<F>(addend_TD, t), static_cast<size_t>(D) * sizeof(F));
        }
        const int32_t* const rows = row<int32_t>(row_of_slot_TK, t);
        const auto y = [&](int64_t k) {
          return row<F>(y_RD, checked_row(rows[k], R, "combine_rows"));
        };
        int64_t k = 0;
        for (; k + 4 <= K; k += 4) add_four_to(y(k), y(k + 1), y(k + 2), y(k + 3), D, out);
        for (; k < K; ++k) add_to(y(k), D, out);
      }
    });
  });
}

void CpuOps::gather_rows(Stream&, const Tensor& x_XD, const Tensor& index_R, const Tensor& y_RD) {
  const int64_t R = index_R.numel(), D = x_XD.row_numel();
  expect(index_R, "gather_rows: index_R", DType::i32, {R});
  DSTRAIN_CHECK(y_RD.dtype() == x_XD.dtype() && y_RD.size(0) == R && y_RD.row_numel() == D,
                "gather_rows: x_XD is " + x_XD.describe() + " and y_RD " + y_RD.describe());
  if (R == 0 || D == 0) return;
  const int64_t element_bytes = dtype_bytes(x_XD.dtype()), row_bytes = D * element_bytes;
  const int32_t* const index = index_R.data<int32_t>();
  if (D == 1 && element_bytes == 4) return gather_elements<uint32_t>(pool_, x_XD, index, y_RD);
  if (D == 1 && element_bytes == 8) return gather_elements<uint64_t>(pool_, x_XD, index, y_RD);
  const auto* const from = static_cast<const char*>(x_XD.raw());
  auto* const to = static_cast<char*>(y_RD.raw());
  pool_.run_ranges(R, rows_per_task(D), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const int64_t source = checked_row(index[r], x_XD.size(0), "gather_rows");
      std::memcpy(to + r * y_RD.row_stride() * element_bytes,
                  from + source * x_XD.row_stride() * element_bytes,
                  static_cast<size_t>(row_bytes));
    }
  });
}

void CpuOps::arrange_arrivals(Stream&, const Tensor& counts_NE, int64_t first_expert, int64_t round,
                              const Tensor& order_C, const Tensor& arrival_C,
                              const Tensor& offsets_L1) {
  const int64_t N = counts_NE.size(0), E = counts_NE.size(1), L = offsets_L1.numel() - 1;
  const Tensor& any = order_C.defined() ? order_C : arrival_C;
  DSTRAIN_CHECK(any.defined(), "arrange_arrivals: nothing is asked for");
  const int64_t C = any.numel(), begin = round * C, end = begin + C;
  expect(counts_NE, "arrange_arrivals: counts_NE", DType::i64, {N, E});
  expect(offsets_L1, "arrange_arrivals: offsets_L1", DType::i32, {L + 1});
  for (const Tensor* x : {&order_C, &arrival_C})
    if (x->defined()) {
      expect(*x, "arrange_arrivals: order_C or arrival_C", DType::i32, {C});
      std::fill_n(x->data<int32_t>(), C, 0);
    }
  DSTRAIN_CHECK(first_expert >= 0 && first_expert + L <= E, "arrange_arrivals: no such experts");
  int64_t row = 0;  // in expert order
  for (int64_t own = 0; own < L; ++own) {
    offsets_L1.data<int32_t>()[own] = static_cast<int32_t>(row);
    int64_t number = 0;  // in the order of arrival, over all rounds
    for (int64_t source = 0; source < N; ++source)
      for (int64_t other = 0; other < L; ++other) {
        const int64_t count = counts_NE.data<int64_t>()[source * E + first_expert + other];
        const int64_t first = std::clamp(number, begin, end);
        const int64_t last = std::clamp(number + count, begin, end);
        number += count;
        if (other != own) continue;
        for (int64_t at = first - begin; at < last - begin; ++at, ++row) {
          if (order_C.defined()) order_C.data<int32_t>()[row] = static_cast<int32_t>(at);
          if (arrival_C.defined()) arrival_C.data<int32_t>()[at] = static_cast<int32_t>(row);
        }
      }
  }
  offsets_L1.data<int32_t>()[L] = static_cast<int32_t>(row);
}

}  // namespace dstrain
