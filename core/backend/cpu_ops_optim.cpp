// The norm of the gradients, clipping, and AdamW (Loshchilov & Hutter, arXiv:1711.05101):
//   g = grad * grad_scale,  m += (1 - beta1) (g - m),  v = beta2 v + (1 - beta2) g^2
//   p = p (1 - lr weight_decay) - lr / c1 * m / (sqrt(v) / sqrt(c2) + eps),  c_i = 1 - beta_i^step
// Scalars are combined in double and rounded once; elements are computed in F, in one pass.
#include <cmath>

#include "core/backend/cpu_ops.h"
#include "core/base/bf16.h"

namespace dstrain {
namespace {

constexpr int64_t kChunk = 32768;  // elements of one task

void expect_flat(const Tensor& tensor, const char* name, DType dtype, int64_t count) {
  DSTRAIN_CHECK(tensor.dtype() == dtype && tensor.numel() == count && tensor.contiguous(),
                std::string(name) + " is " + tensor.describe() + " where " + std::to_string(count) +
                    " contiguous " + dtype_name(dtype) + " belong");
}

// The scalars of one update, rounded to F once.
template <class F>
struct Update {
  F grad_scale, one_minus_beta1, beta2, one_minus_beta2, keep, step, inverse_root_c2, eps;

  Update(const AdamWParams& params, const StepScalars& scalars)
      : grad_scale(static_cast<F>(scalars.grad_scale)),
        one_minus_beta1(static_cast<F>(1 - params.beta1)),
        beta2(static_cast<F>(params.beta2)),
        one_minus_beta2(static_cast<F>(1 - params.beta2)),
        keep(static_cast<F>(1 - scalars.in.lr * params.weight_decay)),
        step(static_cast<F>(scalars.in.lr / scalars.bias_correction1)),
        inverse_root_c2(static_cast<F>(1 / std::sqrt(scalars.bias_correction2))),
        eps(static_cast<F>(params.eps)) {}

  void apply(const F* grad, F* param, F* exp_avg, F* exp_avg_sq, int64_t n) const {
    const Update u = *this;  // by value, so that the loop need not read it again after each store
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) {
      const F g = grad[i] * u.grad_scale;
      const F m = exp_avg[i] + u.one_minus_beta1 * (g - exp_avg[i]);
      const F v = u.beta2 * exp_avg_sq[i] + u.one_minus_beta2 * (g * g);
      exp_avg[i] = m;
      exp_avg_sq[i] = v;
      const F divisor = std::sqrt(v) * u.inverse_root_c2 + u.eps;
      param[i] = param[i] * u.keep - u.step * (m / divisor);
    }
  }
};

}  // namespace

void CpuOps::add_sum_squares(Stream&, const Tensor& x, const Tensor& sum_1) {
  expect(sum_1, "add_sum_squares: sum_1", DType::f64, {1});
  expect_flat(x, "add_sum_squares: x", x.dtype(), x.numel());
  dispatch_float(x.dtype(), [&]<class F>() {
    // Each task writes one double; the number of tasks is bounded by the workspace alone.
    const int64_t n = x.numel();
    const int64_t most = Workspace::kBytes / static_cast<int64_t>(sizeof(double));
    const int64_t length = std::max(kChunk, (n + most - 1) / most);
    const int64_t chunks = (n + length - 1) / length;
    double* const partials = workspace_.get<double>(chunks);
    pool_.run(chunks, [&](int64_t chunk, void*) {
      const int64_t begin = chunk * length;
      const F* const values = x.data<F>() + begin;
      partials[chunk] = lane_sum<double>(std::min(length, n - begin), [values](int64_t i) {
        return static_cast<double>(values[i]) * static_cast<double>(values[i]);
      });
    });
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += partials[chunk];
    *sum_1.data<double>() += sum;
  });
}

void CpuOps::clip_scale(Stream&, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                        StepScalars* scalars) {
  expect(sum_1, "clip_scale: sum_1", DType::f64, {1});
  const double sum = *sum_1.data<double>();
  scalars->finite = std::isfinite(sum) ? 1 : 0;
  scalars->grad_norm = std::sqrt(sum);
  scalars->grad_scale = 1;
  if (scalars->finite) {
    const double t = static_cast<double>(++scalars->updates);
    scalars->bias_correction1 = 1 - std::pow(beta1, t);
    scalars->bias_correction2 = 1 - std::pow(beta2, t);
  }
  if (max_norm > 0) scalars->grad_scale = std::min(1.0, max_norm / (scalars->grad_norm + 1e-6));
}

void CpuOps::adamw(Stream&, const AdamWParams& params, const StepScalars* scalars,
                   const Tensor& grad, const Tensor& param, const Tensor& param_low,
                   const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  const DType dtype = param.dtype();
  const int64_t n = param.numel();
  DSTRAIN_CHECK(!param_low.defined(), "adamw: the low half of a master value belongs to bf16");
  expect_flat(grad, "adamw: grad", dtype, n);
  expect_flat(param, "adamw: param", dtype, n);
  expect_flat(exp_avg, "adamw: exp_avg", dtype, n);
  expect_flat(exp_avg_sq, "adamw: exp_avg_sq", dtype, n);
  if (!scalars->finite) return;
  dispatch_float(dtype, [&]<class F>() {
    const Update<F> update(params, *scalars);
    pool_.run_ranges(n, kChunk, [&](int64_t begin, int64_t end) {
      update.apply(grad.data<F>() + begin, param.data<F>() + begin, exp_avg.data<F>() + begin,
                   exp_avg_sq.data<F>() + begin, end - begin);
    });
  });
}

void CpuOps::split_master(Stream&, const Tensor& master, const Tensor& param, const Tensor& param_low) {
  const int64_t n = master.numel();
  expect_flat(master, "split_master: master", DType::f32, n);
  expect_flat(param, "split_master: param", DType::bf16, n);
  expect_flat(param_low, "split_master: param_low", DType::u16, n);
  const auto* from = master.data<float>();
  auto* high = static_cast<uint16_t*>(param.raw());
  auto* low = param_low.data<uint16_t>();
  pool_.run_ranges(n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const MasterHalves halves = dstrain::split_master(from[i]);
      high[i] = halves.high;
      low[i] = halves.low;
    }
  });
}

void CpuOps::join_master(Stream&, const Tensor& param, const Tensor& param_low, const Tensor& master) {
  const int64_t n = master.numel();
  expect_flat(master, "join_master: master", DType::f32, n);
  expect_flat(param, "join_master: param", DType::bf16, n);
  expect_flat(param_low, "join_master: param_low", DType::u16, n);
  const auto* high = static_cast<const uint16_t*>(param.raw());
  const auto* low = param_low.data<uint16_t>();
  auto* to = master.data<float>();
  pool_.run_ranges(n, kChunk, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) to[i] = dstrain::join_master({high[i], low[i]});
  });
}

}  // namespace dstrain
