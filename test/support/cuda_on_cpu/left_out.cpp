// In place of what needs NVIDIA's libraries or a Hopper GPU: cuBLASLt finds no algorithm for any
// product, so the plain kernel multiplies, and the kernels for Hopper take nothing.
#include "cuda/cuda_matmul.h"
#include "cuda/ffn_hopper.h"
#include "cuda/weight_gradient_hopper.h"

extern "C" cublasStatus_t cublasLtDestroy(cublasLtHandle_t) {
  return CUBLAS_STATUS_SUCCESS;
}

namespace dstrain {

struct CudaMatmul::Plan {};

CudaMatmul::CudaMatmul(const CudaDevice& device) : device_(device) {}
CudaMatmul::~CudaMatmul() = default;
void CudaMatmul::plan(const Product&) {}
void CudaMatmul::tune(Stream&, const MatmulTuning&) {}
bool CudaMatmul::run(cudaStream_t, const Product&, void*) {
  return false;
}

HopperFfn::HopperFfn(const CudaDevice& device) : num_sms_(device.num_sms) {}
bool HopperFfn::takes(const HopperFfnCall&) const {
  return available_;
}
void HopperFfn::up(Stream&, const HopperFfnCall&) const {
  DSTRAIN_CHECK(false, "no Hopper GPU");
}
void HopperFfn::down_backward_input(Stream&, const HopperFfnCall&, float*) const {
  DSTRAIN_CHECK(false, "no Hopper GPU");
}
int64_t HopperFfn::scratch_floats(int64_t, int64_t) {
  return 0;
}

HopperWeightGradient::HopperWeightGradient(const CudaDevice& device) : num_sms_(device.num_sms) {}
bool HopperWeightGradient::takes(const GroupedLinear&) const {
  return available_;
}
void HopperWeightGradient::run(Stream&, const GroupedLinear&, Accumulate) const {
  DSTRAIN_CHECK(false, "no Hopper GPU");
}

}  // namespace dstrain
