#include "core/backend/timed_ops.h"

#include <fmt/format.h>

#include "core/backend/op_cost.h"

namespace dstrain {
namespace {

// Of as many rows of x as `like` has.
double rows_bytes(const Tensor& like, const Tensor& x) {
  return static_cast<double>(like.size(0) * x.row_numel() * dtype_bytes(x.dtype()));
}

double product_flops(double m, double n, double k) {
  return 2 * m * n * k;
}

}  // namespace

std::map<std::string, OpTotal> TimedOps::take_totals() {
  std::map<std::string, OpTotal> totals;
  for (const Call& call : calls_) {
    OpTotal& total = totals[call.name];
    ++total.calls;
    total.seconds += clock_.seconds_between(call.begin, call.end);
    total.flops += call.flops;
    total.bytes += call.bytes;
  }
  calls_.clear();
  clock_.clear();
  return totals;
}

void TimedOps::matmul(Stream& stream, Trans ta, Trans tb, double alpha, const Tensor& a,
                      const Tensor& b, double beta, const Tensor& c) {
  timed(stream,
        fmt::format("matmul {}x{}x{}{}{} {}", c.size(0), c.size(1),
                    ta == Trans::no ? a.size(1) : a.size(0), ta == Trans::no ? " n" : " t",
                    tb == Trans::no ? "n" : "t", dtype_name(c.dtype())),
        product_flops(size_of(c, 0), size_of(c, 1), size_of(a, ta == Trans::no ? 1 : 0)),
        bytes_of({&a, &b, &c}) + (beta == 0 ? 0 : bytes_of({&c})),
        [&] { inner_.matmul(stream, ta, tb, alpha, a, b, beta, c); });
}

void TimedOps::grouped_matmul(Stream& stream, const Tensor& x_XI, const Tensor& row_index_R,
                              const Tensor& weight_EOI, const Tensor& offsets_E1,
                              const Tensor& y_RO) {
  timed(stream, "grouped_matmul",
        product_flops(size_of(y_RO, 0), size_of(y_RO, 1), static_cast<double>(x_XI.row_numel())),
        rows_bytes(y_RO, x_XI) + bytes_of({&weight_EOI, &y_RO}),
        [&] { inner_.grouped_matmul(stream, x_XI, row_index_R, weight_EOI, offsets_E1, y_RO); });
}

void TimedOps::grouped_matmul_backward_input(Stream& stream, const Tensor& dy_XO,
                                             const Tensor& row_index_R, const Tensor& weight_EOI,
                                             const Tensor& offsets_E1, const Tensor& dx_RI) {
  timed(stream, "grouped_matmul_backward_input",
        product_flops(size_of(dx_RI, 0), size_of(dx_RI, 1), static_cast<double>(dy_XO.row_numel())),
        rows_bytes(dx_RI, dy_XO) + bytes_of({&weight_EOI, &dx_RI}), [&] {
          inner_.grouped_matmul_backward_input(stream, dy_XO, row_index_R, weight_EOI, offsets_E1,
                                               dx_RI);
        });
}

void TimedOps::grouped_matmul_backward_weight(Stream& stream, const Tensor& dy_XO,
                                              const Tensor& dy_index_R, const Tensor& x_XI,
                                              const Tensor& x_index_R, const Tensor& offsets_E1,
                                              Accumulate accumulate, const Tensor& dweight_EOI) {
  timed(
      stream, "grouped_matmul_backward_weight",
      product_flops(size_of(dy_index_R.defined()  ? dy_index_R
                            : x_index_R.defined() ? x_index_R
                                                  : x_XI,
                            0),
                    static_cast<double>(dy_XO.row_numel()), static_cast<double>(x_XI.row_numel())),
      bytes_of({&dy_XO, &x_XI, &dweight_EOI}) +
          (accumulate == Accumulate::add ? bytes_of({&dweight_EOI}) : 0),
      [&] {
        inner_.grouped_matmul_backward_weight(stream, dy_XO, dy_index_R, x_XI, x_index_R,
                                              offsets_E1, accumulate, dweight_EOI);
      });
}

void TimedOps::ffn_up(Stream& stream, const Tensor& x_XD, const Tensor& row_index_R,
                      const Tensor& weight_E2ID, const Tensor& offsets_E1,
                      const Tensor& row_weight_R, const Tensor& gate_up_R2I, const Tensor& h_RI) {
  timed(stream, "ffn_up",
        product_flops(size_of(h_RI, 0), static_cast<double>(gate_up_R2I.row_numel()),
                      static_cast<double>(x_XD.row_numel())),
        rows_bytes(h_RI, x_XD) + bytes_of({&weight_E2ID, &gate_up_R2I, &h_RI}), [&] {
          inner_.ffn_up(stream, x_XD, row_index_R, weight_E2ID, offsets_E1, row_weight_R,
                        gate_up_R2I, h_RI);
        });
}

void TimedOps::ffn_down_backward_input(Stream& stream, const Tensor& dy_XD,
                                       const Tensor& row_index_R, const Tensor& weight_EDI,
                                       const Tensor& offsets_E1, const Tensor& gate_up_R2I,
                                       const Tensor& row_weight_R, const Tensor& dgate_up_R2I,
                                       const Tensor& h_RI, const Tensor& drow_weight_R) {
  timed(stream, "ffn_down_backward_input",
        product_flops(size_of(h_RI, 0), static_cast<double>(h_RI.row_numel()),
                      static_cast<double>(dy_XD.row_numel())),
        rows_bytes(h_RI, dy_XD) + bytes_of({&weight_EDI, &gate_up_R2I, &dgate_up_R2I, &h_RI}), [&] {
          inner_.ffn_down_backward_input(stream, dy_XD, row_index_R, weight_EDI, offsets_E1,
                                         gate_up_R2I, row_weight_R, dgate_up_R2I, h_RI,
                                         drow_weight_R);
        });
}

void TimedOps::add_rms_norm(Stream& stream, const Tensor& x_TD, const Tensor& delta_TD,
                            const Tensor& weight_D, double eps, const Tensor& sum_TD,
                            const Tensor& y_TD, const Tensor& rstd_T) {
  timed(stream, "add_rms_norm", 0, bytes_of({&x_TD, &delta_TD, &weight_D, &sum_TD, &y_TD, &rstd_T}),
        [&] { inner_.add_rms_norm(stream, x_TD, delta_TD, weight_D, eps, sum_TD, y_TD, rstd_T); });
}

void TimedOps::rms_norm_backward(Stream& stream, const Tensor& dy_TD, const Tensor& x_TD,
                                 const Tensor& weight_D, const Tensor& rstd_T,
                                 const Tensor& dresidual_TD, Accumulate accumulate,
                                 const Tensor& dx_TD, const Tensor& dweight_D) {
  timed(stream, "rms_norm_backward", 0,
        bytes_of({&dy_TD, &x_TD, &weight_D, &rstd_T, &dresidual_TD, &dx_TD, &dweight_D}), [&] {
          inner_.rms_norm_backward(stream, dy_TD, x_TD, weight_D, rstd_T, dresidual_TD, accumulate,
                                   dx_TD, dweight_D);
        });
}

}  // namespace dstrain
