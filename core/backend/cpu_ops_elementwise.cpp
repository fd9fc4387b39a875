// Elementwise operations: fill, add, bias, conversion of types, random numbers. All but fill_normal
// are bound by memory. T rows, D columns.
#include <bit>
#include <cstring>

#include "core/backend/cpu_ops.h"
#include "core/base/rng.h"

namespace dstrain {
namespace {

// bf16 is the upper half of an f32.
struct Bf16 {
  uint16_t bits;

  explicit operator float() const { return std::bit_cast<float>(uint32_t{bits} << 16); }
  explicit operator double() const { return static_cast<double>(static_cast<float>(*this)); }

  static Bf16 from(float value) {
    const uint32_t u = std::bit_cast<uint32_t>(value);
    // Half of the last kept place, minus one if that place is even: ties go to even.
    const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const uint32_t quiet_nan = (u >> 16) | 0x40u;  // adding could carry a NaN to infinity
    return {static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? quiet_nan : rounded)};
  }
  // An f64 first becomes the f32 below it with the lowest bit set if anything was cut off ("round
  // to odd"), so that the second rounding gives what one rounding would have given.
  static Bf16 from(double value) {
    const float nearest = static_cast<float>(value);
    const double back = static_cast<double>(nearest);
    uint32_t u = std::bit_cast<uint32_t>(nearest);
    const bool inexact = back != value && value == value;
    const bool away = inexact && (value < 0 ? back < value : back > value);
    u = away ? u - 1 : u;
    u = inexact ? u | 1u : u;
    return from(std::bit_cast<float>(u));
  }
};

template <class To, class From>
To convert_element(From value) {
  if constexpr (std::is_same_v<To, Bf16>) {
    if constexpr (std::is_same_v<From, Bf16>) {
      return value;
    } else {
      return Bf16::from(value);
    }
  } else {
    return static_cast<To>(value);
  }
}

// A tensor as rows without gaps: one long row if it is contiguous.
struct FlatRows {
  int64_t rows, width;

  explicit FlatRows(bool contiguous, const Tensor& x)
      : rows(contiguous || x.dims() == 0 ? 1 : x.size(0)),
        width(contiguous ? x.numel() : x.row_numel()) {}
};

// Calls body(row, begin, end) for pieces of rows that together cover all elements.
template <class Body>
void run_pieces(ThreadPool& pool, const FlatRows& shape, const Body& body) {
  constexpr int64_t kPiece = 16384;
  if (shape.rows == 1) {
    pool.run_ranges(shape.width, kPiece, [&](int64_t begin, int64_t end) { body(0, begin, end); });
    return;
  }
  pool.run_ranges(shape.rows, rows_per_task(shape.width), [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) body(r, 0, shape.width);
  });
}

template <class Element>
Element* element_row(const Tensor& x, int64_t r) {
  return static_cast<Element*>(x.raw()) + r * x.row_stride();
}

template <class Element>
void fill_with(ThreadPool& pool, const Tensor& x, Element value) {
  run_pieces(pool, FlatRows(x.contiguous(), x), [&](int64_t r, int64_t begin, int64_t end) {
    std::fill(element_row<Element>(x, r) + begin, element_row<Element>(x, r) + end, value);
  });
}

template <class From, class To>
void convert_to(ThreadPool& pool, const Tensor& source, const Tensor& destination) {
  const FlatRows shape(source.contiguous() && destination.contiguous(), source);
  run_pieces(pool, shape, [&](int64_t r, int64_t begin, int64_t end) {
    const From* from = element_row<From>(source, r);
    To* to = element_row<To>(destination, r);
#pragma omp simd
    for (int64_t i = begin; i < end; ++i) to[i] = convert_element<To>(from[i]);
  });
}

template <class From>
void convert_from(ThreadPool& pool, const Tensor& source, const Tensor& destination) {
  switch (destination.dtype()) {
    case DType::f32:
      return convert_to<From, float>(pool, source, destination);
    case DType::f64:
      return convert_to<From, double>(pool, source, destination);
    case DType::bf16:
      return convert_to<From, Bf16>(pool, source, destination);
    default:
      DSTRAIN_CHECK(false, std::string("convert: cannot write ") + dtype_name(destination.dtype()));
  }
}

void expect_same_size(const Tensor& a, const Tensor& b, const char* op) {
  const bool same_rows = a.contiguous() && b.contiguous()
                             ? true
                             : a.dims() > 0 && b.dims() > 0 && a.size(0) == b.size(0);
  DSTRAIN_CHECK(a.numel() == b.numel() && same_rows,
                std::string(op) + ": shapes differ, " + a.describe() + " and " + b.describe());
}

}  // namespace

