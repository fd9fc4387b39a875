// Products over groups of rows. One group of rows as they lie is a plain product. Else they go to
// the Hopper kernels where these take them, with gathered rows copied into scratch memory, and to
// the portable ones where not. Legend: E groups (experts), R rows of all groups, O and I output and
// input features.
#include <string>

#include "core/backend/expect.h"
#include "cuda/cuda_ops.h"
#include "cuda/gathered_rows.h"
#include "cuda/grouped_gemm.h"
#include "cuda/grouped_portable.h"
#include "cuda/kernel.cuh"
#include "cuda/planning_ops.h"
#include "cuda/weight_gradient_hopper.h"

namespace dstrain {
namespace {

// A product as it is asked for.
struct Request {
  GroupedProduct product;
  DType dtype;
  GroupedLinear linear;
  Tensor x_index_R, y_index_R;
  Accumulate accumulate = Accumulate::overwrite;
};

void expect_rows(const Tensor& x, const Tensor& index, const char* name, DType dtype, int64_t rows,
                 int64_t columns) {
  DSTRAIN_CHECK(x.defined() && x.dims() == 2, std::string(name) + " must be a matrix");
  if (index.defined()) expect(index, "the row index", DType::i32, {rows});
  expect_strided(x, name, dtype, {index.defined() ? x.size(0) : rows, columns});
}

// x [R, I], y [R, O] and weight [E, O, I] with offsets [E + 1], which may be absent.
GroupedLinear linear_of(const Tensor& x, const Tensor& y, const Tensor& weight,
                        const Tensor& offsets_E1, int64_t R) {
  GroupedLinear l{.E = weight.size(0), .R = R, .O = weight.size(1), .I = weight.size(2)};
  if (offsets_E1.defined()) {
    expect(offsets_E1, "offsets_E1", DType::i32, {l.E + 1});
  } else {
    DSTRAIN_CHECK(l.E == 1, "a product without offsets has one group");
  }
  l.offsets_E1 = pointer<const int32_t>(offsets_E1);
  l.x_RI = x.raw();
  l.y_RO = y.raw();
  l.weight_EOI = weight.raw();
  l.x_stride = x.row_stride();
  l.y_stride = y.row_stride();
  return l;
}

Request forward_request(const Tensor& x_XI, const Tensor& row_index_R, const Tensor& weight_EOI,
                        const Tensor& offsets_E1, const Tensor& y_RO) {
  const DType dtype = y_RO.dtype();
  const int64_t R = y_RO.size(0), O = weight_EOI.size(1), I = weight_EOI.size(2);
  expect_rows(x_XI, row_index_R, "grouped_matmul: x_XI", dtype, R, I);
  expect(weight_EOI, "grouped_matmul: weight_EOI", dtype, {weight_EOI.size(0), O, I});
  expect_strided(y_RO, "grouped_matmul: y_RO", dtype, {R, O});
  return {GroupedProduct::forward,
          dtype,
          linear_of(x_XI, y_RO, weight_EOI, offsets_E1, R),
          row_index_R,
          {}};
}

Request backward_input_request(const Tensor& dy_XO, const Tensor& row_index_R,
                               const Tensor& weight_EOI, const Tensor& offsets_E1,
                               const Tensor& dx_RI) {
  const DType dtype = dx_RI.dtype();
  const int64_t R = dx_RI.size(0), O = weight_EOI.size(1), I = weight_EOI.size(2);
  expect_rows(dy_XO, row_index_R, "grouped_matmul_backward_input: dy_XO", dtype, R, O);
  expect(weight_EOI, "grouped_matmul_backward_input: weight_EOI", dtype,
         {weight_EOI.size(0), O, I});
  expect_strided(dx_RI, "grouped_matmul_backward_input: dx_RI", dtype, {R, I});
  return {GroupedProduct::backward_input,
          dtype,
          linear_of(dx_RI, dy_XO, weight_EOI, offsets_E1, R),
          {},
          row_index_R};
}

Request backward_weight_request(const Tensor& dy_XO, const Tensor& dy_index_R, const Tensor& x_XI,
                                const Tensor& x_index_R, const Tensor& offsets_E1,
                                Accumulate accumulate, const Tensor& dweight_EOI) {
  const DType dtype = dy_XO.dtype();
  const int64_t R = dy_index_R.defined() ? dy_index_R.size(0) : dy_XO.size(0);
  const int64_t E = dweight_EOI.size(0), O = dweight_EOI.size(1), I = dweight_EOI.size(2);
  expect_rows(dy_XO, dy_index_R, "grouped_matmul_backward_weight: dy_XO", dtype, R, O);
  expect_rows(x_XI, x_index_R, "grouped_matmul_backward_weight: x_XI", dtype, R, I);
  expect(dweight_EOI, "grouped_matmul_backward_weight: dweight_EOI", DType::f32, {E, O, I});
  return {GroupedProduct::backward_weight,
          dtype,
          linear_of(x_XI, dy_XO, dweight_EOI, offsets_E1, R),
          x_index_R,
          dy_index_R,
          accumulate};
}

// One group whose rows are used as they lie.
bool is_plain(const Request& r, const Tensor& offsets_E1) {
  return !offsets_E1.defined() && !r.x_index_R.defined() && !r.y_index_R.defined();
}
Tensor matrix(const Tensor& weight_1OI) {
  return weight_1OI.view({weight_1OI.size(1), weight_1OI.size(2)});
}

// Gathered rows lie one after the other; only their memory is not known yet.
GroupedLinear gathered(const Request& r) {
  GroupedLinear l = r.linear;
  if (r.x_index_R.defined()) l.x_stride = l.I;
  if (r.y_index_R.defined()) l.y_stride = l.O;
  return l;
}

// The kernels for Hopper. Scratch memory is that of a product whose rows lie as they are.
class HopperKernels {
 public:
  HopperKernels(const GroupedGemm& gemm, const HopperWeightGradient& weight_gradient)
      : gemm_(gemm), weight_gradient_(weight_gradient) {}

