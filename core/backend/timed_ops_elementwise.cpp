// The optimizer, compression of gradients and what goes over elements one by one, on a clock.
#include "core/backend/op_cost.h"
#include "core/backend/timed_ops.h"

namespace dstrain {

void TimedOps::add_sum_squares(Stream& stream, const Tensor& x, const Tensor& sum_1) {
  timed(stream, "add_sum_squares", 0, bytes_of({&x, &sum_1}),
        [&] { inner_.add_sum_squares(stream, x, sum_1); });
}

void TimedOps::clip_scale(Stream& stream, const Tensor& sum_1, double max_norm, double beta1,
                          double beta2, StepScalars* scalars) {
  timed(stream, "clip_scale", 0, bytes_of({&sum_1}),
        [&] { inner_.clip_scale(stream, sum_1, max_norm, beta1, beta2, scalars); });
}

void TimedOps::adamw(Stream& stream, const AdamWParams& params, const StepScalars* scalars,
                     const Tensor& grad, const Tensor& param, const Tensor& param_low,
                     const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  timed(
      stream, "adamw", 0,
      bytes_of({&grad, &param, &param_low, &exp_avg, &exp_avg_sq, &param, &param_low, &exp_avg,
                &exp_avg_sq}),
      [&] { inner_.adamw(stream, params, scalars, grad, param, param_low, exp_avg, exp_avg_sq); });
}

void TimedOps::fill(Stream& stream, const Tensor& x, double value) {
  timed(stream, "fill", 0, bytes_of({&x}), [&] { inner_.fill(stream, x, value); });
}

void TimedOps::add(Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) {
  timed(stream, "add", 0, bytes_of({&a, &b, &out}), [&] { inner_.add(stream, a, b, out); });
}

void TimedOps::convert(Stream& stream, const Tensor& source, const Tensor& destination) {
  timed(stream, "convert", 0, bytes_of({&source, &destination}),
        [&] { inner_.convert(stream, source, destination); });
}

void TimedOps::split_master(Stream& stream, const Tensor& master, const Tensor& param,
                            const Tensor& param_low) {
  timed(stream, "split_master", 0, bytes_of({&master, &param, &param_low}),
        [&] { inner_.split_master(stream, master, param, param_low); });
}

void TimedOps::join_master(Stream& stream, const Tensor& param, const Tensor& param_low,
                           const Tensor& master) {
  timed(stream, "join_master", 0, bytes_of({&param, &param_low, &master}),
        [&] { inner_.join_master(stream, param, param_low, master); });
}

void TimedOps::fill_normal(Stream& stream, const Tensor& x, uint64_t seed, uint64_t counter_stream,
                           double std, const SliceOf& slice) {
  timed(stream, "fill_normal", 0, bytes_of({&x}),
        [&] { inner_.fill_normal(stream, x, seed, counter_stream, std, slice); });
}

void TimedOps::topk_compress(Stream& stream, const Tensor& grad_PN, const TopkFormat& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) {
  timed(stream, "topk_compress", 0, bytes_of({&grad_PN, &residual_PN, &payload_PB, &residual_PN}),
        [&] { inner_.topk_compress(stream, grad_PN, format, residual_PN, payload_PB); });
}

void TimedOps::topk_sum(Stream& stream, const Tensor& payload_PB, const TopkFormat& format,
                        Accumulate accumulate, const Tensor& sum_N) {
  const double read = accumulate == Accumulate::add ? bytes_of({&sum_N}) : 0;
  timed(stream, "topk_sum", 0, bytes_of({&payload_PB, &sum_N}) + read,
        [&] { inner_.topk_sum(stream, payload_PB, format, accumulate, sum_N); });
}

void TimedOps::int8_compress(Stream& stream, const Tensor& grad_PN, const Int8Format& format,
                             const Tensor& residual_PN, const Tensor& payload_PB) {
  timed(stream, "int8_compress", 0, bytes_of({&grad_PN, &residual_PN, &payload_PB, &residual_PN}),
        [&] { inner_.int8_compress(stream, grad_PN, format, residual_PN, payload_PB); });
}

void TimedOps::int8_sum(Stream& stream, const Tensor& payload_PB, const Int8Format& format,
                        Accumulate accumulate, const Tensor& sum_N) {
  const double read = accumulate == Accumulate::add ? bytes_of({&sum_N}) : 0;
  timed(stream, "int8_sum", 0, bytes_of({&payload_PB, &sum_N}) + read,
        [&] { inner_.int8_sum(stream, payload_PB, format, accumulate, sum_N); });
}

void TimedOps::clear_if_skipped(Stream& stream, const StepScalars* scalars, const Tensor& x) {
  timed(stream, "clear_if_skipped", 0, bytes_of({&x, &x}),
        [&] { inner_.clear_if_skipped(stream, scalars, x); });
}

}  // namespace dstrain
