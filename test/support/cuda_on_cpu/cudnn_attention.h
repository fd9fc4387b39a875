// What stands for cuDNN's attention (cuda/cudnn_attention.h) tells tests what it was asked for. It
// is there in processes whose environment has DSTRAIN_TEST_CUDNN; in others, back ends find no
// cuDNN.
#pragma once

#include <vector>

#include "cuda/cudnn_attention.h"

namespace cuda_on_cpu {

// Says so if the test cannot run.
bool skipped_without_cudnn();

struct CudnnAttentionRequests {
  std::vector<dstrain::CudnnAttentionShape> plans;  // in this order, each as often as it was named
  std::vector<dstrain::CudnnAttentionShape> runs;
};
// Of all back ends of this process since the last call of this.
CudnnAttentionRequests take_cudnn_attention_requests();

}  // namespace cuda_on_cpu
