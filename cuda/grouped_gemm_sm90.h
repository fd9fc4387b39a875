// CUTLASS's grouped product for Hopper: a persistent kernel whose blocks walk over the output tiles
// of all groups, in the order of the groups. Shapes, addresses and strides of the groups lie in
// device memory. One source file instantiates one product: each costs minutes to compile.
#pragma once

#include <cutlass/cutlass.h>
#include <cutlass/gemm/device/gemm_universal_adapter.h>
#include <cutlass/epilogue/collective/collective_builder.hpp>
#include <cutlass/gemm/collective/collective_builder.hpp>
#include <cutlass/gemm/kernel/gemm_universal.hpp>

#include "cuda/cuda_check.h"
#include "cuda/grouped_gemm_arrays.h"

namespace dstrain {

// D = A B per group, in bf16. A is M x K, B is K x N, D is M x N; A and D lie by rows. A block
// computes 128 x 256 of D. The two blocks of a cluster share what they load of B if one is above
// the other (cluster 2 x 1), of A if they are side by side (1 x 2).
template <class LayoutB, class ClusterMNK>
class GroupedKernel {
  using TileMNK = cute::Shape<cute::_128, cute::_256, cute::_64>;
  using Element = cutlass::bfloat16_t;
  using Shape = cutlass::gemm::GroupProblemShape<cute::Shape<int, int, int>>;
  using ByRows = cutlass::layout::RowMajor;
  static constexpr int kAlignment = 16 / sizeof(Element);

  using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, TileMNK, ClusterMNK,
      cutlass::epilogue::collective::EpilogueTileAuto, float, float, void, ByRows*, kAlignment,
      Element, ByRows*, kAlignment, cutlass::epilogue::PtrArrayTmaWarpSpecializedCooperative,
      cutlass::epilogue::fusion::LinearCombination<Element, float, void, float>>::CollectiveOp;
  using Mainloop = typename cutlass::gemm::collective::CollectiveBuilder<
      cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Element, ByRows*, kAlignment, Element,
      LayoutB*, kAlignment, float, TileMNK, ClusterMNK,
      cutlass::gemm::collective::StageCountAutoCarveout<static_cast<int>(
          sizeof(typename Epilogue::SharedStorage))>,
      cutlass::gemm::KernelPtrArrayTmaWarpSpecializedCooperative>::CollectiveOp;
  using Kernel = cutlass::gemm::kernel::GemmUniversal<Shape, Mainloop, Epilogue>;
  using Adapter = cutlass::gemm::device::GemmUniversalAdapter<Kernel>;

  static_assert(Kernel::SharedStorageSize <= 227 * 1024);
  static_assert(Mainloop::DispatchPolicy::Stages == 4);
  // Each stride has one number that is not a constant.
  static_assert(sizeof(typename Kernel::InternalStrideA) == sizeof(int64_t) &&
                sizeof(typename Kernel::InternalStrideB) == sizeof(int64_t) &&
                sizeof(typename Kernel::InternalStrideD) == sizeof(int64_t));
  static_assert(sizeof(cute::Shape<int, int, int>) == sizeof(GroupedGemmArrays::Shape));

  template <class Stride>
  static Stride* strides(int64_t* numbers) {
    return reinterpret_cast<Stride*>(numbers);
  }

 public:
  // Once per process, before run().
  static void prepare() {
    check_cuda(cudaFuncSetAttribute(cutlass::device_kernel<Kernel>,
                                    cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    Kernel::SharedStorageSize),
               "preparing the grouped product");
  }

  static void run(cudaStream_t stream, const GroupedGemmArrays& arrays, int groups, int num_sms) {
    typename Kernel::Arguments arguments;
    arguments.mode = cutlass::gemm::GemmUniversalMode::kGrouped;
    arguments.problem_shape.num_groups = groups;
    arguments.problem_shape.problem_shapes =
        reinterpret_cast<cute::Shape<int, int, int>*>(arrays.shapes);
    arguments.mainloop.ptr_A = reinterpret_cast<const Element**>(arrays.a);
    arguments.mainloop.dA = strides<typename Kernel::InternalStrideA>(arrays.a_strides);
    arguments.mainloop.ptr_B = reinterpret_cast<const Element**>(arrays.b);
    arguments.mainloop.dB = strides<typename Kernel::InternalStrideB>(arrays.b_strides);
    arguments.epilogue.dC = strides<typename Kernel::InternalStrideC>(arrays.d_strides);
    arguments.epilogue.ptr_D = reinterpret_cast<Element**>(arrays.d);
    arguments.epilogue.dD = strides<typename Kernel::InternalStrideD>(arrays.d_strides);
    arguments.hw_info.sm_count = num_sms;
    DSTRAIN_CHECK(static_cast<int64_t>(Kernel::get_workspace_size(arguments)) <=
                      grouped_gemm_workspace_bytes(num_sms),
                  "the grouped product wants more work space than was planned");
    typename Kernel::Params params = Kernel::to_underlying_arguments(arguments, arrays.workspace);
    const cutlass::Status status = Adapter::run(params, stream);
    check_launch("the grouped product");
    DSTRAIN_CHECK(status == cutlass::Status::kSuccess,
                  std::string("the grouped product: ") + cutlass::cutlassGetStatusString(status));
  }
};

}  // namespace dstrain
