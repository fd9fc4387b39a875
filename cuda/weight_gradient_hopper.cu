#include "cuda/weight_gradient_hopper.h"

#include <limits>

#include "cuda/kernel.cuh"
#include "cuda/tensor_map.h"
#include "cuda/weight_gradient_hopper.cuh"

namespace dstrain {
namespace {

using namespace hopper::weight_gradient;

constexpr int kSharedBytes = sizeof(SharedMemory);
static_assert(kSharedBytes <= 227 * 1024);

int64_t cluster_tiles(const GroupedLinear& l) {
  return ceil_div(l.O, kClusterRows);
}
int64_t column_tiles(const GroupedLinear& l) {
  return ceil_div(l.I, kTileColumns);
}

BoxedTensor operand(const void* data, int64_t rows, int64_t columns, int64_t stride) {
  return {.data = data,
          .sizes_xyz = {columns, rows, 1},
          .y_stride = stride,
          .z_stride = rows * stride,
          .box_y = kDepth};
}

}  // namespace

HopperWeightGradient::HopperWeightGradient(const CudaDevice& device)
    : available_(device.is_hopper() && device.num_sms >= kCluster), num_sms_(device.num_sms) {
  if (!available_) return;
  check_cuda(cudaFuncSetAttribute(weight_gradient_kernel,
                                  cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes),
             "preparing gradients of weights");
}

bool HopperWeightGradient::takes(const GroupedLinear& l) const {
  constexpr int64_t kMax = std::numeric_limits<int>::max() / 2, kPiece = 16;
  const auto aligned = [](const void* data) {
    return reinterpret_cast<uintptr_t>(data) % kPiece == 0;
  };
  return available_ && l.E > 0 && l.E <= hopper::kMaxGroups && l.R <= kMax && l.O > 0 &&
         l.O <= kMax && l.I > 0 && l.I <= kMax &&
         cluster_tiles(l) * column_tiles(l) <= kMax / l.E && l.I * sizeof(float) % kPiece == 0 &&
         l.x_stride * sizeof(bf16) % kPiece == 0 && l.y_stride * sizeof(bf16) % kPiece == 0 &&
         aligned(l.x_RI) && aligned(l.y_RO) && aligned(l.weight_EOI);
}

void HopperWeightGradient::run(Stream& stream, const GroupedLinear& l,
                               Accumulate accumulate) const {
  if (l.R == 0) {
    if (accumulate == Accumulate::overwrite)
      check_cuda(cudaMemsetAsync(l.weight_EOI, 0, l.E * l.O * l.I * sizeof(float), cuda(stream)),
                 "clearing gradients of weights");
    return;
  }
  const BoxedTensor dweight{.data = l.weight_EOI,
                            .sizes_xyz = {l.I, l.O, l.E},
                            .y_stride = l.I,
                            .z_stride = l.O * l.I,
                            .box_y = kHalfRows,
                            .element = BoxedTensor::Element::f32};
  const Problem problem{.offsets_E1 = l.offsets_E1,
                        .groups = static_cast<int>(l.E),
                        .rows = static_cast<int>(l.R),
                        .O = static_cast<int>(l.O),
                        .I = static_cast<int>(l.I),
                        .cluster_tiles = static_cast<int>(cluster_tiles(l)),
                        .column_tiles = static_cast<int>(column_tiles(l)),
                        .add = accumulate == Accumulate::add};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = kCluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(sms_for(stream, num_sms_) / kCluster * kCluster);
  config.blockDim = kThreads;
  config.dynamicSmemBytes = kSharedBytes;
  config.stream = cuda(stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check_cuda(cudaLaunchKernelEx(
                 &config, weight_gradient_kernel, operand(l.y_RO, l.R, l.O, l.y_stride).encode(),
                 operand(l.x_RI, l.R, l.I, l.x_stride).encode(), dweight.encode(), problem),
             "gradients of weights");
}

}  // namespace dstrain
