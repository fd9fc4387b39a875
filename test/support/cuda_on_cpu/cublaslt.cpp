// In place of cuBLASLt: what its header says of the functions that the back end calls, by loops. It
// has two algorithms, which add the products of an element up from the first to the last and the
// other way round. Both want every row at a multiple of 16 bytes, so that of odd sizes the back
// end's own kernel multiplies, as it does on a GPU where the library takes nothing.
#include <cublasLt.h>
#include <cuda_bf16.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "test/support/cuda_on_cpu/runtime.h"
#include "test/support/cuda_on_cpu/streams.h"

namespace cuda_on_cpu {
namespace {

constexpr uint32_t kAlignment = 16;
constexpr int kAlgorithms = 2;

struct Operation {
  bool transposed_a = false, transposed_b = false;
};

// Column-major.
struct Layout {
  cudaDataType type;
  int64_t rows, columns, stride;

  float load(const void* matrix, int64_t row, int64_t column) const {
    const int64_t at = row + column * stride;
    return type == CUDA_R_32F ? static_cast<const float*>(matrix)[at]
                              : __bfloat162float(static_cast<const __nv_bfloat16*>(matrix)[at]);
  }
  void store(void* matrix, int64_t row, int64_t column, float value) const {
    const int64_t at = row + column * stride;
    if (type == CUDA_R_32F)
      static_cast<float*>(matrix)[at] = value;
    else
      static_cast<__nv_bfloat16*>(matrix)[at] = __float2bfloat16(value);
  }
};

struct Preference {
  uint32_t least_alignment = 256;
};

// d = alpha * op(a) op(b) + beta * c, of which c and d are one.
struct Product {
  Operation operation;
  Layout a, b, c;
  float alpha = 1, beta = 0;
  int algorithm = 0;

  int64_t depth() const { return operation.transposed_a ? a.rows : a.columns; }
  bool fits() const {
    const int64_t m = operation.transposed_a ? a.columns : a.rows;
    const int64_t n = operation.transposed_b ? b.rows : b.columns;
    const int64_t depth_of_b = operation.transposed_b ? b.columns : b.rows;
    const bool types =
        a.type == b.type && (c.type == CUDA_R_32F || (c.type == CUDA_R_16BF && a.type == c.type));
    return types && m == c.rows && n == c.columns && depth() == depth_of_b && a.stride >= a.rows &&
           b.stride >= b.rows && c.stride >= c.rows;
  }

  void run(const void* a_data, const void* b_data, void* c_data) const {
    const int64_t m = c.rows, n = c.columns, k = depth();
    std::vector<float> a_KM(static_cast<size_t>(k * m)), sum_M(static_cast<size_t>(m));
    for (int64_t i = 0; i < m; ++i)
      for (int64_t at = 0; at < k; ++at)
        a_KM[static_cast<size_t>(at * m + i)] =
            operation.transposed_a ? a.load(a_data, at, i) : a.load(a_data, i, at);
    for (int64_t j = 0; j < n; ++j) {
      std::fill(sum_M.begin(), sum_M.end(), 0.0f);
      for (int64_t step = 0; step < k; ++step) {
        const int64_t at = algorithm == 0 ? step : k - 1 - step;
        const float factor = operation.transposed_b ? b.load(b_data, j, at) : b.load(b_data, at, j);
        const float* const a_M = a_KM.data() + at * m;
        for (int64_t i = 0; i < m; ++i) sum_M[static_cast<size_t>(i)] += factor * a_M[i];
      }
      for (int64_t i = 0; i < m; ++i) {
        const float product = alpha * sum_M[static_cast<size_t>(i)];
        c.store(c_data, i, j, beta == 0 ? product : product + beta * c.load(c_data, i, j));
      }
    }
  }
};

template <class T>
const T& at(const void* handle) {
  return *static_cast<const T*>(handle);
}
bool is_aligned(const void* matrix) {
  return reinterpret_cast<uintptr_t>(matrix) % kAlignment == 0;
}
int algorithm_of(const cublasLtMatmulAlgo_t& algorithm) {
  return static_cast<int>(algorithm.data[0]) - 1;  // one that nobody chose is none
}
cublasLtMatmulHeuristicResult_t result_of(int algorithm) {
  cublasLtMatmulHeuristicResult_t result = {};
  result.algo.data[0] = static_cast<uint64_t>(algorithm) + 1;
  result.state = CUBLAS_STATUS_SUCCESS;
  result.wavesCount = 1;
  return result;
}

}  // namespace
}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

extern "C" {

cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = reinterpret_cast<cublasLtHandle_t>(new char);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete reinterpret_cast<char*>(handle);
  return CUBLAS_STATUS_SUCCESS;
}
const char* cublasLtGetStatusName(cublasStatus_t) {
  return "on the CPU";
}
const char* cublasLtGetStatusString(cublasStatus_t) {
  return "the product is not one that it computes";
}
size_t cublasLtGetVersion() {
  return CUBLAS_VERSION;
}

