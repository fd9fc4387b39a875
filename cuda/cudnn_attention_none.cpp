// Takes the place of cudnn_attention.cpp in a build without cuDNN: no shape has a plan.
#include "cuda/cudnn_attention.h"

namespace dstrain {

class CudnnAttention::Plans {};

CudnnAttention::CudnnAttention(const CudaDevice&) {}
CudnnAttention::~CudnnAttention() = default;
std::optional<int64_t> CudnnAttention::workspace_bytes(const CudnnAttentionShape&) {
  return std::nullopt;
}
void CudnnAttention::run(Stream&, const CudnnAttentionShape&, const CudnnPointers&, void*) {
  DSTRAIN_CHECK(false, "this build has no attention by cuDNN");
}

}  // namespace dstrain
