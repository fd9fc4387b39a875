// dW_e (+)= dy_e^T x_e in f32, summed over the group's rows. Both operands lie with the summed dim
// outside. The second kernel computes the transposed product x_e^T dy_e and stores it transposed.
#include "cuda/grouped_gemm_sm90.h"

namespace dstrain {
namespace {

template <class LayoutD, class Cluster>
using BackwardWeight =
    GroupedKernel<float, cutlass::layout::ColumnMajor, cutlass::layout::RowMajor, LayoutD, Cluster>;
using BackwardWeight256x256 =
    BackwardWeight<cutlass::layout::RowMajor, cute::Shape<cute::_2, cute::_1, cute::_1>>;
using BackwardWeight512x128 =
    BackwardWeight<cutlass::layout::ColumnMajor, cute::Shape<cute::_1, cute::_2, cute::_1>>;

}  // namespace

void prepare_grouped_backward_weight() {
  BackwardWeight256x256::prepare();
  BackwardWeight512x128::prepare();
}

void run_grouped_backward_weight(cudaStream_t stream, GroupedTiling tiling,
                                 const GroupedGemmArrays& arrays, int groups, int num_sms,
                                 bool add) {
  if (tiling == GroupedTiling::c512x128)
    BackwardWeight512x128::run(stream, arrays, groups, num_sms, add);
  else
    BackwardWeight256x256::run(stream, arrays, groups, num_sms, add);
}

}  // namespace dstrain
