// Elementwise operations: fill, add, conversion of types, bf16 parameters with their lower halves,
// random numbers. All but fill_normal are bound by memory. A number is rounded once, to the
// nearest, ties to even.
#include "core/backend/expect.h"
#include "core/base/rng.h"
#include "cuda/cuda_ops.h"
#include "cuda/map.cuh"

namespace dstrain {
namespace {

struct AlwaysRuns {
  __device__ bool skipped() const { return false; }
};

template <class E>
struct Fill {
  static constexpr int kSize = kVector<E>;
  template <int n>
  struct In {};

  E* x;
  int64_t stride;
  E value;
  const StepScalars* unless_finite;  // null: always

  __device__ bool skipped() const { return unless_finite && unless_finite->finite; }
  template <int n>
  __device__ In<n> load(int64_t, int64_t) const {
    return {};
  }
  template <int n>
  __device__ void store(int64_t row, int64_t at, const In<n>&) const {
    Pack<E, n> pack;
#pragma unroll
    for (int i = 0; i < n; ++i) pack.at[i] = value;
    pack.store(x + row * stride + at);
  }
};

// out may be a or b.
template <class A, class F, class Out>
struct Add : AlwaysRuns {
  static constexpr int kSize = kVector<F>;
  template <int n>
  struct In {
    Pack<A, n> a;
    Pack<F, n> b;
  };

  const A* a;
  const F* b;
  Out* out;
  int64_t a_stride, b_stride, out_stride;

  Add(const Tensor& a_, const Tensor& b_, const Tensor& out_)
      : a(pointer<A>(a_)),
        b(pointer<F>(b_)),
        out(pointer<Out>(out_)),
        a_stride(a_.row_stride()),
        b_stride(b_.row_stride()),
        out_stride(out_.row_stride()) {}

  template <int n>
  __device__ In<n> load(int64_t row, int64_t at) const {
    return {Pack<A, n>::load(a + row * a_stride + at), Pack<F, n>::load(b + row * b_stride + at)};
  }
  template <int n>
  __device__ void store(int64_t row, int64_t at, const In<n>& in) const {
    Pack<Out, n> sum;
#pragma unroll
    for (int i = 0; i < n; ++i)
      sum.at[i] = from_float<Out>(to_float(in.a.at[i]) + to_float(in.b.at[i]));
    sum.store(out + row * out_stride + at);
  }
};

template <class To, class From>
__device__ __forceinline__ To convert_element(From value) {
  if constexpr (std::is_same_v<To, bf16> && std::is_same_v<From, double>) {
    return __double2bfloat16(value);  // one rounding, not two by way of f32
  } else if constexpr (std::is_same_v<To, bf16>) {
    return __float2bfloat16(value);
  } else if constexpr (std::is_same_v<From, bf16>) {
    return static_cast<To>(__bfloat162float(value));
  } else {
    return static_cast<To>(value);
  }
}

template <class From, class To>
struct Convert : AlwaysRuns {
  static constexpr int kSize = std::max(kVector<From>, kVector<To>);
  template <int n>
  using In = Pack<From, n>;

  const From* from;
  To* to;
  int64_t from_stride, to_stride;

  Convert(const Tensor& source, const Tensor& destination)
      : from(pointer<From>(source)),
        to(pointer<To>(destination)),
        from_stride(source.row_stride()),
        to_stride(destination.row_stride()) {}

  template <int n>
  __device__ In<n> load(int64_t row, int64_t at) const {
    return In<n>::load(from + row * from_stride + at);
  }
  template <int n>
  __device__ void store(int64_t row, int64_t at, const In<n>& in) const {
    Pack<To, n> out;
#pragma unroll
    for (int i = 0; i < n; ++i) out.at[i] = convert_element<To>(in.at[i]);
    out.store(to + row * to_stride + at);
  }
};

// The upper half is rounded by carrying the lower half's top bit into it; JoinMaster takes the
// carry back.
struct SplitMaster : AlwaysRuns {
  static constexpr int kSize = 8;
  template <int n>
  using In = Pack<uint32_t, n>;

  const uint32_t* master;
  uint16_t* high;
  uint16_t* low;

  SplitMaster(const Tensor& master_, const Tensor& param, const Tensor& param_low)
      : master(pointer<uint32_t>(master_)),
        high(pointer<uint16_t>(param)),
        low(pointer<uint16_t>(param_low)) {}

