// The norm of the gradients, clipping, and AdamW; the formulas are in core/backend/cpu_ops_optim.cpp.
//
// A bf16 parameter and the lower half of its master value are joined to f32, updated, and split again, so that the
// result is that of an f32 parameter in every bit. Moments in bf16 are rounded up or down by chance, with the odds
// that keep them right on average: a second moment changes by less than half a unit in its last place from one
// step to the next, and would stand still if it were rounded to the nearest. The random bits are a function of
// element and update, so that a step repeated gives the same.
#include "core/backend/expect.h"
#include "cuda/add_partials.cuh"
#include "cuda/cuda_ops.h"
#include "cuda/kernel.cuh"

namespace dstrain {
namespace {

constexpr int kThreads = 256;

void expect_flat(const Tensor& tensor, const char* name, DType dtype, int64_t count) {
  DSTRAIN_CHECK(tensor.dtype() == dtype && tensor.numel() == count && tensor.contiguous(),
                std::string(name) + " is " + tensor.describe() + " where " + std::to_string(count) + " contiguous " +
                    dtype_name(dtype) + " belong");
}

// --- sum of squares --------------------------------------------------------------------------------------

constexpr int kVectors = 32;  // of a thread; with kThreads they make the run of a block

// Squares are summed in double: an f32 would overflow, and memory is slower all the same. Which elements a thread
// adds, and in which order, does not depend on where x begins.
template <class F>
__global__ void __launch_bounds__(kThreads)
    sum_squares_kernel(const F* __restrict__ x, int64_t n, bool aligned, double* partials) {
  constexpr int kSize = Vec<F>::kSize, kAtOnce = 8;
  __shared__ double shared[32];
  constexpr int64_t kRun = int64_t{kThreads} * kVectors * kSize;
  const int64_t begin = blockIdx.x * kRun + threadIdx.x * kSize;
  const bool whole = aligned && (blockIdx.x + 1) * kRun <= n;
  double sum = 0;
#pragma unroll 1
  for (int first = 0; first < kVectors; first += kAtOnce) {
    Vec<F> vectors[kAtOnce];
    const int64_t i = begin + first * kThreads * kSize;
    if (whole) {
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) vectors[j] = Vec<F>::stream(x + i + j * kThreads * kSize);
    } else {
#pragma unroll
      for (int j = 0; j < kAtOnce * kSize; ++j) {
        const int64_t at = i + j / kSize * kThreads * kSize + j % kSize;
        vectors[j / kSize].at[j % kSize] = at < n ? x[at] : from_float<F>(0.0f);
      }
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
#pragma unroll
      for (int c = 0; c < kSize; ++c) {
        const auto value = static_cast<double>(to_float(vectors[j].at[c]));
        sum = fma(value, value, sum);
      }
    }
  }
  sum = block_sum(sum, shared);
  if (threadIdx.x == 0) partials[blockIdx.x] = sum;
}

// --- clipping ----------------------------------------------------------------------------------------------

__global__ void clip_scale_kernel(const double* sum_1, double max_norm, double beta1, double beta2,
                                  StepScalars* scalars) {
  const double sum = *sum_1, norm = sqrt(sum);
  const bool finite = isfinite(sum);
  scalars->finite = finite ? 1 : 0;
  scalars->grad_norm = norm;
  if (finite) {
    const auto t = static_cast<double>(++scalars->updates);
    scalars->bias_correction1 = 1 - pow(beta1, t);
    scalars->bias_correction2 = 1 - pow(beta2, t);
  }
  const double scale = max_norm / (norm + 1e-6);
  scalars->grad_scale = max_norm > 0 && scale < 1 ? scale : 1;
}

// --- AdamW -------------------------------------------------------------------------------------------------

// The scalars of one update, combined in double and rounded once.
struct Update {
  float grad_scale, one_minus_beta1, beta2, one_minus_beta2, keep, step, inverse_root_c2, eps;

  __device__ __forceinline__ Update(const AdamWParams& params, const StepScalars& scalars)
      : grad_scale(static_cast<float>(scalars.grad_scale)),
        one_minus_beta1(static_cast<float>(1 - params.beta1)),
        beta2(static_cast<float>(params.beta2)),
        one_minus_beta2(static_cast<float>(1 - params.beta2)),
        keep(static_cast<float>(1 - scalars.in.lr * params.weight_decay)),
        step(static_cast<float>(scalars.in.lr / scalars.bias_correction1)),
        inverse_root_c2(static_cast<float>(1 / sqrt(scalars.bias_correction2))),
        eps(static_cast<float>(params.eps)) {}

