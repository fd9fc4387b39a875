// The gated feed-forward: the products of ops_grouped.cu, and SwiGLU between them.
//   h = silu(gate) * up * w,  silu(g) = g s, s = 1 / (1 + exp(-g)),  silu'(g) = s (1 + g (1 - s))
// Sums and functions in f32. The gradient of h is stored in h's own memory until h itself takes its
// place. Legend: E groups (experts), R rows of all groups, D hidden size, I intermediate size, w
// row weight.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"
#include "cuda/planning_ops.h"

namespace dstrain {
namespace {

// One element where 16 bytes at a time do not fit.
template <class F>
struct One {
  static constexpr int kSize = 1;
  F at[1];
  __device__ static One stream(const F* from) { return {{*from}}; }
  __device__ void store(F* to) const { *to = at[0]; }
};

template <class F>
__device__ float sigmoid(float x) {
  if constexpr (std::is_same_v<F, float>)
    return 1.f / (1.f + expf(-x));
  else
    return __fdividef(1.f, 1.f + __expf(-x));
}

// Rows outside of the groups are neither read nor written. row_weight_R may be null (1).
struct Groups {
  const int32_t* offsets_E1;  // null: all rows
  int64_t E, R;

  __device__ bool has(int64_t row) const {
    return offsets_E1 ? row >= offsets_E1[0] && row < offsets_E1[E] : row < R;
  }
};

// A thread has the same columns of kRows rows, so that several loads are under way.
constexpr int kRows = 2;
template <class F, class V>
__global__ void swiglu_kernel(Groups groups, const F* __restrict__ gate_up_R2I, int64_t stride,
                              const float* __restrict__ row_weight_R, int64_t I,
                              F* __restrict__ h_RI, int64_t h_stride) {
  const int64_t i = (int64_t{blockIdx.y} * blockDim.x + threadIdx.x) * V::kSize;
  const int64_t row0 = int64_t{blockIdx.x} * kRows;
  if (i >= I) return;
  V gate[kRows], up[kRows];
  bool has[kRows];
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    has[k] = groups.has(row0 + k);
    if (!has[k]) continue;
    const F* const from = gate_up_R2I + (row0 + k) * stride + i;
    gate[k] = V::stream(from);
    up[k] = V::stream(from + I);
  }
#pragma unroll
  for (int k = 0; k < kRows; ++k) {
    if (!has[k]) continue;
    const float weight = row_weight_R ? row_weight_R[row0 + k] : 1.f;
    V h;
#pragma unroll
    for (int j = 0; j < V::kSize; ++j) {
      const float g = to_float(gate[k].at[j]);
      h.at[j] = from_float<F>(g * sigmoid<F>(g) * to_float(up[k].at[j]) * weight);
    }
    h.store(h_RI + (row0 + k) * h_stride + i);
  }
}

template <class F, class V>
struct Gradients {
  V dgate, dup, h;
  float drow_weight;
};
// drow_weight = sum dh silu(gate) up over the vector.
template <class F, class V>
__device__ Gradients<F, V> swiglu_backward(const V& dh, const V& gate, const V& up, float weight) {
  Gradients<F, V> out;
  out.drow_weight = 0;
#pragma unroll
  for (int j = 0; j < V::kSize; ++j) {
    const float g = to_float(gate.at[j]), u = to_float(up.at[j]), d = to_float(dh.at[j]);
    const float s = sigmoid<F>(g), activated = g * s, product = activated * u,
                dproduct = d * weight;
    out.drow_weight += d * product;
    out.h.at[j] = from_float<F>(product * weight);
    out.dup.at[j] = from_float<F>(dproduct * activated);
    out.dgate.at[j] = from_float<F>(dproduct * u * (s + activated * (1.f - s)));
  }
  return out;
}

// One warp per row, which sums drow_weight. h_RI holds dh before; a thread reads and writes the
// same elements.
constexpr int kWarps = 8;
template <class F, class V>
__global__ void __launch_bounds__(kWarps * 32)
    swiglu_backward_kernel(Groups groups, const F* __restrict__ gate_up_R2I, int64_t stride,
                           const float* __restrict__ row_weight_R, int64_t I,
                           F* __restrict__ dgate_up_R2I, int64_t dstride, F* h_RI, int64_t h_stride,
                           float* __restrict__ drow_weight_R) {
  const int64_t row = int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (!groups.has(row)) return;
  const F* const gate_up = gate_up_R2I + row * stride;
  F* const dgate_up = dgate_up_R2I + row * dstride;
  F* const h = h_RI + row * h_stride;
  const float weight = row_weight_R ? row_weight_R[row] : 1.f;
  float drow_weight = 0;
  for (int64_t i = threadIdx.x % 32 * V::kSize; i < I; i += 32 * V::kSize) {
    const V dh = V::stream(h + i), gate = V::stream(gate_up + i), up = V::stream(gate_up + I + i);
    V dgate, dup, h_again;
#pragma unroll
    for (int j = 0; j < V::kSize; ++j) {
      const float g = to_float(gate.at[j]), u = to_float(up.at[j]), d = to_float(dh.at[j]);
      const float s = sigmoid<F>(g), activated = g * s, product = activated * u;
      const float dproduct = d * weight;
      drow_weight += d * product;
      h_again.at[j] = from_float<F>(product * weight);
      dup.at[j] = from_float<F>(dproduct * activated);
      dgate.at[j] = from_float<F>(dproduct * u * (s + activated * (1.f - s)));
    }
    dgate.store(dgate_up + i);
    dup.store(dgate_up + I + i);
    h_again.store(h + i);
  }
  if (!drow_weight_R) return;
  drow_weight = warp_sum(drow_weight);
  if (threadIdx.x % 32 == 0) drow_weight_R[row] = drow_weight;
}

// Calls f.template operator()<F, V>() with the widest V that fits all of the matrices, whose second
// half begins at column I where they hold gate and up.
template <class Function>
void dispatch_vectors(const char* op, const Tensor& h_RI, std::initializer_list<Tensor> gate_ups,
                      const Function& f) {
  const int64_t I = h_RI.size(1);
  dispatch_f(h_RI.dtype(), op, [&]<class F>() {
    bool vectors = fits_vectors<F>(h_RI.raw(), I, h_RI.row_stride());
    for (const Tensor& x : gate_ups) vectors &= fits_vectors<F>(x.raw(), I, x.row_stride());
    if (vectors)
      f.template operator()<F, Vec<F>>();
    else
      f.template operator()<F, One<F>>();
  });
}

}  // namespace