  bool takes(const Request& r) const {
    return is_weight_gradient(r) || (r.dtype == DType::bf16 && gemm_.takes(r.product, r.linear) &&
                                     gemm_.takes(r.product, gathered(r)));
  }
  int64_t scratch_bytes(const Request& r) const {
    return is_weight_gradient(r) ? 0 : gemm_.scratch_bytes(r.linear.E);
  }
  // `linear` is that of the request, with gathered rows.
  void run(Stream& stream, const Request& r, const GroupedLinear& linear, void* scratch) const {
    if (is_weight_gradient(r))
      weight_gradient_.run(stream, linear, r.accumulate);
    else
      gemm_.run(stream, r.product, linear, scratch);
  }

 private:
  bool is_weight_gradient(const Request& r) const {
    return r.product == GroupedProduct::backward_weight && r.dtype == DType::bf16 &&
           weight_gradient_.takes(r.linear) && weight_gradient_.takes(gathered(r));
  }

  const GroupedGemm& gemm_;
  const HopperWeightGradient& weight_gradient_;
};

// Whether a plain product goes to them, too: those of ops_matmul.cu leave no room (Stream::leave_room).
bool leaves_room(Stream& stream, const HopperKernels& kernels, const Request& r) {
  return cuda_stream(stream).room() > 0 && kernels.takes(r);
}
int64_t scratch_for(const HopperKernels& kernels, const Request& r) {
  if (!kernels.takes(r)) return 0;
  return gathered_rows_bytes(r.x_index_R, r.linear.I) +
         gathered_rows_bytes(r.y_index_R, r.linear.O) +
         ScratchPieces::padded(kernels.scratch_bytes(r));
}

void run(Stream& stream, const HopperKernels& kernels, const Request& r) {
  if (!kernels.takes(r)) {
    run_grouped_portable(stream, r.product, r.dtype, r.linear, pointer<const int32_t>(r.x_index_R),
                         pointer<const int32_t>(r.y_index_R), r.accumulate);
    return;
  }
  GroupedLinear l = r.linear;
  ScratchPieces scratch(stream, scratch_for(kernels, r));
  gather_group_rows(stream, l.offsets_E1, l.E, r.x_index_R, l.I, scratch, &l.x_RI, &l.x_stride);
  gather_group_rows(stream, l.offsets_E1, l.E, r.y_index_R, l.O, scratch, &l.y_RO, &l.y_stride);
  kernels.run(stream, r, l, scratch.take<char>(kernels.scratch_bytes(r)));
}

}  // namespace

void CudaOps::grouped_matmul(Stream& stream, const Tensor& x_XI, const Tensor& row_index_R,
                             const Tensor& weight_EOI, const Tensor& offsets_E1,
                             const Tensor& y_RO) {
  const Request r = forward_request(x_XI, row_index_R, weight_EOI, offsets_E1, y_RO);
  const HopperKernels kernels(*grouped_gemm_, *hopper_weight_gradient_);
  if (is_plain(r, offsets_E1) && !leaves_room(stream, kernels, r))
    matmul(stream, Trans::no, Trans::yes, 1, x_XI, matrix(weight_EOI), 0, y_RO);
  else
    run(stream, kernels, r);
}

void CudaOps::grouped_matmul_backward_input(Stream& stream, const Tensor& dy_XO,
                                            const Tensor& row_index_R, const Tensor& weight_EOI,
                                            const Tensor& offsets_E1, const Tensor& dx_RI) {
  const Request r = backward_input_request(dy_XO, row_index_R, weight_EOI, offsets_E1, dx_RI);
  const HopperKernels kernels(*grouped_gemm_, *hopper_weight_gradient_);
  if (is_plain(r, offsets_E1) && !leaves_room(stream, kernels, r))
    matmul(stream, Trans::no, Trans::no, 1, dy_XO, matrix(weight_EOI), 0, dx_RI);
  else
    run(stream, kernels, r);
}

void CudaOps::grouped_matmul_backward_weight(Stream& stream, const Tensor& dy_XO,
                                             const Tensor& dy_index_R, const Tensor& x_XI,
                                             const Tensor& x_index_R, const Tensor& offsets_E1,
                                             Accumulate accumulate, const Tensor& dweight_EOI) {
  const Request r = backward_weight_request(dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1,
                                            accumulate, dweight_EOI);
  if (is_plain(r, offsets_E1))
    matmul(stream, Trans::yes, Trans::no, 1, dy_XO, x_XI, accumulate == Accumulate::add ? 1 : 0,
           matrix(dweight_EOI));
  else
    run(stream, {*grouped_gemm_, *hopper_weight_gradient_}, r);
}

void PlanningOps::grouped_matmul(Stream& stream, const Tensor& x_XI, const Tensor& row_index_R,
                                 const Tensor& weight_EOI, const Tensor& offsets_E1,
                                 const Tensor& y_RO) {
  const Request r = forward_request(x_XI, row_index_R, weight_EOI, offsets_E1, y_RO);
  if (is_plain(r, offsets_E1))
    matmul(stream, Trans::no, Trans::yes, 1, x_XI, matrix(weight_EOI), 0, y_RO);
  else
    note(scratch_for({*ops_.grouped_gemm_, *ops_.hopper_weight_gradient_}, r));
}

void PlanningOps::grouped_matmul_backward_input(Stream& stream, const Tensor& dy_XO,
                                                const Tensor& row_index_R, const Tensor& weight_EOI,
                                                const Tensor& offsets_E1, const Tensor& dx_RI) {
  const Request r = backward_input_request(dy_XO, row_index_R, weight_EOI, offsets_E1, dx_RI);
  if (is_plain(r, offsets_E1))
    matmul(stream, Trans::no, Trans::no, 1, dy_XO, matrix(weight_EOI), 0, dx_RI);
  else
    note(scratch_for({*ops_.grouped_gemm_, *ops_.hopper_weight_gradient_}, r));
}

void PlanningOps::grouped_matmul_backward_weight(Stream& stream, const Tensor& dy_XO,
                                                 const Tensor& dy_index_R, const Tensor& x_XI,
                                                 const Tensor& x_index_R, const Tensor& offsets_E1,
                                                 Accumulate accumulate, const Tensor& dweight_EOI) {
  const Request r = backward_weight_request(dy_XO, dy_index_R, x_XI, x_index_R, offsets_E1,
                                            accumulate, dweight_EOI);
  if (is_plain(r, offsets_E1))
    matmul(stream, Trans::yes, Trans::no, 1, dy_XO, x_XI, accumulate == Accumulate::add ? 1 : 0,
           matrix(dweight_EOI));
  else
    note(scratch_for({*ops_.grouped_gemm_, *ops_.hopper_weight_gradient_}, r));
}

}  // namespace dstrain
