// The functions of cuBLASLt that this room calls, looked up in the library at first use: it is half
// a gigabyte, and only runs on a GPU need it. Its own header declares them.
#include <cublasLt.h>
#include <dlfcn.h>

#include <string>

#include "core/base/error.h"

namespace dstrain {
namespace {

constexpr const char* kLibrary = "libcublasLt.so.13";

void* symbol(const char* name) {
  static void* const library = dlopen(kLibrary, RTLD_NOW | RTLD_LOCAL);
  if (!library)
    throw RuntimeFailure(std::string("matrix products on a GPU need ") + kLibrary +
                         " of the CUDA toolkit, which cannot be loaded: " + dlerror() +
                         "; install it, or name its folder in LD_LIBRARY_PATH");
  void* const address = dlsym(library, name);
  if (!address)
    throw RuntimeFailure(std::string(kLibrary) + " has no function " + name +
                         "; it is not the one of CUDA 13");
  return address;
}

}  // namespace
}  // namespace dstrain

#define DSTRAIN_FORWARD(Result, name, parameters, arguments)                                      \
  Result CUBLASWINAPI name parameters {                                                           \
    static auto* const function = reinterpret_cast<Result(*) parameters>(dstrain::symbol(#name)); \
    return function arguments;                                                                    \
  }

extern "C" {

DSTRAIN_FORWARD(cublasStatus_t, cublasLtCreate, (cublasLtHandle_t * handle), (handle))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtDestroy, (cublasLtHandle_t handle), (handle))
DSTRAIN_FORWARD(const char*, cublasLtGetStatusName, (cublasStatus_t status), (status))
DSTRAIN_FORWARD(const char*, cublasLtGetStatusString, (cublasStatus_t status), (status))
DSTRAIN_FORWARD(size_t, cublasLtGetVersion, (void), ())
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmul,
                (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, const void* alpha,
                 const void* a, cublasLtMatrixLayout_t a_layout, const void* b,
                 cublasLtMatrixLayout_t b_layout, const void* beta, const void* c,
                 cublasLtMatrixLayout_t c_layout, void* d, cublasLtMatrixLayout_t d_layout,
                 const cublasLtMatmulAlgo_t* algorithm, void* workspace, size_t bytes,
                 cudaStream_t stream),
                (handle, operation, alpha, a, a_layout, b, b_layout, beta, c, c_layout, d, d_layout,
                 algorithm, workspace, bytes, stream))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulAlgoCheck,
                (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                 cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                 const cublasLtMatmulAlgo_t* algorithm, cublasLtMatmulHeuristicResult_t* result),
                (handle, operation, a, b, c, d, algorithm, result))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulAlgoGetHeuristic,
                (cublasLtHandle_t handle, cublasLtMatmulDesc_t operation, cublasLtMatrixLayout_t a,
                 cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                 cublasLtMatmulPreference_t preference, int requested,
                 cublasLtMatmulHeuristicResult_t results[], int* found),
                (handle, operation, a, b, c, d, preference, requested, results, found))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulDescCreate,
                (cublasLtMatmulDesc_t * operation, cublasComputeType_t compute,
                 cudaDataType_t scale),
                (operation, compute, scale))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulDescDestroy, (cublasLtMatmulDesc_t operation),
                (operation))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulDescSetAttribute,
                (cublasLtMatmulDesc_t operation, cublasLtMatmulDescAttributes_t attribute,
                 const void* value, size_t bytes),
                (operation, attribute, value, bytes))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceCreate,
                (cublasLtMatmulPreference_t * preference), (preference))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceDestroy,
                (cublasLtMatmulPreference_t preference), (preference))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatmulPreferenceSetAttribute,
                (cublasLtMatmulPreference_t preference,
                 cublasLtMatmulPreferenceAttributes_t attribute, const void* value, size_t bytes),
                (preference, attribute, value, bytes))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatrixLayoutCreate,
                (cublasLtMatrixLayout_t * layout, cudaDataType type, uint64_t rows,
                 uint64_t columns, int64_t stride),
                (layout, type, rows, columns, stride))
DSTRAIN_FORWARD(cublasStatus_t, cublasLtMatrixLayoutDestroy, (cublasLtMatrixLayout_t layout),
                (layout))

}  // extern "C"
