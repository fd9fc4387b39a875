// dx = dy W_e: the rows of W_e lie with the columns of dx inside.
#include "cuda/grouped_gemm_sm90.h"

namespace dstrain {
namespace {

template <class Cluster>
using BackwardInput = GroupedKernel<cutlass::layout::RowMajor, Cluster>;
using BackwardInput256x256 = BackwardInput<cute::Shape<cute::_2, cute::_1, cute::_1>>;
using BackwardInput128x512 = BackwardInput<cute::Shape<cute::_1, cute::_2, cute::_1>>;

}  // namespace

void prepare_grouped_backward_input() {
  BackwardInput256x256::prepare();
  BackwardInput128x512::prepare();
}

void run_grouped_backward_input(cudaStream_t stream, GroupedTiling tiling,
                                const GroupedGemmArrays& arrays, int groups, int num_sms) {
  if (tiling == GroupedTiling::c128x512)
    BackwardInput128x512::run(stream, arrays, groups, num_sms);
  else
    BackwardInput256x256::run(stream, arrays, groups, num_sms);
}

}  // namespace dstrain