  // Which products are fused is written out, so that it is the same for all types.
  __device__ __forceinline__ void apply(float grad, float& param, float& exp_avg, float& exp_avg_sq) const {
    const float g = grad * grad_scale;
    exp_avg = fmaf(one_minus_beta1, g - exp_avg, exp_avg);
    exp_avg_sq = fmaf(one_minus_beta2, g * g, beta2 * exp_avg_sq);
    const float divisor = fmaf(sqrtf(exp_avg_sq), inverse_root_c2, eps);
    param = fmaf(-step, exp_avg / divisor, param * keep);
  }
};

// 32 bits from a number; neighbours give unrelated ones (the finaliser of MurmurHash3 by Appleby, public domain).
__device__ __forceinline__ uint32_t mix_bits(uint32_t x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Eight neighbours of type T.
constexpr int kElements = 8;
template <class T>
struct Eight {
  Vec<T> parts[kElements / Vec<T>::kSize];

  __device__ __forceinline__ static Eight load(const T* from) {
    Eight out;
#pragma unroll
    for (int j = 0; j < kElements / Vec<T>::kSize; ++j) out.parts[j] = Vec<T>::stream(from + j * Vec<T>::kSize);
    return out;
  }
  __device__ __forceinline__ void store(T* to) const {
#pragma unroll
    for (int j = 0; j < kElements / Vec<T>::kSize; ++j) parts[j].store(to + j * Vec<T>::kSize);
  }
  __device__ __forceinline__ T& at(int i) { return parts[i / Vec<T>::kSize].at[i % Vec<T>::kSize]; }
};

__device__ __forceinline__ void set_moment(float value, uint32_t, float& moment) { moment = value; }
// Up with the odds of the bits that are cut off; the lower 16 bits of `random` are used.
__device__ __forceinline__ void set_moment(float value, uint32_t random, bf16& moment) {
  const uint32_t bits = __float_as_uint(value);
  const uint32_t rounded = value == value ? bits + (random & 0xffffu) : bits | 0x400000u;
  moment = __ushort_as_bfloat16(static_cast<unsigned short>(rounded >> 16));
}

// The master value of a parameter; see split_master in core/backend/cpu_ops_optim.cpp.
__device__ __forceinline__ float master(float param, uint16_t) { return param; }
__device__ __forceinline__ float master(bf16 param, uint16_t low) {
  const uint32_t high = __bfloat16_as_ushort(param) - (uint32_t{low} >> 15);
  return __uint_as_float(high << 16 | low);
}
__device__ __forceinline__ void set_master(float value, float& param, uint16_t&) { param = value; }
__device__ __forceinline__ void set_master(float value, bf16& param, uint16_t& low) {
  const uint32_t bits = __float_as_uint(value);
  param = __ushort_as_bfloat16(static_cast<unsigned short>((bits + 0x8000u) >> 16));
  low = static_cast<uint16_t>(bits);
}

// Pointers to the arrays of one range; low is null for parameters in f32.
template <class P, class M>
struct Arrays {
  const float* grad;
  P* param;
  uint16_t* low;
  M* exp_avg;
  M* exp_avg_sq;
};

template <class P, class M>
__global__ void __launch_bounds__(kThreads)
    adamw_kernel(AdamWParams params, const StepScalars* __restrict__ scalars, Arrays<P, M> arrays, int64_t n,
                 bool aligned) {
  constexpr bool kSplit = sizeof(P) == 2;
  if (!scalars->finite) return;
  const Update update(params, *scalars);
  const uint32_t seed = mix_bits(static_cast<uint32_t>(scalars->updates));
  const auto apply = [&](int64_t i, float grad, P& param, uint16_t& low, M& exp_avg, M& exp_avg_sq) {
    float p = master(param, low), m = to_float(exp_avg), v = to_float(exp_avg_sq);
    update.apply(grad, p, m, v);
    set_master(p, param, low);
    const uint32_t random =
        sizeof(M) == 2 ? mix_bits(static_cast<uint32_t>(i) ^ mix_bits(static_cast<uint32_t>(i >> 32) + seed)) : 0u;
    set_moment(m, random, exp_avg);
    set_moment(v, random >> 16, exp_avg_sq);
  };
  const int64_t step = int64_t{gridDim.x} * kThreads * kElements;
  for (int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) * kElements; i < n; i += step) {
    if (aligned && i + kElements <= n) {
      auto grad = Eight<float>::load(arrays.grad + i);
      auto param = Eight<P>::load(arrays.param + i);
      auto exp_avg = Eight<M>::load(arrays.exp_avg + i), exp_avg_sq = Eight<M>::load(arrays.exp_avg_sq + i);
      Eight<uint16_t> low = {};
      if (kSplit) low = Eight<uint16_t>::load(arrays.low + i);
#pragma unroll
      for (int c = 0; c < kElements; ++c)
        apply(i + c, grad.at(c), param.at(c), low.at(c), exp_avg.at(c), exp_avg_sq.at(c));
      param.store(arrays.param + i);
      exp_avg.store(arrays.exp_avg + i);
      exp_avg_sq.store(arrays.exp_avg_sq + i);
      if (kSplit) low.store(arrays.low + i);
      continue;
    }
#pragma unroll 1
    for (int64_t at = i; at < min(i + kElements, n); ++at) {
      uint16_t low = kSplit ? arrays.low[at] : uint16_t{0};
      apply(at, arrays.grad[at], arrays.param[at], low, arrays.exp_avg[at], arrays.exp_avg_sq[at]);
      if (kSplit) arrays.low[at] = low;
    }
  }
}

}  // namespace

