// Compression of gradients, block by block (core/backend/compressed_format.h): exact top-k by
// magnitude, and 8-bit codes. v = grad + residual is what should be sent, sent is what the receiver
// will read, and residual = v - sent is exact in f32.
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/backend/cpu_ops.h"
#include "core/backend/cpu_topk.h"

namespace dstrain {
namespace {

constexpr uint32_t kMagnitude = 0x7fffffffu, kInfinity = 0x7f800000u;

bool is_finite(float value) {
  return (std::bit_cast<uint32_t>(value) & kMagnitude) < kInfinity;
}

// The nearest bf16, ties to even; what is finite stays finite.
uint16_t to_bf16(float value) {
  const uint32_t u = std::bit_cast<uint32_t>(value), magnitude = u & kMagnitude;
  if (magnitude > kInfinity) return static_cast<uint16_t>((u >> 16) | 0x40u);  // a quiet NaN
  uint32_t rounded = (magnitude + 0x7fffu + ((magnitude >> 16) & 1u)) >> 16;
  if (magnitude < kInfinity) rounded = std::min(rounded, 0x7f7fu);
  return static_cast<uint16_t>((u >> 31 << 15) | rounded);
}

struct F32Values {
  using Stored = float;
  static Stored store(float value) { return value; }
  static float load(Stored stored) { return stored; }
};
struct Bf16Values {
  using Stored = uint16_t;
  static Stored store(float value) { return to_bf16(value); }
  static float load(Stored stored) { return std::bit_cast<float>(uint32_t{stored} << 16); }
};

template <class Body>
void dispatch_values(DType values, const Body& body) {
  DSTRAIN_CHECK(values == DType::f32 || values == DType::bf16,
                std::string("top-k sends f32 or bf16, not ") + dtype_name(values));
  if (values == DType::f32) {
    body.template operator()<F32Values>();
  } else {
    body.template operator()<Bf16Values>();
  }
}

// A piece's payload of top-k: where the values and indices of each block are.
template <class Values>
struct TopkPayload {
  using Stored = typename Values::Stored;
  Stored* values;
  uint16_t* indices;
  int64_t kept_per_block;

  TopkPayload(const TopkFormat& format, const Tensor& payload_PB, int64_t piece, int64_t n)
      : values(reinterpret_cast<Stored*>(payload_PB.data<uint8_t>() +
                                         piece * payload_PB.row_stride())),
        indices(reinterpret_cast<uint16_t*>(values + format.kept_total(n))),
        kept_per_block(format.kept(format.block)) {}
};

void clear_padding(const Tensor& payload_PB, int64_t piece, int64_t used) {
  uint8_t* const payload = payload_PB.data<uint8_t>() + piece * payload_PB.row_stride();
  std::fill(payload + used, payload + payload_PB.size(1), uint8_t{0});
}

uint32_t magnitude_of(float value) {
  return std::bit_cast<uint32_t>(value) & kMagnitude;
}

// v = grad + residual; the residual becomes v, except where v is not finite. Absent: v = grad.
void add_residual(const float* grad, float* residual, int64_t n, float* v) {
  if (!residual) {
    std::copy_n(grad, n, v);
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float sum = grad[i] + residual[i];
    v[i] = sum;
    residual[i] = is_finite(sum) ? sum : residual[i];
  }
}

// Of the elements with these indices, what is sent and what the residual keeps.
template <class Values>
void write_chosen(const float* v, const uint16_t* indices, int64_t count,
                  typename Values::Stored* values, float* residual) {
  for (int64_t j = 0; j < count; ++j) {
    const float value = v[indices[j]];
    values[j] = Values::store(value);
    if (residual && is_finite(value)) residual[indices[j]] = value - Values::load(values[j]);
  }
}

// The scale of a block, cut to 16 bits of precision: code * scale is then exact in f32, whether or
// not a compiler fuses the product with a sum. NaN if an element is not finite.
float int8_scale(const float* v, int64_t n) {
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = std::max(largest, magnitude_of(v[i]));
  if (largest >= kInfinity) return std::numeric_limits<float>::quiet_NaN();
  const float scale = std::bit_cast<float>(largest) / 127.0f;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scale) & ~0xffu);
}

