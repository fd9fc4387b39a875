#include "cuda/cuda_ops.h"

#include "cuda/cuda_matmul.h"
#include "cuda/cudnn_attention.h"
#include "cuda/ffn_hopper.h"
#include "cuda/grouped_gemm.h"
#include "cuda/weight_gradient_hopper.h"

namespace dstrain {
static constexpr double kTuningSeconds = 2;

CudaOps::CudaOps(const CudaDevice& device)
    : device_(device),
      matmul_(std::make_unique<CudaMatmul>(device)),
      cudnn_attention_(std::make_unique<CudnnAttention>(device)),
      grouped_gemm_(std::make_unique<GroupedGemm>(device)),
      hopper_ffn_(std::make_unique<HopperFfn>(device)),
      hopper_weight_gradient_(std::make_unique<HopperWeightGradient>(device)) {}

CudaOps::~CudaOps() = default;

void CudaOps::tune(Stream& stream, const std::string& cache_folder) {
  matmul_->tune(stream, {cache_folder, kTuningSeconds});
}

}  // namespace dstrain
