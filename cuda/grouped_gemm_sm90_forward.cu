// y = x W_e^T: both operands lie with the summed dim inside.
#include "cuda/grouped_gemm_sm90.h"

namespace dstrain {
namespace {

template <class Cluster>
using Forward = GroupedKernel<cutlass::layout::ColumnMajor, Cluster>;
using Forward256x256 = Forward<cute::Shape<cute::_2, cute::_1, cute::_1>>;
using Forward128x512 = Forward<cute::Shape<cute::_1, cute::_2, cute::_1>>;

}  // namespace

void prepare_grouped_forward() {
  Forward256x256::prepare();
  Forward128x512::prepare();
}

void run_grouped_forward(cudaStream_t stream, GroupedTiling tiling, const GroupedGemmArrays& arrays,
                         int groups, int num_sms) {
  if (tiling == GroupedTiling::c128x512)
    Forward128x512::run(stream, arrays, groups, num_sms);
  else
    Forward256x256::run(stream, arrays, groups, num_sms);
}

}  // namespace dstrain
