#include "cuda/tensor_map.h"

#include <cudaTypedefs.h>

#include <string>

#include "cuda/cuda_check.h"

namespace dstrain {
namespace {

// The driver's function: a program that links the driver's library would not start without a GPU.
PFN_cuTensorMapEncodeTiled_v12000 find_encoder() {
  constexpr unsigned kVersion = 12000;
  void* function = nullptr;
  cudaDriverEntryPointQueryResult found{};
  check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, kVersion,
                                              cudaEnableDefault, &found),
             "looking up cuTensorMapEncodeTiled");
  if (found != cudaDriverEntryPointSuccess)
    throw RuntimeFailure("The NVIDIA driver has no cuTensorMapEncodeTiled; update the driver.");
  return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap BoxedTensor::encode() const {
  static const PFN_cuTensorMapEncodeTiled_v12000 encoder = find_encoder();
  constexpr cuuint32_t kDims = 3;
  const int bytes = element == Element::bf16 ? 2 : 4;
  const auto unsigned_of = [](int64_t n) { return static_cast<cuuint64_t>(n); };
  const cuuint64_t sizes[kDims] = {unsigned_of(sizes_xyz[0]), unsigned_of(sizes_xyz[1]),
                                   unsigned_of(sizes_xyz[2])};
  const cuuint64_t strides[kDims - 1] = {unsigned_of(y_stride * bytes),
                                         unsigned_of(z_stride * bytes)};
  const cuuint32_t box[kDims] = {static_cast<cuuint32_t>(128 / bytes),
                                 static_cast<cuuint32_t>(box_y), 1};
  const cuuint32_t steps[kDims] = {1, 1, 1};
  CUtensorMap map;
  const CUresult result = encoder(
      &map,
      element == Element::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
      kDims, const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
      CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  DSTRAIN_CHECK(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled refused a tensor: error " +
                                            std::to_string(static_cast<int>(result)));
  return map;
}

}  // namespace dstrain