  template <int n>
  __device__ In<n> load(int64_t, int64_t at) const {
    return In<n>::load(master + at);
  }
  template <int n>
  __device__ void store(int64_t, int64_t at, const In<n>& in) const {
    Pack<uint16_t, n> upper, lower;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      upper.at[i] = static_cast<uint16_t>((in.at[i] + 0x8000u) >> 16);
      lower.at[i] = static_cast<uint16_t>(in.at[i]);
    }
    upper.store(high + at);
    lower.store(low + at);
  }
};

struct JoinMaster : AlwaysRuns {
  static constexpr int kSize = 8;
  template <int n>
  struct In {
    Pack<uint16_t, n> upper, lower;
  };

  const uint16_t* high;
  const uint16_t* low;
  uint32_t* master;

  JoinMaster(const Tensor& param, const Tensor& param_low, const Tensor& master_)
      : high(pointer<uint16_t>(param)),
        low(pointer<uint16_t>(param_low)),
        master(pointer<uint32_t>(master_)) {}

  template <int n>
  __device__ In<n> load(int64_t, int64_t at) const {
    return {Pack<uint16_t, n>::load(high + at), Pack<uint16_t, n>::load(low + at)};
  }
  template <int n>
  __device__ void store(int64_t, int64_t at, const In<n>& in) const {
    Pack<uint32_t, n> out;
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const uint32_t carry = static_cast<uint32_t>(in.lower.at[i]) >> 15;
      out.at[i] = (static_cast<uint32_t>(in.upper.at[i]) - carry) << 16 | in.lower.at[i];
    }
    out.store(master + at);
  }
};

// In double, as on the CPU, and rounded once.
template <class F>
__global__ void fill_normal_kernel(F* x, int64_t n, uint64_t seed, uint64_t stream, double std,
                                   const Ops::SliceOf slice) {
  const int64_t run = slice.extent * slice.inner;  // neighbours in the global tensor, too
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < n; i += step) {
    const int64_t at = slice.first + i;
    const int64_t index = (at / run * slice.global + slice.begin) * slice.inner + at % run;
    x[i] = convert_element<F>(std * random_normal(seed, stream, static_cast<uint64_t>(index)));
  }
}

template <class E>
void fill_with(Stream& stream, const Tensor& x, E value, const StepScalars* unless_finite,
               int64_t most_blocks) {
  const MapShape shape({x});
  const Fill<E> body{pointer<E>(x), x.row_stride(), value, unless_finite};
  launch_map(stream, body, shape, shape.aligned(x), "fill", most_blocks);
}

void fill_any(Stream& stream, const Tensor& x, double value, const StepScalars* unless_finite,
              int64_t most_blocks) {
  const auto with = [&](auto element) {
    fill_with(stream, x, element, unless_finite, most_blocks);
  };
  switch (x.dtype()) {
    case DType::f32:
      return with(static_cast<float>(value));
    case DType::f64:
      return with(value);
    case DType::bf16:
      return with(__double2bfloat16(value));
    case DType::i32:
      return with(static_cast<int32_t>(value));
    case DType::i64:
      return with(static_cast<int64_t>(value));
    case DType::u8:
      return with(static_cast<uint8_t>(value));
    case DType::u16:
      return with(static_cast<uint16_t>(value));
  }
}

void expect_same_size(const Tensor& a, const Tensor& b, const char* op) {
  const bool same_rows = (a.contiguous() && b.contiguous()) ||
                         (a.dims() > 0 && b.dims() > 0 && a.size(0) == b.size(0));
  DSTRAIN_CHECK(a.numel() == b.numel() && same_rows,
                std::string(op) + ": shapes differ, " + a.describe() + " and " + b.describe());
}

template <class From, class To>
void convert_to(Stream& stream, const Tensor& source, const Tensor& destination) {
  const MapShape shape({source, destination});
  launch_map(stream, Convert<From, To>(source, destination), shape,
             shape.aligned(source) && shape.aligned(destination), "convert");
}

void copy_rows(Stream& stream, const Tensor& source, const Tensor& destination) {
  const MapShape shape({source, destination});
  if (shape.empty() || source.raw() == destination.raw()) return;
  const auto bytes = static_cast<size_t>(dtype_bytes(source.dtype()));
  const auto width = static_cast<size_t>(shape.width) * bytes;
  if (shape.rows == 1)
    return check_cuda(cudaMemcpyAsync(destination.raw(), source.raw(), width,
                                      cudaMemcpyDeviceToDevice, cuda(stream)),
                      "convert");
  check_cuda(
      cudaMemcpy2DAsync(destination.raw(), static_cast<size_t>(destination.row_stride()) * bytes,
                        source.raw(), static_cast<size_t>(source.row_stride()) * bytes, width,
                        static_cast<size_t>(shape.rows), cudaMemcpyDeviceToDevice, cuda(stream)),
      "convert");
}