cublasStatus_t cublasLtMatmulDescCreate(cublasLtMatmulDesc_t* operation, cublasComputeType_t,
                                        cudaDataType_t scale) {
  *operation = reinterpret_cast<cublasLtMatmulDesc_t>(new Operation);
  return scale == CUDA_R_32F ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_INVALID_VALUE;
}
cublasStatus_t cublasLtMatmulDescDestroy(cublasLtMatmulDesc_t operation) {
  delete reinterpret_cast<Operation*>(operation);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t operation,
                                              cublasLtMatmulDescAttributes_t attribute,
                                              const void* value, size_t) {
  const bool transposed = at<cublasOperation_t>(value) == CUBLAS_OP_T;
  Operation& to = *reinterpret_cast<Operation*>(operation);
  if (attribute == CUBLASLT_MATMUL_DESC_TRANSA)
    to.transposed_a = transposed;
  else if (attribute == CUBLASLT_MATMUL_DESC_TRANSB)
    to.transposed_b = transposed;
  else
    return CUBLAS_STATUS_INVALID_VALUE;
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatrixLayoutCreate(cublasLtMatrixLayout_t* layout, cudaDataType type,
                                          uint64_t rows, uint64_t columns, int64_t stride) {
  *layout = reinterpret_cast<cublasLtMatrixLayout_t>(
      new Layout{type, static_cast<int64_t>(rows), static_cast<int64_t>(columns), stride});
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatrixLayoutDestroy(cublasLtMatrixLayout_t layout) {
  delete reinterpret_cast<Layout*>(layout);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulPreferenceCreate(cublasLtMatmulPreference_t* preference) {
  *preference = reinterpret_cast<cublasLtMatmulPreference_t>(new Preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceDestroy(cublasLtMatmulPreference_t preference) {
  delete reinterpret_cast<Preference*>(preference);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                    cublasLtMatmulPreferenceAttributes_t attribute,
                                                    const void* value, size_t) {
  uint32_t& least = reinterpret_cast<Preference*>(preference)->least_alignment;
  if (attribute >= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES &&
      attribute <= CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES)
    least = std::min(least, at<uint32_t>(value));
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t, cublasLtMatmulDesc_t operation,
                                              cublasLtMatrixLayout_t a, cublasLtMatrixLayout_t b,
                                              cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t,
                                              cublasLtMatmulPreference_t preference, int requested,
                                              cublasLtMatmulHeuristicResult_t results[],
                                              int* found) {
  const Product product{at<Operation>(operation), at<Layout>(a), at<Layout>(b), at<Layout>(c)};
  *found = 0;
  if (!product.fits()) return CUBLAS_STATUS_INVALID_VALUE;
  if (at<Preference>(preference).least_alignment < kAlignment) return CUBLAS_STATUS_NOT_SUPPORTED;
  for (; *found < std::min(requested, kAlgorithms); ++*found) results[*found] = result_of(*found);
  return CUBLAS_STATUS_SUCCESS;
}
cublasStatus_t cublasLtMatmulAlgoCheck(cublasLtHandle_t, cublasLtMatmulDesc_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       cublasLtMatrixLayout_t, cublasLtMatrixLayout_t,
                                       const cublasLtMatmulAlgo_t* algorithm,
                                       cublasLtMatmulHeuristicResult_t* result) {
  const int chosen = algorithm_of(*algorithm);
  if (chosen < 0 || chosen >= kAlgorithms) return CUBLAS_STATUS_INVALID_VALUE;
  *result = result_of(chosen);
  return CUBLAS_STATUS_SUCCESS;
}

cublasStatus_t cublasLtMatmul(cublasLtHandle_t, cublasLtMatmulDesc_t operation, const void* alpha,
                              const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                              cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                              cublasLtMatrixLayout_t c_layout, void* d,
                              cublasLtMatrixLayout_t d_layout,
                              const cublasLtMatmulAlgo_t* algorithm, void*, size_t,
                              cudaStream_t stream) {
  const Product product{at<Operation>(operation), at<Layout>(a_layout), at<Layout>(b_layout),
                        at<Layout>(c_layout),     at<float>(alpha),     at<float>(beta),
                        algorithm_of(*algorithm)};
  const bool is_ours = product.algorithm >= 0 && product.algorithm < kAlgorithms;
  if (!is_ours || !product.fits() || c != d || c_layout != d_layout || !is_aligned(a) ||
      !is_aligned(b) || !is_aligned(d))
    return CUBLAS_STATUS_INVALID_VALUE;
  queue(stream, [=] { product.run(a, b, d); });
  return CUBLAS_STATUS_SUCCESS;
}

}  // extern "C"
