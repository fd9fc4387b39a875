// Rows sorted by expert, rows summed back to their tokens, rows gathered.
// T tokens, K experts per token, E experts, R rows of experts, D columns, N ranks of expert
// parallelism, Z rows that one of them sends.
#include <algorithm>
#include <cstring>
#include <vector>

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
      if (index[r] < 0) continue;
      to[r * y.row_stride()] =
          from[checked_row(index[r], x.size(0), "gather_rows") * x.row_stride()];
    }
  });
}

}  // namespace

void CpuOps::sort_by_expert(Stream&, const Tensor& indices_TK, const Tensor& weights_TK,
                            const Tensor& offsets_E1, const Tensor& token_of_row_R,
                            const Tensor& row_of_slot_TK, const Tensor& row_weight_R) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), R = token_of_row_R.numel();
  const int64_t E = offsets_E1.numel() - 1;
  DSTRAIN_CHECK(std::max(R, T * K) <= INT32_MAX,
                "sort_by_expert: more rows than an i32 can number");
  expect(weights_TK, "sort_by_expert: weights_TK", weights_TK.dtype(), {T, K});
  expect(offsets_E1, "sort_by_expert: offsets_E1", DType::i32, {E + 1});
  expect(token_of_row_R, "sort_by_expert: token_of_row_R", DType::i32, {R});
  expect(row_of_slot_TK, "sort_by_expert: row_of_slot_TK", DType::i32, {T, K});
  expect(row_weight_R, "sort_by_expert: row_weight_R", weights_TK.dtype(), {R});
  const ExpertCounts counts(pool_, workspace_, indices_TK, E, NoExpert::left_out);
  make_first_rows(counts, E, offsets_E1.data<int32_t>());
  const int32_t used = offsets_E1.data<int32_t>()[E];
  DSTRAIN_CHECK(used <= R, "sort_by_expert: " + std::to_string(used) + " choices for " +
                               std::to_string(R) + " rows");
  std::fill_n(token_of_row_R.data<int32_t>() + used, R - used, 0);
  dispatch_float(weights_TK.dtype(), [&]<class F>() {
    const int32_t* const chosen = indices_TK.data<int32_t>();
    const F* const weights = weights_TK.data<F>();
    std::fill_n(row_weight_R.data<F>() + used, R - used, F(0));
    pool_.run(counts.chunks(), [&](int64_t chunk, void*) {
      int32_t* const next_row = counts.of_chunk(chunk);
      for (int64_t slot = counts.begin(chunk); slot < counts.end(chunk); ++slot) {
        if (chosen[slot] < 0) {
          row_of_slot_TK.data<int32_t>()[slot] = -1;
          continue;
        }
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
        const F* four[4];
        int waiting = 0;
        for (int64_t k = 0; k < K; ++k) {
          if (rows[k] < 0) continue;
          four[waiting++] = row<F>(y_RD, checked_row(rows[k], R, "combine_rows"));
          if (waiting < 4) continue;
          add_four_to(four[0], four[1], four[2], four[3], D, out);
          waiting = 0;
        }
        for (int i = 0; i < waiting; ++i) add_to(four[i], D, out);
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
      if (index[r] < 0) continue;
      const int64_t source = checked_row(index[r], x_XD.size(0), "gather_rows");
      std::memcpy(to + r * y_RD.row_stride() * element_bytes,
                  from + source * x_XD.row_stride() * element_bytes,
                  static_cast<size_t>(row_bytes));
    }
  });
}

void CpuOps::count_tokens_by_rank(Stream&, const Tensor& indices_TK, int64_t experts_per_rank,
                                  const Tensor& tokens_N) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), N = tokens_N.numel();
  expect(indices_TK, "count_tokens_by_rank: indices_TK", DType::i32, {T, K});
  expect(tokens_N, "count_tokens_by_rank: tokens_N", DType::i64, {N});
  DSTRAIN_CHECK(experts_per_rank > 0, "count_tokens_by_rank: ranks without experts");
  std::vector<int64_t> last(static_cast<size_t>(N), -1);  // token that was counted for the rank
  for (int64_t slot = 0; slot < T * K; ++slot) {
    const int32_t expert = checked_expert(indices_TK.data<int32_t>()[slot], N * experts_per_rank);
    const int64_t rank = expert / experts_per_rank;
    int64_t& counted = last[static_cast<size_t>(rank)];
    if (counted != slot / K) ++tokens_N.data<int64_t>()[rank];
    counted = slot / K;
  }
}

