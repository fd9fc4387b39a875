// Takes the place of grouped_gemm_sm90*.cu in a build without CUTLASS: no product is taken.
#include "cuda/grouped_gemm.h"

namespace dstrain {

GroupedTiling choose_grouped_tiling(GroupedProduct, const GroupedLinear&) {
  return GroupedTiling::c256x256;
}
GroupedGemm::GroupedGemm(const CudaDevice& device) : num_sms_(device.num_sms) {}
bool GroupedGemm::takes(GroupedProduct, const GroupedLinear&) const {
  return available_;
}
int64_t GroupedGemm::scratch_bytes(int64_t) const {
  return 0;
}
void GroupedGemm::run(Stream&, GroupedProduct, const GroupedLinear&, void*) const {
  DSTRAIN_CHECK(false, "this build has no grouped products for Hopper");
}

}  // namespace dstrain
