#include "cuda/cuda_matmul.h"

#include <fmt/format.h>

#include <algorithm>

#include "cuda/cuda_matmul_plan.h"

namespace dstrain {
namespace {

cudaDataType_t lt_type(DType dtype) {
  return dtype == DType::bf16 ? CUDA_R_16BF : CUDA_R_32F;
}
cublasOperation_t lt_operation(bool transposed) {
  return transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
}

// Partial sums of a split k wait in f32 whatever c is, and are added up by a pass of their own.
// Adding them to c in place, by turns, is left out.
uint32_t reduction_schemes(DType result) {
  return CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE |
         (result == DType::f32 ? static_cast<uint32_t>(CUBLASLT_REDUCTION_SCHEME_OUTPUT_TYPE) : 0u);
}

}  // namespace

void throw_cublas(cublasStatus_t status, std::string_view what) {
  throw RuntimeFailure(fmt::format("cuBLASLt failed: {}: {} ({})", what,
                                   cublasLtGetStatusString(status), cublasLtGetStatusName(status)));
}

CudaMatmul::CudaMatmul(const CudaDevice& device) : device_(device), context_(make_lt_context()) {}
CudaMatmul::~CudaMatmul() = default;

std::unique_ptr<CudaMatmul::Plan> CudaMatmul::describe(const MatmulKey& key) const {
  auto plan = std::make_unique<Plan>();
  plan->key = key;
  plan->operation =
      make_lt_operation(key.tf32 ? CUBLAS_COMPUTE_32F_FAST_TF32 : CUBLAS_COMPUTE_32F,
                        lt_operation(key.transposed_b), lt_operation(key.transposed_a));
  const bool ta = key.transposed_a, tb = key.transposed_b;
  const cudaDataType_t type = lt_type(key.operands);
  plan->a = make_lt_layout(type, ta ? key.m : key.k, ta ? key.k : key.m, key.stride_a);
  plan->b = make_lt_layout(type, tb ? key.k : key.n, tb ? key.n : key.k, key.stride_b);
  plan->c = make_lt_layout(lt_type(key.result), key.n, key.m, key.stride_c);
  const auto found = heuristic(*plan, 1);
  plan->supported = !found.empty();
  if (plan->supported) plan->algorithm = found[0].algo;
  return plan;
}

// The library's best guesses, the likeliest first.
std::vector<cublasLtMatmulHeuristicResult_t> CudaMatmul::heuristic(const Plan& plan,
                                                                   int count) const {
  const MatmulKey& key = plan.key;
  LtPreferences preferences;
  preferences.set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<uint64_t>(kWorkspaceBytes));
  preferences.set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reduction_schemes(key.result));
  preferences.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, uint32_t{key.alignment_b});
  preferences.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, uint32_t{key.alignment_a});
  preferences.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, uint32_t{key.alignment_c});
  preferences.set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, uint32_t{key.alignment_c});
  std::vector<cublasLtMatmulHeuristicResult_t> results(static_cast<size_t>(count));
  int found = 0;
  const cublasStatus_t status = cublasLtMatmulAlgoGetHeuristic(
      context_.get(), plan.operation.get(), plan.b.get(), plan.a.get(), plan.c.get(), plan.c.get(),
      preferences.get(), count, results.data(), &found);
  // Both say that there is none for this type, stride or alignment.
  if (status == CUBLAS_STATUS_NOT_SUPPORTED || status == CUBLAS_STATUS_INVALID_VALUE) return {};
  check_cublas(status, plan.name());
  results.resize(static_cast<size_t>(found));
  std::erase_if(results, [](const cublasLtMatmulHeuristicResult_t& result) {
    return result.state != CUBLAS_STATUS_SUCCESS ||
           result.workspaceSize > static_cast<size_t>(kWorkspaceBytes);
  });
  return results;
}

CudaMatmul::Plan& CudaMatmul::plan_of(const MatmulKey& key) {
  std::unique_ptr<Plan>& plan = plans_[key];
  if (!plan) plan = describe(key);
  return *plan;
}

void CudaMatmul::plan(const Product& product) {
  ++plan_of(key_of(product, device_.tf32)).calls;
}

bool CudaMatmul::run(cudaStream_t stream, const Product& product, void* workspace) {
  const Plan& plan = plan_of(key_of(product, device_.tf32));
  if (!plan.supported) return false;
  const cublasStatus_t status = queue(stream, plan, plan.algorithm, product.alpha, product.beta,
                                      product.a.data, product.b.data, product.c.data, workspace);
  if (status != CUBLAS_STATUS_SUCCESS)
    throw_cublas(status, plan.name());  // the name costs an allocation
  return true;
}

cublasStatus_t CudaMatmul::queue(cudaStream_t stream, const Plan& plan,
                                 const cublasLtMatmulAlgo_t& algorithm, float alpha, float beta,
                                 const void* a, const void* b, void* c, void* workspace) const {
  return cublasLtMatmul(context_.get(), plan.operation.get(), &alpha, b, plan.b.get(), a,
                        plan.a.get(), &beta, c, plan.c.get(), c, plan.c.get(), &algorithm,
                        workspace, static_cast<size_t>(kWorkspaceBytes), stream);
}

std::vector<MatmulTiming> CudaMatmul::timings() const {
  std::vector<MatmulTiming> timings;
  for (const auto& [key, plan] : plans_)
    if (plan->tuned && plan->choice.ms > 0)
      timings.push_back({.shape = shape_text(key),
                         .calls = plan->calls,
                         .ms = plan->choice.ms,
                         .tflops = plan->flops() / plan->choice.ms * 1e-9,
                         .speedup = plan->speedup});
  std::sort(timings.begin(), timings.end(), [](const MatmulTiming& x, const MatmulTiming& y) {
    const double x_ms = x.ms * static_cast<double>(x.calls),
                 y_ms = y.ms * static_cast<double>(y.calls);
    return x_ms != y_ms ? x_ms > y_ms : x.shape < y.shape;
  });
  return timings;
}

}  // namespace dstrain
