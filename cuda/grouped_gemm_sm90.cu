// GroupedGemm: describes the groups to the Hopper kernels in device memory, and chooses among them.
#include <algorithm>
#include <limits>

#include "cuda/grouped_gemm_arrays.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int64_t kMaxGroups = 65535;

// An operand or the output. Group e begins group_bytes * e behind `data`, and row_bytes per row of
// the groups before it.
struct Matrix {
  char* data;
  int64_t group_bytes, row_bytes, stride;
};

// D[m, n] = A[m, k] B[k, n], where m is the number of rows of the group.
struct Product {
  Matrix a, b, d;
  int n, k;
};

Product describe(GroupedProduct product, const GroupedLinear& l) {
  constexpr int64_t kBytes = sizeof(bf16);
  const auto as_char = [](void* data) { return static_cast<char*>(data); };
  const Matrix x{as_char(l.x_RI), 0, l.x_stride * kBytes, l.x_stride};
  const Matrix y{as_char(l.y_RO), 0, l.y_stride * kBytes, l.y_stride};
  const Matrix weight{as_char(l.weight_EOI), l.O * l.I * kBytes, 0, l.I};
  const int O = static_cast<int>(l.O), I = static_cast<int>(l.I);
  return product == GroupedProduct::forward ? Product{x, weight, y, O, I}
                                            : Product{y, weight, x, I, O};
}

__global__ void describe_groups_kernel(const int32_t* __restrict__ offsets_E1, int E, int R,
                                       Product product, GroupedGemmArrays arrays) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    const int64_t begin = offsets_E1 ? offsets_E1[e] : 0;
    const int rows = (offsets_E1 ? offsets_E1[e + 1] : R) - static_cast<int>(begin);
    const auto address = [&](const Matrix& x) {
      return x.data + e * x.group_bytes + begin * x.row_bytes;
    };
    arrays.shapes[e] = {rows, product.n, product.k};
    arrays.a[e] = address(product.a);
    arrays.b[e] = address(product.b);
    arrays.d[e] = address(product.d);
    arrays.a_strides[e] = product.a.stride;
    arrays.b_strides[e] = product.b.stride;
    arrays.d_strides[e] = product.d.stride;
  }
}

// The arrays and the kernels' work space, one after the other, from `at` on.
GroupedGemmArrays lay_out(int64_t E, void* scratch) {
  char* at = static_cast<char*>(scratch);
  const auto take = [&](int64_t bytes) {
    char* const piece = at;
    at += ScratchPieces::padded(bytes);
    return piece;
  };
  GroupedGemmArrays arrays;
  arrays.shapes = reinterpret_cast<GroupedGemmArrays::Shape*>(take(E * sizeof(*arrays.shapes)));
  arrays.a = reinterpret_cast<const void**>(take(E * sizeof(void*)));
  arrays.b = reinterpret_cast<const void**>(take(E * sizeof(void*)));
  arrays.d = reinterpret_cast<void**>(take(E * sizeof(void*)));
  arrays.a_strides = reinterpret_cast<int64_t*>(take(E * sizeof(int64_t)));
  arrays.b_strides = reinterpret_cast<int64_t*>(take(E * sizeof(int64_t)));
  arrays.d_strides = reinterpret_cast<int64_t*>(take(E * sizeof(int64_t)));
  arrays.workspace = at;
  return arrays;
}

int64_t round_up(int64_t n, int64_t multiple) {
  return ceil_div(n, multiple) * multiple;
}

}  // namespace

GroupedTiling choose_grouped_tiling(GroupedProduct product, const GroupedLinear& l) {
  // The last tile of a group is half empty on average.
  const int64_t columns = product == GroupedProduct::forward ? l.O : l.I, rows = l.R / l.E;
  const int64_t c256x256 = (rows + 128) * round_up(columns, 256);
  const int64_t c128x512 = (rows + 64) * round_up(columns, 512);
  return c128x512 < c256x256 ? GroupedTiling::c128x512 : GroupedTiling::c256x256;
}

GroupedGemm::GroupedGemm(const CudaDevice& device)
    : available_(device.is_hopper()), num_sms_(device.num_sms) {
  if (!available_) return;
  prepare_grouped_forward();
  prepare_grouped_backward_input();
}

bool GroupedGemm::takes(GroupedProduct product, const GroupedLinear& l) const {
  constexpr int64_t kAlignment = 16 / sizeof(bf16), kMaxDim = std::numeric_limits<int>::max();
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return available_ && product != GroupedProduct::backward_weight && l.E > 0 &&
         l.E <= kMaxGroups && l.O > 0 && l.I > 0 && l.O <= kMaxDim && l.I <= kMaxDim && l.R > 0 &&
         l.I % kAlignment == 0 && l.x_stride % kAlignment == 0 && l.y_stride % kAlignment == 0 &&
         aligned(l.x_RI) && aligned(l.y_RO) && aligned(l.weight_EOI);
}

int64_t GroupedGemm::scratch_bytes(int64_t groups) const {
  const int64_t arrays = ScratchPieces::padded(groups * int64_t{sizeof(GroupedGemmArrays::Shape)}) +
                         6 * ScratchPieces::padded(groups * int64_t{sizeof(int64_t)});
  return arrays + grouped_gemm_workspace_bytes(num_sms_);
}

void GroupedGemm::run(Stream& stream, GroupedProduct product, const GroupedLinear& l,
                      void* scratch) const {
  const cudaStream_t s = cuda(stream);
  const int E = static_cast<int>(l.E), sms = sms_for(stream, num_sms_);
  const GroupedTiling tiling = choose_grouped_tiling(product, l);
  const GroupedGemmArrays arrays = lay_out(l.E, scratch);
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(256, round_up(l.E, 32)));
  describe_groups_kernel<<<1, threads, 0, s>>>(l.offsets_E1, E, static_cast<int>(l.R),
                                               describe(product, l), arrays);
  check_launch("grouped product: shapes of the groups");
  if (product == GroupedProduct::forward)
    run_grouped_forward(s, tiling, arrays, E, sms);
  else
    run_grouped_backward_input(s, tiling, arrays, E, sms);
}

}  // namespace dstrain
