// In place of what needs a Hopper GPU: the kernels for it take nothing.
#include "cuda/ffn_hopper.h"
#include "cuda/weight_gradient_hopper.h"

namespace dstrain {

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
