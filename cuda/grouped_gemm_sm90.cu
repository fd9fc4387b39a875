// GroupedGemm: describes the groups to the Hopper kernels in device memory, and chooses among them.
#include <algorithm>
#include <limits>

#include "cuda/grouped_gemm_arrays.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int64_t kMaxGroups = 65535;  // a dim of a grid

// An operand or the output. Group e begins group_bytes * e behind `data`, and row_bytes per row of
// the groups before it.
struct Matrix {
  char* data;
  int64_t group_bytes, row_bytes, stride;
};

// D[m, n] = A[m, k] B[k, n]. Of m and k, the one that is kRows is the number of rows of the group.
struct Product {
  Matrix a, b, d;
  int m, n, k;
};
constexpr int kRows = -1;

Product describe(GroupedProduct product, const GroupedLinear& l, GroupedTiling tiling) {
  constexpr int64_t kBytes = sizeof(bf16);
  const auto as_char = [](void* data) { return static_cast<char*>(data); };
  const Matrix x{as_char(l.x_RI), 0, l.x_stride * kBytes, l.x_stride};
  const Matrix y{as_char(l.y_RO), 0, l.y_stride * kBytes, l.y_stride};
  const Matrix weight{as_char(l.weight_EOI), l.O * l.I * kBytes, 0, l.I};
  const Matrix dweight{as_char(l.weight_EOI), l.O * l.I * int64_t{sizeof(float)}, 0, l.I};
  const int O = static_cast<int>(l.O), I = static_cast<int>(l.I);
  switch (product) {
    case GroupedProduct::forward:
      return {x, weight, y, kRows, O, I};
    case GroupedProduct::backward_input:
      return {y, weight, x, kRows, I, O};
    default:
      return tiling == GroupedTiling::c512x128 ? Product{x, y, dweight, I, O, kRows}
                                               : Product{y, x, dweight, O, I, kRows};
  }
}

// A group without rows becomes a product without output: the kernels do not know sums of nothing.
__global__ void describe_groups_kernel(const int32_t* __restrict__ offsets_E1, int E, int R,
                                       Product product, GroupedGemmArrays arrays) {
  for (int e = threadIdx.x; e < E; e += blockDim.x) {
    const int64_t begin = offsets_E1 ? offsets_E1[e] : 0;
    const int rows = (offsets_E1 ? offsets_E1[e + 1] : R) - static_cast<int>(begin);
    const auto address = [&](const Matrix& x) {
      return x.data + e * x.group_bytes + begin * x.row_bytes;
    };
    const int m = product.m == kRows ? rows : product.m;
    arrays.shapes[e] = {rows == 0 ? 0 : m, product.n, product.k == kRows ? rows : product.k};
    arrays.a[e] = address(product.a);
    arrays.b[e] = address(product.b);
    arrays.d[e] = address(product.d);
    arrays.a_strides[e] = product.a.stride;
    arrays.b_strides[e] = product.b.stride;
    arrays.d_strides[e] = product.d.stride;
  }
}

// Zeros in the weight gradients of groups without rows; n is a multiple of 4.
__global__ void clear_empty_groups_kernel(const int32_t* __restrict__ offsets_E1, int64_t n,
                                          float* __restrict__ dweight_En) {
  const int64_t e = blockIdx.y;
  if (offsets_E1 && offsets_E1[e] != offsets_E1[e + 1]) return;
  float4* const dweight = reinterpret_cast<float4*>(dweight_En + e * n);
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n / 4;
       i += int64_t{gridDim.x} * blockDim.x)
    dweight[i] = float4{0, 0, 0, 0};
}

void clear_empty_groups(cudaStream_t stream, const GroupedLinear& l) {
  constexpr int kBlocks = 32, kThreads = 256;
  if (!l.offsets_E1 && l.R > 0) return;
  clear_empty_groups_kernel<<<dim3(kBlocks, static_cast<unsigned>(l.E)), kThreads, 0, stream>>>(
      l.offsets_E1, l.O * l.I, static_cast<float*>(l.weight_EOI));
  check_launch("grouped product: groups without rows");
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
  if (product == GroupedProduct::backward_weight) {
    const int64_t c256x256 = round_up(l.O, 256) * round_up(l.I, 256);
    const int64_t c512x128 = round_up(l.O, 512) * round_up(l.I, 128);
    return c512x128 < c256x256 ? GroupedTiling::c512x128 : GroupedTiling::c256x256;
  }
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
  prepare_grouped_backward_weight();
}

bool GroupedGemm::takes(GroupedProduct product, const GroupedLinear& l) const {
  constexpr int64_t kAlignment = 16 / sizeof(bf16), kMaxDim = std::numeric_limits<int>::max();
  const auto aligned = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  return available_ && l.E > 0 && l.E <= kMaxGroups && l.O > 0 && l.I > 0 && l.O <= kMaxDim &&
         l.I <= kMaxDim && (l.R > 0 || product == GroupedProduct::backward_weight) &&
         l.I % kAlignment == 0 && l.x_stride % kAlignment == 0 && l.y_stride % kAlignment == 0 &&
         aligned(l.x_RI) && aligned(l.y_RO) && aligned(l.weight_EOI);
}

int64_t GroupedGemm::scratch_bytes(int64_t groups) const {
  const int64_t arrays = ScratchPieces::padded(groups * int64_t{sizeof(GroupedGemmArrays::Shape)}) +
                         6 * ScratchPieces::padded(groups * int64_t{sizeof(int64_t)});
  return arrays + grouped_gemm_workspace_bytes(num_sms_);
}

void GroupedGemm::run(Stream& stream, GroupedProduct product, const GroupedLinear& l,
                      Accumulate accumulate, void* scratch) const {
  const cudaStream_t s = cuda(stream);
  const bool weight = product == GroupedProduct::backward_weight,
             add = accumulate == Accumulate::add;
  if (weight && !add) clear_empty_groups(s, l);
  if (l.R == 0) return;
  const int E = static_cast<int>(l.E);
  const GroupedTiling tiling = choose_grouped_tiling(product, l);
  const GroupedGemmArrays arrays = lay_out(l.E, scratch);
  const unsigned threads = static_cast<unsigned>(std::min<int64_t>(256, round_up(l.E, 32)));
  describe_groups_kernel<<<1, threads, 0, s>>>(l.offsets_E1, E, static_cast<int>(l.R),
                                               describe(product, l, tiling), arrays);
  check_launch("grouped product: shapes of the groups");
  switch (product) {
    case GroupedProduct::forward:
      return run_grouped_forward(s, tiling, arrays, E, num_sms_);
    case GroupedProduct::backward_input:
      return run_grouped_backward_input(s, tiling, arrays, E, num_sms_);
    case GroupedProduct::backward_weight:
      return run_grouped_backward_weight(s, tiling, arrays, E, num_sms_, add);
  }
}

}  // namespace dstrain