void write_codes(const float* v, int64_t n, float scale, int8_t* codes, float* residual) {
  if (!(scale > 0)) {  // all zero or too small for a scale: the residual keeps it; or NaN
    std::fill(codes, codes + n, int8_t{0});
    return;
  }
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const float code = std::clamp(std::nearbyint(v[i] / scale), -127.0f, 127.0f);
    codes[i] = static_cast<int8_t>(code);
    if (residual) residual[i] = v[i] - code * scale;
  }
}

void expect_pieces(const char* op, const Tensor& grad_PN, const Tensor& residual_PN,
                   const Tensor& payload_PB, int64_t payload_bytes) {
  const std::string name(op);
  const int64_t P = grad_PN.size(0), N = grad_PN.size(1);
  expect(grad_PN, (name + ": grad_PN").c_str(), DType::f32, {P, N});
  if (residual_PN.defined())
    expect(residual_PN, (name + ": residual_PN").c_str(), DType::f32, {P, N});
  expect(payload_PB, (name + ": payload_PB").c_str(), DType::u8, {P, payload_bytes});
}

void expect_sum(const char* op, const Tensor& payload_PB, const Tensor& sum_N,
                int64_t payload_bytes) {
  const std::string name(op);
  expect(payload_PB, (name + ": payload_PB").c_str(), DType::u8,
         {payload_PB.size(0), payload_bytes});
  expect(sum_N, (name + ": sum_N").c_str(), DType::f32, {sum_N.numel()});
}

void expect_block(const char* op, int64_t block, int64_t largest) {
  DSTRAIN_CHECK(block > 0 && block <= largest, std::string(op) + ": a block of " +
                                                   std::to_string(block) + " elements; at most " +
                                                   std::to_string(largest) + " are possible");
}

// Calls body(piece, block, begin, count, scratch) for every block of every piece.
template <class Body>
void run_blocks(ThreadPool& pool, int64_t pieces, int64_t n, int64_t block, const Body& body) {
  const int64_t blocks = (n + block - 1) / block, per_task = rows_per_task(block);
  const int64_t tasks = (blocks + per_task - 1) / per_task;
  pool.run(pieces * tasks, [&](int64_t task, void* scratch) {
    const int64_t first = task % tasks * per_task;
    for (int64_t b = first; b < std::min(first + per_task, blocks); ++b)
      body(task / tasks, b, b * block, std::min(block, n - b * block), scratch);
  });
}

float* piece_at(const Tensor& x_PN, int64_t piece, int64_t begin) {
  return x_PN.defined() ? x_PN.data<float>() + piece * x_PN.row_stride() + begin : nullptr;
}

}  // namespace

void CpuOps::topk_compress(Stream&, const Tensor& grad_PN, const TopkFormat& format,
                           const Tensor& residual_PN, const Tensor& payload_PB) {
  const int64_t P = grad_PN.size(0), n = grad_PN.size(1);
  expect_block("topk_compress", format.block, TopkFormat::kMaxBlock);
  expect_pieces("topk_compress", grad_PN, residual_PN, payload_PB, format.payload_bytes(n));
  const int64_t used = format.kept_total(n) * (dtype_bytes(format.values) + 2);
  for (int64_t p = 0; p < P; ++p) clear_padding(payload_PB, p, used);
  const int64_t v_size = (format.block + 15) / 16 * 16;  // what follows is aligned like v
  DSTRAIN_CHECK(v_size * 4 + topk_scratch_bytes(format.block) <= pool_.scratch_bytes(),
                "topk_compress: a block does not fit the scratch memory of a thread");
  dispatch_values(format.values, [&]<class Values>() {
    run_blocks(pool_, P, n, format.block,
               [&](int64_t p, int64_t b, int64_t begin, int64_t count, void* scratch) {
                 auto* const v = static_cast<float*>(scratch);
                 const TopkPayload<Values> payload(format, payload_PB, p, n);
                 uint16_t* const indices = payload.indices + b * payload.kept_per_block;
                 const int64_t kept = format.kept(count);
                 float* const residual = piece_at(residual_PN, p, begin);
                 add_residual(piece_at(grad_PN, p, begin), residual, count, v);
                 choose_topk(v, count, kept, v + v_size, indices);
                 write_chosen<Values>(v, indices, kept, payload.values + b * payload.kept_per_block,
                                      residual);
               });
  });
}

