// Embedding lookup and its gradient. T tokens, V rows of the vocabulary held here, D columns.
#include <cstring>

#include "core/backend/cpu_ops.h"

namespace dstrain {
namespace {

void expect_embedding(const Tensor& tokens_T, const Tensor& weight_VD, const Tensor& x_TD,
                      const char* op) {
  DSTRAIN_CHECK(tokens_T.dtype() == DType::i32 && tokens_T.dims() == 1 && weight_VD.dims() == 2 &&
                    x_TD.dims() == 2 && x_TD.dtype() == weight_VD.dtype() &&
                    x_TD.size(0) == tokens_T.size(0) && x_TD.size(1) == weight_VD.size(1),
                std::string(op) + ": tokens " + tokens_T.describe() + ", weight " +
                    weight_VD.describe() + ", x " + x_TD.describe());
}

}  // namespace

void CpuOps::embedding(Stream&, const Tensor& tokens_T, const Tensor& weight_VD,
                       int64_t vocab_begin, const Tensor& x_TD) {
  expect_embedding(tokens_T, weight_VD, x_TD, "embedding");
  const int64_t V = weight_VD.size(0), D = weight_VD.size(1);
  dispatch_float(x_TD.dtype(), [&]<class F>() {
    pool_.run_ranges(tokens_T.size(0), rows_per_task(D), [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t v = tokens_T.data<int32_t>()[t] - vocab_begin;
        F* const x = row<F>(x_TD, t);
        if (v >= 0 && v < V) {
          std::memcpy(x, row<F>(weight_VD, v), static_cast<size_t>(D) * sizeof(F));
        } else {
          std::fill(x, x + D, F(0));
        }
      }
    });
  });
}

// A task owns a block of columns of every fourth row of the vocabulary and adds the tokens in
// ascending order. Every fourth, because common tokens often have neighbouring numbers; columns,
// because a single token may be most of the batch.
void CpuOps::embedding_backward(Stream& stream, const Tensor& tokens_T, const Tensor& dx_TD,
                                int64_t vocab_begin, Accumulate accumulate,
                                const Tensor& dweight_VD) {
  expect_embedding(tokens_T, dweight_VD, dx_TD, "embedding_backward");
  constexpr int64_t kColumns = 64, kLanes = 4;
  const int64_t V = dweight_VD.size(0), D = dweight_VD.size(1), T = tokens_T.size(0);
  if (accumulate == Accumulate::overwrite) fill(stream, dweight_VD, 0);
  dispatch_float(dx_TD.dtype(), [&]<class F>() {
    const int32_t* const tokens = tokens_T.data<int32_t>();
    const int64_t blocks = (D + kColumns - 1) / kColumns;
    pool_.run(T > 0 ? blocks * kLanes : 0, [&](int64_t task, void*) {
      const int64_t lane = task / blocks, begin = task % blocks * kColumns;
      const int64_t width = std::min(kColumns, D - begin);
      for (int64_t t = 0; t < T; ++t) {
        const int64_t v = tokens[t] - vocab_begin;
        if (v < 0 || v >= V || v % kLanes != lane) continue;
        const F* const dx = row<F>(dx_TD, t) + begin;
        F* const dweight = row<F>(dweight_VD, v) + begin;
#pragma omp simd
        for (int64_t d = 0; d < width; ++d) dweight[d] += dx[d];
      }
    });
  });
}

}  // namespace dstrain