void CpuOps::fill(Stream&, const Tensor& x, double value) {
  switch (x.dtype()) {
    case DType::f32:
      return fill_with(pool_, x, static_cast<float>(value));
    case DType::f64:
      return fill_with(pool_, x, value);
    case DType::bf16:
      return fill_with(pool_, x, Bf16::from(value));
    case DType::i32:
      return fill_with(pool_, x, static_cast<int32_t>(value));
    case DType::i64:
      return fill_with(pool_, x, static_cast<int64_t>(value));
    case DType::u8:
      return fill_with(pool_, x, static_cast<uint8_t>(value));
    case DType::u16:
      return fill_with(pool_, x, static_cast<uint16_t>(value));
  }
}

void CpuOps::add(Stream&, const Tensor& a, const Tensor& b, const Tensor& out) {
  expect_same_size(a, out, "add");
  expect_same_size(b, out, "add");
  DSTRAIN_CHECK(a.dtype() == out.dtype() && b.dtype() == out.dtype(), "add: element types differ");
  dispatch_float(out.dtype(), [&]<class F>() {
    const FlatRows shape(a.contiguous() && b.contiguous() && out.contiguous(), out);
    run_pieces(pool_, shape, [&](int64_t r, int64_t begin, int64_t end) {
      const F* x = row<F>(a, r);
      const F* y = row<F>(b, r);
      F* sum = row<F>(out, r);
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) sum[i] = x[i] + y[i];
    });
  });
}

void CpuOps::convert(Stream&, const Tensor& source, const Tensor& destination) {
  expect_same_size(source, destination, "convert");
  switch (source.dtype()) {
    case DType::f32:
      return convert_from<float>(pool_, source, destination);
    case DType::f64:
      return convert_from<double>(pool_, source, destination);
    case DType::bf16:
      return convert_from<Bf16>(pool_, source, destination);
    default:
      DSTRAIN_CHECK(false, std::string("convert: cannot read ") + dtype_name(source.dtype()));
  }
}

void CpuOps::add_bias(Stream&, const Tensor& x_TD, const Tensor& bias_D) {
  const int64_t T = x_TD.size(0), D = x_TD.row_numel();
  expect(bias_D, "add_bias: bias_D", x_TD.dtype(), {D});
  dispatch_float(x_TD.dtype(), [&]<class F>() {
    pool_.run_ranges(T, rows_per_task(D), [&](int64_t begin, int64_t end) {
      const F* const bias = bias_D.data<F>();
      for (int64_t t = begin; t < end; ++t) {
        F* const x = row<F>(x_TD, t);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) x[d] += bias[d];
      }
    });
  });
}

void CpuOps::bias_backward(Stream&, const Tensor& dy_TD, Accumulate accumulate,
                           const Tensor& dbias_D) {
  const int64_t T = dy_TD.size(0), D = dy_TD.row_numel();
  expect(dbias_D, "bias_backward: dbias_D", dy_TD.dtype(), {D});
  dispatch_float(dy_TD.dtype(), [&]<class F>() {
    const int64_t stride = partial_stride<F>(D);
    const RowChunks chunks(T, stride * static_cast<int64_t>(sizeof(F)), /*min_rows=*/32);
    F* const partials = workspace_.get<F>(chunks.count * stride);
    pool_.run(chunks.count, [&](int64_t chunk, void*) {
      F* const partial = partials + chunk * stride;
      std::fill(partial, partial + D, F(0));
      for (int64_t t = chunks.begin(chunk); t < chunks.end(chunk); ++t) {
        const F* const dy = row<F>(dy_TD, t);
#pragma omp simd
        for (int64_t d = 0; d < D; ++d) partial[d] += dy[d];
      }
    });
    sum_partials(pool_, partials, chunks.count, stride, D, accumulate, dbias_D.data<F>());
  });
}

void CpuOps::fill_normal(Stream&, const Tensor& x, uint64_t seed, uint64_t stream, double std,
                         const SliceOf& slice) {
  const auto& [outer, global, begin, extent, inner, first_element] = slice;
  DSTRAIN_CHECK(first_element >= 0 && first_element + x.numel() <= outer * extent * inner &&
                    x.contiguous() && begin >= 0 && begin + extent <= global,
                "fill_normal: the slice does not fit " + x.describe());
  dispatch_float(x.dtype(), [&]<class F>() {
    const int64_t run = extent * inner;  // elements that are neighbours in the global tensor, too
    pool_.run_ranges(x.numel(), 2048, [&](int64_t first, int64_t end) {
      for (int64_t i = first; i < end; ++i) {
        const int64_t at = first_element + i;
        const int64_t index = (at / run * global + begin) * inner + at % run;
        const double value = std * random_normal(seed, stream, static_cast<uint64_t>(index));
        x.data<F>()[i] = static_cast<F>(value);
      }
    });
  });
}

}  // namespace dstrain