void expect_master(const char* op, const Tensor& master, const Tensor& param,
                   const Tensor& param_low) {
  const int64_t n = master.numel();
  const auto fits = [n](const Tensor& x, DType dtype) {
    return x.numel() == n && x.dtype() == dtype && x.contiguous();
  };
  DSTRAIN_CHECK(fits(master, DType::f32) && fits(param, DType::bf16) && fits(param_low, DType::u16),
                std::string(op) + ": master " + master.describe() + ", param " + param.describe() +
                    ", param_low " + param_low.describe());
}

}  // namespace

void CudaOps::fill(Stream& stream, const Tensor& x, double value) {
  fill_any(stream, x, value, nullptr, 64 * device_.num_sms);
}

// Few blocks, since as a rule they find nothing to do.
void CudaOps::clear_if_skipped(Stream& stream, const StepScalars* scalars, const Tensor& x) {
  fill_any(stream, x, 0.0, scalars, 8 * device_.num_sms);
}

void CudaOps::add(Stream& stream, const Tensor& a, const Tensor& b, const Tensor& out) {
  expect_same_size(a, out, "add");
  expect_same_size(b, out, "add");
  const MapShape shape({out, a, b});
  const bool aligned = shape.aligned(a) && shape.aligned(b) && shape.aligned(out);
  dispatch_f(b.dtype(), "add", [&]<class F>() {
    dispatch_f_or_s<F>(a.dtype(), "add", [&]<class A>() {
      dispatch_f_or_s<F>(out.dtype(), "add", [&]<class Out>() {
        launch_map(stream, Add<A, F, Out>(a, b, out), shape, aligned, "add");
      });
    });
  });
}

void CudaOps::convert(Stream& stream, const Tensor& source, const Tensor& destination) {
  expect_same_size(source, destination, "convert");
  const DType from = source.dtype(), to = destination.dtype();
  const auto is_float = [](DType dtype) {
    return dtype == DType::f32 || dtype == DType::f64 || dtype == DType::bf16;
  };
  DSTRAIN_CHECK(is_float(from) && is_float(to),
                std::string("convert: cannot make ") + dtype_name(to) + " of " + dtype_name(from));
  if (from == to) return copy_rows(stream, source, destination);
  if (from == DType::f32 && to == DType::bf16)
    return convert_to<float, bf16>(stream, source, destination);
  if (from == DType::f32) return convert_to<float, double>(stream, source, destination);
  if (from == DType::bf16 && to == DType::f32)
    return convert_to<bf16, float>(stream, source, destination);
  if (from == DType::bf16) return convert_to<bf16, double>(stream, source, destination);
  if (to == DType::f32) return convert_to<double, float>(stream, source, destination);
  convert_to<double, bf16>(stream, source, destination);
}

void CudaOps::split_master(Stream& stream, const Tensor& master, const Tensor& param,
                           const Tensor& param_low) {
  expect_master("split_master", master, param, param_low);
  const MapShape shape({master});
  launch_map(stream, SplitMaster(master, param, param_low), shape,
             shape.aligned(master) && shape.aligned(param) && shape.aligned(param_low),
             "split_master");
}

void CudaOps::join_master(Stream& stream, const Tensor& param, const Tensor& param_low,
                          const Tensor& master) {
  expect_master("join_master", master, param, param_low);
  const MapShape shape({master});
  launch_map(stream, JoinMaster(param, param_low, master), shape,
             shape.aligned(master) && shape.aligned(param) && shape.aligned(param_low),
             "join_master");
}

void CudaOps::fill_normal(Stream& stream, const Tensor& x, uint64_t seed, uint64_t stream_number,
                          double std, const SliceOf& slice) {
  const int64_t n = x.numel();
  DSTRAIN_CHECK(slice.first >= 0 && slice.first + n <= slice.outer * slice.extent * slice.inner &&
                    x.contiguous() && slice.begin >= 0 &&
                    slice.begin + slice.extent <= slice.global,
                "fill_normal: the slice does not fit " + x.describe());
  if (n == 0) return;
  dispatch_f(x.dtype(), "fill_normal", [&]<class F>() {
    const unsigned blocks = grid_for(n, kMapThreads, device_.num_sms, 32);
    fill_normal_kernel<F><<<blocks, kMapThreads, 0, cuda(stream)>>>(pointer<F>(x), n, seed,
                                                                    stream_number, std, slice);
  });
  check_launch("fill_normal");
}

}  // namespace dstrain
