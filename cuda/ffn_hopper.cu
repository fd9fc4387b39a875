#include "cuda/ffn_hopper.h"

#include <limits>

#include "cuda/ffn_hopper.cuh"
#include "cuda/tensor_map.h"

namespace dstrain {
namespace {

using hopper::Down;
using hopper::Problem;
using hopper::Up;

// out[r] = sum over n of partial[n, r]
__global__ void sum_tiles_kernel(const int32_t* __restrict__ offsets_E1, int64_t E, int64_t R,
                                 int tiles, const float* __restrict__ partial_NR,
                                 float* __restrict__ out_R) {
  const int64_t row = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (row >= R || (offsets_E1 && (row < offsets_E1[0] || row >= offsets_E1[E]))) return;
  float sum = 0;
  for (int n = 0; n < tiles; ++n) sum += partial_NR[n * R + row];
  out_R[row] = sum;
}

template <class Op>
void prepare() {
  constexpr int kBytes = sizeof(hopper::SharedMemory<Op>);
  static_assert(kBytes <= 227 * 1024);
  check_cuda(cudaFuncSetAttribute(hopper::grouped_kernel<Op>,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes),
             "preparing the feed-forward's products");
}

template <class Op>
int column_tiles(int64_t I) {
  return static_cast<int>(ceil_div(I, Op::kColumns));
}

template <class Op>
void launch(cudaStream_t stream, int num_sms, const HopperFfnCall& c, const BoxedTensor& weight,
            const typename Op::Params& params) {
  const BoxedTensor input{.data = c.input_RD,
                          .sizes_xyz = {c.D, c.R, 1},
                          .y_stride = c.input_stride,
                          .z_stride = c.R * c.input_stride,
                          .box_y = hopper::kTileRows};
  const Problem problem{.offsets_E1 = c.offsets_E1,
                        .groups = static_cast<int>(c.E),
                        .rows = static_cast<int>(c.R),
                        .depth = static_cast<int>(c.D),
                        .column_tiles = column_tiles<Op>(c.I)};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = hopper::kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(num_sms / hopper::kCluster * hopper::kCluster);
  config.blockDim = hopper::kThreads;
  config.dynamicSmemBytes = sizeof(hopper::SharedMemory<Op>);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(&config, hopper::grouped_kernel<Op>, input.encode(),
                                weight.encode(), problem, params),
             "the feed-forward's product");
}

}  // namespace

HopperFfn::HopperFfn(const CudaDevice& device)
    : available_(device.is_hopper()), num_sms_(device.num_sms) {
  if (!available_) return;
  prepare<Up>();
  prepare<Down>();
}

bool HopperFfn::takes(const HopperFfnCall& c) const {
  constexpr int64_t kMax = std::numeric_limits<int>::max() / 2;
  const auto aligned = [](const void* data, int64_t stride) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride % 8 == 0;
  };
  const int64_t tiles = (ceil_div(c.R, hopper::kClusterRows) + c.E) * column_tiles<Up>(c.I);
  return available_ && num_sms_ >= hopper::kCluster && c.E > 0 && c.E <= hopper::kMaxGroups &&
         c.R > 0 && c.D > 0 && c.I > 0 && c.R <= kMax && c.D <= kMax && c.I <= kMax / 2 &&
         tiles <= kMax && c.D % 8 == 0 && aligned(c.input_RD, c.input_stride) &&
         aligned(c.weight, c.I) && aligned(c.gate_up_R2I, c.gate_up_stride) &&
         aligned(c.h_RI, c.h_stride) && aligned(c.dgate_up_R2I, c.dgate_up_stride);
}

void HopperFfn::up(Stream& stream, const HopperFfnCall& c) const {
  const BoxedTensor weight{.data = c.weight,
                           .sizes_xyz = {c.D, 2 * c.I, c.E},
                           .y_stride = c.D,
                           .z_stride = 2 * c.I * c.D,
                           .box_y = Up::kBoxRows};
  launch<Up>(cuda(stream), sms_for(stream, num_sms_), c, weight,
             {.gate_up_R2I = static_cast<bf16*>(c.gate_up_R2I),
              .h_RI = static_cast<bf16*>(c.h_RI),
              .row_weight_R = c.row_weight_R,
              .gate_up_stride = c.gate_up_stride,
              .h_stride = c.h_stride,
              .I = static_cast<int>(c.I)});
}

int64_t HopperFfn::scratch_floats(int64_t R, int64_t I) {
  return R * column_tiles<Down>(I);
}

void HopperFfn::down_backward_input(Stream& stream, const HopperFfnCall& c, float* scratch) const {
  const BoxedTensor weight{.data = c.weight,
                           .sizes_xyz = {c.I, c.D, c.E},
                           .y_stride = c.I,
                           .z_stride = c.D * c.I,
                           .box_y = Down::kBoxRows};
  launch<Down>(cuda(stream), sms_for(stream, num_sms_), c, weight,
               {.gate_up_R2I = static_cast<const bf16*>(c.gate_up_R2I),
                .dgate_up_R2I = static_cast<bf16*>(c.dgate_up_R2I),
                .h_RI = static_cast<bf16*>(c.h_RI),
                .row_weight_R = c.row_weight_R,
                .drow_weight_NR = c.drow_weight_R ? scratch : nullptr,
                .gate_up_stride = c.gate_up_stride,
                .dgate_up_stride = c.dgate_up_stride,
                .h_stride = c.h_stride,
                .R = c.R,
                .I = static_cast<int>(c.I)});
  if (!c.drow_weight_R) return;
  constexpr int kThreads = 256;
  sum_tiles_kernel<<<static_cast<unsigned>(ceil_div(c.R, kThreads)), kThreads, 0, cuda(stream)>>>(
      c.offsets_E1, c.E, c.R, column_tiles<Down>(c.I), scratch, c.drow_weight_R);
  check_launch("the feed-forward's gradients of row weights");
}

}  // namespace dstrain