void CudaOps::add_sum_squares(Stream& stream, const Tensor& x, const Tensor& sum_1) {
  const int64_t n = x.numel();
  expect(sum_1, "add_sum_squares: sum_1", DType::f64, {1});
  expect_flat(x, "add_sum_squares: x", x.dtype(), n);
  if (n == 0) return;
  dispatch_f(x.dtype(), "add_sum_squares", [&]<class F>() {
    const int64_t blocks = ceil_div(n, int64_t{kThreads} * kVectors * Vec<F>::kSize);
    auto* const partials =
        ScratchPieces(stream, ScratchPieces::padded(8 * blocks)).take<double>(blocks);
    sum_squares_kernel<F><<<static_cast<unsigned>(blocks), kThreads, 0, cuda(stream)>>>(
        pointer<const F>(x), n, fits_vectors<F>(x.raw(), 0, 0), partials);
    check_launch("add_sum_squares");
    add_partials(cuda(stream), partials, blocks, pointer<double>(sum_1), "add_sum_squares");
  });
}

void CudaOps::clip_scale(Stream& stream, const Tensor& sum_1, double max_norm, double beta1, double beta2,
                         StepScalars* scalars) {
  expect(sum_1, "clip_scale: sum_1", DType::f64, {1});
  clip_scale_kernel<<<1, 1, 0, cuda(stream)>>>(pointer<const double>(sum_1), max_norm, beta1, beta2, scalars);
  check_launch("clip_scale");
}

void CudaOps::adamw(Stream& stream, const AdamWParams& params, const StepScalars* scalars, const Tensor& grad,
                    const Tensor& param, const Tensor& param_low, const Tensor& exp_avg, const Tensor& exp_avg_sq) {
  const int64_t n = param.numel();
  const bool split = param.dtype() == DType::bf16;
  DSTRAIN_CHECK(split == param_low.defined(), "adamw: the low half of a master value belongs to bf16, and only to it");
  expect_flat(grad, "adamw: grad", DType::f32, n);
  expect_flat(param, "adamw: param", param.dtype(), n);
  if (split) expect_flat(param_low, "adamw: param_low", DType::u16, n);
  expect_flat(exp_avg, "adamw: exp_avg", exp_avg.dtype(), n);
  expect_flat(exp_avg_sq, "adamw: exp_avg_sq", exp_avg.dtype(), n);
  if (n == 0) return;
  bool aligned = true;
  for (const Tensor* x : {&grad, &param, &param_low, &exp_avg, &exp_avg_sq})
    aligned = aligned && reinterpret_cast<uintptr_t>(x->raw()) % 16 == 0;
  const unsigned blocks = grid_for(n, int64_t{kThreads} * kElements, device_.num_sms, 16);
  dispatch_f(param.dtype(), "adamw", [&]<class P>() {
    dispatch_f(exp_avg.dtype(), "adamw", [&]<class M>() {
      const Arrays<P, M> arrays{pointer<const float>(grad), pointer<P>(param), pointer<uint16_t>(param_low),
                                pointer<M>(exp_avg), pointer<M>(exp_avg_sq)};
      adamw_kernel<P, M><<<blocks, kThreads, 0, cuda(stream)>>>(params, scalars, arrays, n, aligned);
    });
  });
  check_launch("adamw");
}

}  // namespace dstrain