namespace {

// What this rank sends to another in a round.
struct Channel {
  int64_t first_choice = 0;  // number of its first choice among all on their way there
  int64_t first_row = 0, rows = 0;
  int64_t tokens = 0;  // met so far
  int64_t last_token = -1;
  int32_t row = -1;  // of the last token
};

std::vector<Channel> channels(const Tensor& counts_NX, int64_t E, int64_t rank, int64_t begin,
                              int64_t window) {
  const int64_t N = counts_NX.size(0), L = E / N;
  const auto count = [&](int64_t source, int64_t at) {
    return counts_NX.data<int64_t>()[source * counts_NX.size(1) + at];
  };
  std::vector<Channel> all(static_cast<size_t>(N));
  int64_t row = 0;
  for (int64_t to = 0; to < N; ++to) {
    int64_t number = 0, first = 0;
    for (int64_t source = 0; source <= rank; ++source) {
      first = number;
      for (int64_t e = to * L; e < (to + 1) * L; ++e) number += count(source, e);
    }
    const int64_t carried =
        std::clamp(number, begin, begin + window) - std::clamp(first, begin, begin + window);
    const int64_t rows = std::min(carried, count(rank, E + to));
    all[static_cast<size_t>(to)] = {.first_choice = first, .first_row = row, .rows = rows};
    row += rows;
  }
  return all;
}

}  // namespace

void CpuOps::address_tokens(Stream&, const Tensor& indices_TK, const Tensor& counts_NX,
                            int64_t rank, int64_t round, int64_t window,
                            const Tensor& token_of_row_Z, const Tensor& row_of_token_TN,
                            const Tensor& choices_ZK) {
  const int64_t T = indices_TK.size(0), K = indices_TK.size(1), N = counts_NX.size(0);
  const int64_t E = counts_NX.size(1) - N, Z = token_of_row_Z.numel(), L = E / N;
  expect(indices_TK, "address_tokens: indices_TK", DType::i32, {T, K});
  expect(counts_NX, "address_tokens: counts_NX", DType::i64, {N, E + N});
  expect(token_of_row_Z, "address_tokens: token_of_row_Z", DType::i32, {Z});
  expect(row_of_token_TN, "address_tokens: row_of_token_TN", DType::i32, {T, N});
  expect(choices_ZK, "address_tokens: choices_ZK", DType::i32, {Z, K});
  DSTRAIN_CHECK(rank >= 0 && rank < N && L * N == E && L > 0, "address_tokens: no such ranks");
  const int64_t begin = round * window;
  std::vector<Channel> to = channels(counts_NX, E, rank, begin, window);
  DSTRAIN_CHECK(to.back().first_row + to.back().rows <= Z, "address_tokens: more rows than room");
  for (const Tensor& x : {token_of_row_Z, row_of_token_TN, choices_ZK})
    std::fill_n(x.data<int32_t>(), x.numel(), -1);
  std::vector<int64_t> choices(static_cast<size_t>(N));  // met so far
  for (int64_t slot = 0; slot < T * K; ++slot) {
    const int64_t t = slot / K, k = slot % K;
    const int32_t expert = checked_expert(indices_TK.data<int32_t>()[slot], E);
    const int64_t d = expert / L;
    Channel& channel = to[static_cast<size_t>(d)];
    const int64_t number = channel.first_choice + choices[static_cast<size_t>(d)]++;
    if (channel.last_token != t) {
      channel.last_token = t;
      const bool carried = number >= begin && number < begin + window;
      const int64_t row = carried ? channel.first_row + channel.tokens % channel.rows : -1;
      channel.row = static_cast<int32_t>(row);
      ++channel.tokens;
      row_of_token_TN.data<int32_t>()[t * N + d] = channel.row;
      if (carried) token_of_row_Z.data<int32_t>()[row] = static_cast<int32_t>(t);
    }
    if (channel.row >= 0)
      choices_ZK.data<int32_t>()[channel.row * K + k] = static_cast<int32_t>(expert - d * L);
  }
}

}  // namespace dstrain
