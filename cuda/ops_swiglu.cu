// The gated feed-forward: products with SwiGLU in them where HopperFfn takes them, and else those
// of ops_grouped.cu, and SwiGLU after them.
//   h = silu(gate) * up * w,  silu(g) = g s, s = 1 / (1 + exp(-g)),  silu'(g) = s (1 + g (1 - s))
// Sums and functions in f32. After a product of its own, the gradient of h is stored in h's memory
// until h itself takes its place. Legend: E groups (experts), R rows of all groups, D hidden size,
// I intermediate size, w row weight.
#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/ffn_hopper.h"
#include "cuda/gathered_rows.h"
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

// The products as HopperFfn is asked for them. Until they are gathered, the input's rows are those
// that the index names.
struct Request {
  HopperFfnCall call;
  DType dtype;
  Tensor index_R;

  int64_t gathered_bytes() const { return gathered_rows_bytes(index_R, call.D); }
  int64_t sums_bytes() const {
    return ScratchPieces::padded(HopperFfn::scratch_floats(call.R, call.I) *
                                 int64_t{sizeof(float)});
  }
  void gather(Stream& stream, ScratchPieces& scratch) {
    gather_group_rows(stream, call.offsets_E1, call.E, index_R, call.D, scratch, &call.input_RD,
                      &call.input_stride);
  }
};

bool takes(const HopperFfn& ffn, const Request& r) {
  return r.dtype == DType::bf16 && ffn.takes(r.call);
}

Request request(const Tensor& input_XD, const Tensor& row_index_R, const Tensor& weight,
                const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
                const Tensor& h_RI) {
  const int64_t E = weight.size(0), R = h_RI.size(0);
  if (offsets_E1.defined())
    expect(offsets_E1, "the feed-forward's offsets_E1", DType::i32, {E + 1});
  else
    DSTRAIN_CHECK(E == 1, "a feed-forward without offsets has one group");
  if (row_index_R.defined())
    expect(row_index_R, "the feed-forward's row_index_R", DType::i32, {R});
  else
    DSTRAIN_CHECK(input_XD.size(0) == R, "a feed-forward without row index reads all rows");
  return {{.E = E,
           .R = R,
           .D = input_XD.size(1),
           .I = h_RI.size(1),
           .offsets_E1 = pointer<const int32_t>(offsets_E1),
           .input_RD = input_XD.raw(),
           .weight = weight.raw(),
           .row_weight_R = pointer<const float>(row_weight_R),
           .gate_up_R2I = gate_up_R2I.raw(),
           .h_RI = h_RI.raw(),
           .input_stride = input_XD.row_stride(),
           .gate_up_stride = gate_up_R2I.row_stride(),
           .h_stride = h_RI.row_stride()},
          h_RI.dtype(),
          row_index_R};
}

