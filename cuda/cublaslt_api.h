// cuBLASLt's handles as owners, and its failures as exceptions.
#pragma once

#include <cublasLt.h>

#include <memory>
#include <string_view>

#include "core/base/error.h"

namespace dstrain {

// Throws RuntimeFailure: what was tried, and what the library says of it.
[[noreturn]] void throw_cublas(cublasStatus_t status, std::string_view what);

inline void check_cublas(cublasStatus_t status, std::string_view what) {
  if (status != CUBLAS_STATUS_SUCCESS) throw_cublas(status, what);
}

template <auto destroy>
struct LtDestroy {
  template <class Handle>
  void operator()(Handle* handle) const {
    destroy(handle);
  }
};
using LtContext = std::unique_ptr<cublasLtContext, LtDestroy<cublasLtDestroy>>;
using LtOperation =
    std::unique_ptr<cublasLtMatmulDescOpaque_t, LtDestroy<cublasLtMatmulDescDestroy>>;
using LtLayout =
    std::unique_ptr<cublasLtMatrixLayoutOpaque_t, LtDestroy<cublasLtMatrixLayoutDestroy>>;
using LtPreference =
    std::unique_ptr<cublasLtMatmulPreferenceOpaque_t, LtDestroy<cublasLtMatmulPreferenceDestroy>>;

inline LtContext make_lt_context() {
  cublasLtHandle_t handle = nullptr;
  check_cublas(cublasLtCreate(&handle), "opening the library");
  return LtContext(handle);
}

inline LtOperation make_lt_operation(cublasComputeType_t compute, cublasOperation_t a,
                                     cublasOperation_t b) {
  constexpr const char* kWhat = "describing a product";
  cublasLtMatmulDesc_t operation = nullptr;
  check_cublas(cublasLtMatmulDescCreate(&operation, compute, CUDA_R_32F), kWhat);
  LtOperation owner(operation);
  check_cublas(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSA, &a, sizeof a),
               kWhat);
  check_cublas(cublasLtMatmulDescSetAttribute(operation, CUBLASLT_MATMUL_DESC_TRANSB, &b, sizeof b),
               kWhat);
  return owner;
}

// Column-major, as the library sees matrices: columns `stride` elements apart.
inline LtLayout make_lt_layout(cudaDataType_t type, int64_t rows, int64_t columns, int64_t stride) {
  cublasLtMatrixLayout_t layout = nullptr;
  check_cublas(cublasLtMatrixLayoutCreate(&layout, type, static_cast<uint64_t>(rows),
                                          static_cast<uint64_t>(columns), stride),
               "describing a matrix");
  return LtLayout(layout);
}

class LtPreferences {
 public:
  LtPreferences() {
    cublasLtMatmulPreference_t preference = nullptr;
    check_cublas(cublasLtMatmulPreferenceCreate(&preference), kWhat);
    owner_.reset(preference);
  }
  template <class Value>
  void set(cublasLtMatmulPreferenceAttributes_t attribute, Value value) {
    check_cublas(
        cublasLtMatmulPreferenceSetAttribute(owner_.get(), attribute, &value, sizeof value), kWhat);
  }
  cublasLtMatmulPreference_t get() const { return owner_.get(); }

 private:
  static constexpr const char* kWhat = "describing what an algorithm may use";
  LtPreference owner_;
};

}  // namespace dstrain