void CpuOps::topk_sum(Stream&, const Tensor& payload_PB, const TopkFormat& format,
                      Accumulate accumulate, const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  const bool add = accumulate == Accumulate::add;
  expect_block("topk_sum", format.block, TopkFormat::kMaxBlock);
  expect_sum("topk_sum", payload_PB, sum_N, format.payload_bytes(n));
  dispatch_values(format.values, [&]<class Values>() {
    run_blocks(pool_, 1, n, format.block,
               [&](int64_t, int64_t b, int64_t begin, int64_t count, void*) {
                 float* const sum = sum_N.data<float>() + begin;
                 const int64_t kept = format.kept(count);
                 if (!add) std::fill(sum, sum + count, 0.0f);
                 for (int64_t p = 0; p < P; ++p) {
                   const TopkPayload<Values> payload(format, payload_PB, p, n);
                   const auto* const values = payload.values + b * payload.kept_per_block;
                   const auto* const indices = payload.indices + b * payload.kept_per_block;
                   // The first is stored, not added to zero, so that -0 stays what it is.
                   for (int64_t j = 0; j < kept; ++j)
                     sum[indices[j]] = p == 0 && !add ? Values::load(values[j])
                                                      : sum[indices[j]] + Values::load(values[j]);
                 }
               });
  });
}

void CpuOps::int8_compress(Stream&, const Tensor& grad_PN, const Int8Format& format,
                           const Tensor& residual_PN, const Tensor& payload_PB) {
  const int64_t P = grad_PN.size(0), n = grad_PN.size(1);
  expect_block("int8_compress", format.block, TopkFormat::kMaxBlock);
  expect_pieces("int8_compress", grad_PN, residual_PN, payload_PB, format.payload_bytes(n));
  for (int64_t p = 0; p < P; ++p) clear_padding(payload_PB, p, format.blocks(n) * 4 + n);
  run_blocks(pool_, P, n, format.block,
             [&](int64_t p, int64_t b, int64_t begin, int64_t count, void* scratch) {
               auto* const v = static_cast<float*>(scratch);
               auto* const scales = reinterpret_cast<float*>(payload_PB.data<uint8_t>() +
                                                             p * payload_PB.row_stride());
               auto* const codes = reinterpret_cast<int8_t*>(scales + format.blocks(n)) + begin;
               float* const residual = piece_at(residual_PN, p, begin);
               add_residual(piece_at(grad_PN, p, begin), residual, count, v);
               scales[b] = int8_scale(v, count);
               write_codes(v, count, scales[b], codes, residual);
             });
}

void CpuOps::int8_sum(Stream&, const Tensor& payload_PB, const Int8Format& format,
                      Accumulate accumulate, const Tensor& sum_N) {
  const int64_t P = payload_PB.size(0), n = sum_N.numel();
  const bool add = accumulate == Accumulate::add;
  expect_block("int8_sum", format.block, TopkFormat::kMaxBlock);
  expect_sum("int8_sum", payload_PB, sum_N, format.payload_bytes(n));
  run_blocks(
      pool_, 1, n, format.block, [&](int64_t, int64_t b, int64_t begin, int64_t count, void*) {
        float* const sum = sum_N.data<float>() + begin;
        for (int64_t p = 0; p < P; ++p) {
          const auto* const scales = reinterpret_cast<const float*>(payload_PB.data<uint8_t>() +
                                                                    p * payload_PB.row_stride());
          const auto* const codes =
              reinterpret_cast<const int8_t*>(scales + format.blocks(n)) + begin;
          const float scale = scales[b];
#pragma omp simd
          for (int64_t i = 0; i < count; ++i) {
            const float sent = static_cast<float>(codes[i]) * scale;
            sum[i] = p == 0 && !add ? sent : sum[i] + sent;
          }
        }
      });
}

void CpuOps::clear_if_skipped(Stream& stream, const StepScalars* scalars, const Tensor& x) {
  if (!scalars->finite) fill(stream, x, 0.0);
}

}  // namespace dstrain