Request up_request(const Tensor& x_XD, const Tensor& row_index_R, const Tensor& weight_E2ID,
                   const Tensor& offsets_E1, const Tensor& row_weight_R, const Tensor& gate_up_R2I,
                   const Tensor& h_RI) {
  const DType dtype = h_RI.dtype();
  const int64_t R = h_RI.size(0), I = h_RI.size(1), D = x_XD.size(1);
  expect_strided(x_XD, "ffn_up: x_XD", dtype, {x_XD.size(0), D});
  expect(weight_E2ID, "ffn_up: weight_E2ID", dtype, {weight_E2ID.size(0), 2 * I, D});
  expect_strided(gate_up_R2I, "ffn_up: gate_up_R2I", dtype, {R, 2 * I});
  if (row_weight_R.defined()) expect(row_weight_R, "ffn_up: row_weight_R", DType::f32, {R});
  return request(x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
}

Request down_request(const Tensor& dy_XD, const Tensor& row_index_R, const Tensor& weight_EDI,
                     const Tensor& offsets_E1, const Tensor& gate_up_R2I,
                     const Tensor& row_weight_R, const Tensor& dgate_up_R2I, const Tensor& h_RI,
                     const Tensor& drow_weight_R) {
  const DType dtype = h_RI.dtype();
  const int64_t R = h_RI.size(0), I = h_RI.size(1), D = dy_XD.size(1);
  expect_strided(dy_XD, "ffn_down_backward_input: dy_XD", dtype, {dy_XD.size(0), D});
  expect(weight_EDI, "ffn_down_backward_input: weight_EDI", dtype, {weight_EDI.size(0), D, I});
  expect_strided(gate_up_R2I, "ffn_down_backward_input: gate_up_R2I", dtype, {R, 2 * I});
  expect_strided(dgate_up_R2I, "ffn_down_backward_input: dgate_up_R2I", dtype, {R, 2 * I});
  for (const Tensor* weight : {&row_weight_R, &drow_weight_R})
    if (weight->defined())
      expect(*weight, "ffn_down_backward_input: (d)row_weight_R", DType::f32, {R});
  Request r = request(dy_XD, row_index_R, weight_EDI, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
  r.call.dgate_up_R2I = dgate_up_R2I.raw();
  r.call.dgate_up_stride = dgate_up_R2I.row_stride();
  r.call.drow_weight_R = pointer<float>(drow_weight_R);
  return r;
}

}  // namespace

void CudaOps::ffn_up(Stream& stream, const Tensor& x_XD, const Tensor& row_index_R,
                     const Tensor& weight_E2ID, const Tensor& offsets_E1,
                     const Tensor& row_weight_R, const Tensor& gate_up_R2I, const Tensor& h_RI) {
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_E2ID.size(0);
  Request r =
      up_request(x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
  if (R == 0 || I == 0) return;
  if (takes(*hopper_ffn_, r)) {
    ScratchPieces scratch(stream, r.gathered_bytes());
    r.gather(stream, scratch);
    hopper_ffn_->up(stream, r.call);
    return;
  }
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
  const int64_t R = h_RI.size(0), I = h_RI.size(1), E = weight_EDI.size(0);
  Request r = down_request(dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I, row_weight_R,
                           dgate_up_R2I, h_RI, drow_weight_R);
  if (R == 0 || I == 0) return;
  if (takes(*hopper_ffn_, r)) {
    ScratchPieces scratch(stream, r.gathered_bytes() + r.sums_bytes());
    r.gather(stream, scratch);
    hopper_ffn_->down_backward_input(
        stream, r.call, scratch.take<float>(HopperFfn::scratch_floats(r.call.R, r.call.I)));
    return;
  }
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
                         const Tensor& weight_E2ID, const Tensor& offsets_E1,
                         const Tensor& row_weight_R, const Tensor& gate_up_R2I,
                         const Tensor& h_RI) {
  const Request r =
      up_request(x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R, gate_up_R2I, h_RI);
  if (takes(*ops_.hopper_ffn_, r))
    note(r.gathered_bytes());
  else
    grouped_matmul(stream, x_XD, row_index_R, weight_E2ID, offsets_E1, gate_up_R2I);
}

void PlanningOps::ffn_down_backward_input(Stream& stream, const Tensor& dy_XD,
                                          const Tensor& row_index_R, const Tensor& weight_EDI,
                                          const Tensor& offsets_E1, const Tensor& gate_up_R2I,
                                          const Tensor& row_weight_R, const Tensor& dgate_up_R2I,
                                          const Tensor& h_RI, const Tensor& drow_weight_R) {
  const Request r = down_request(dy_XD, row_index_R, weight_EDI, offsets_E1, gate_up_R2I,
                                 row_weight_R, dgate_up_R2I, h_RI, drow_weight_R);
  if (takes(*ops_.hopper_ffn_, r))
    note(r.gathered_bytes() + r.sums_bytes());
  else
    grouped_matmul_backward_input(stream, dy_XD, row_index_R, weight_EDI, offsets_E1, h_RI);
}

}  // namespace dstrain