void CudaOps::ffn_up(Stream& stream, const Tensor& x_XD, const Tensor& row_index_R,
                     const Tensor& weight_E2ID, const Tensor& offsets_E1,
                     const Tensor& row_weight_R, const Tensor& gate_up_R2I, const Tensor& h_RI) {
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_E2ID.size(0);
  expect_strided(gate_up_R2I, "ffn_up: gate_up_R2I", h_RI.dtype(), {R, 2 * I});
  if (row_weight_R.defined()) expect(row_weight_R, "ffn_up: row_weight_R", DType::f32, {R});
  if (R == 0 || I == 0) return;
  grouped_matmul(stream, x_XD, row_index_R, weight_E2ID, offsets_E1, gate_up_R2I);
  const Groups groups{pointer<const int32_t>(offsets_E1), E, R};
  dispatch_vectors("ffn_up", h_RI, {gate_up_R2I}, [&]<class F, class V>() {
    constexpr int64_t kMaxThreads = 256;
    const int64_t columns = ceil_div(I, V::kSize);
    const int64_t threads = std::min(kMaxThreads, ceil_div(columns, 32) * 32);
    const dim3 grid(static_cast<unsigned>(ceil_div(R, kRows)),
                    static_cast<unsigned>(ceil_div(columns, threads)));
    swiglu_kernel<F, V><<<grid, static_cast<unsigned>(threads), 0, cuda(stream)>>>(
        groups, pointer<F>(gate_up_R2I), gate_up_R2I.row_stride(), pointer<float>(row_weight_R), I,
        pointer<F>(h_RI), h_RI.row_stride());
  });
  check_launch("ffn_up");
}

void CudaOps::ffn_down_backward_input(Stream& stream, const Tensor& dy_XD,
                                      const Tensor& row_index_R, const Tensor& weight_EDI,
                                      const Tensor& offsets_E1, const Tensor& gate_up_R2I,
                                      const Tensor& row_weight_R, const Tensor& dgate_up_R2I,
                                      const Tensor& h_RI, const Tensor& drow_weight_R) {
  const DType dtype = h_RI.dtype();
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_EDI.size(0);
  expect_strided(gate_up_R2I, "ffn_down_backward_input: gate_up_R2I", dtype, {R, 2 * I});
  expect_strided(dgate_up_R2I, "ffn_down_backward_input: dgate_up_R2I", dtype, {R, 2 * I});
  for (const Tensor* weight : {&row_weight_R, &drow_weight_R})
    if (weight->defined())
      expect(*weight, "ffn_down_backward_input: (d)row_weight_R", DType::f32, {R});
  if (R == 0 || I == 0) return;
  grouped_matmul_backward_input(stream, dy_XD, row_index_R, weight_EDI, offsets_E1, h_RI);
  const Groups groups{pointer<const int32_t>(offsets_E1), E, R};
  dispatch_vectors(
      "ffn_down_backward_input", h_RI, {gate_up_R2I, dgate_up_R2I}, [&]<class F, class V>() {
        const unsigned blocks = static_cast<unsigned>(ceil_div(R, kWarps));
        swiglu_backward_kernel<F, V><<<blocks, kWarps * 32, 0, cuda(stream)>>>(
            groups, pointer<F>(gate_up_R2I), gate_up_R2I.row_stride(), pointer<float>(row_weight_R),
            I, pointer<F>(dgate_up_R2I), dgate_up_R2I.row_stride(), pointer<F>(h_RI),
            h_RI.row_stride(), pointer<float>(drow_weight_R));
      });
  check_launch("ffn_down_backward_input");
}

void PlanningOps::ffn_up(Stream& stream, const Tensor& x_XD, const Tensor& row_index_R,
                         const Tensor& weight_E2ID, const Tensor& offsets_E1, const Tensor&,
                         const Tensor& gate_up_R2I, const Tensor&) {
  grouped_matmul(stream, x_XD, row_index_R, weight_E2ID, offsets_E1, gate_up_R2I);
}

void PlanningOps::ffn_down_backward_input(Stream& stream, const Tensor& dy_XD,
                                          const Tensor& row_index_R, const Tensor& weight_EDI,
                                          const Tensor& offsets_E1, const Tensor&, const Tensor&,
                                          const Tensor&, const Tensor& h_RI, const Tensor&) {
  grouped_matmul_backward_input(stream, dy_XD, row_index_R, weight_EDI, offsets_E1, h_RI);
}

}  // namespace dstrain
