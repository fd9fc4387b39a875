#include "test/support/host_tensor.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <ostream>
#include <utility>

namespace dstrain::test {
namespace {

int64_t product(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t size : shape) n *= size;
  return n;
}

float bf16_to_float(uint16_t bits) {
  return std::bit_cast<float>(uint32_t{bits} << 16);
}

// Tries the neighbours of the truncated value instead of doing arithmetic on bits, so that it is
// independent of the code under test.
uint16_t nearest_bf16(double value) {
  if (std::isnan(value)) return 0x7fc0;
  if (std::isinf(value)) return value > 0 ? 0x7f80 : 0xff80;
  const uint32_t magnitude = std::bit_cast<uint32_t>(std::fabs(static_cast<float>(value)));
  const uint16_t below = static_cast<uint16_t>(magnitude >> 16);
  const uint16_t above = static_cast<uint16_t>(below + 1);
  const double to_below = std::fabs(std::fabs(value) - bf16_to_float(below));
  // Infinity counts as the number that would follow the largest.
  const double above_value = above == 0x7f80 ? 0x1p128 : double{bf16_to_float(above)};
  const double to_above = std::fabs(std::fabs(value) - above_value);
  const bool take_above = to_above < to_below || (to_above == to_below && above % 2 == 0);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  return static_cast<uint16_t>((take_above ? above : below) | sign);
}

struct Errors {
  double relative_l2 = 0, largest = 0, largest_reference = 0;
  int64_t worst = 0;
  std::string refusal;  // why no number can be given
};

Errors measure(const HostTensor& candidate, const HostTensor& reference, bool zero_allowed) {
  Errors errors;
  if (candidate.numel() != reference.numel()) {
    errors.refusal =
        "sizes differ: " + candidate.view().describe() + " and " + reference.view().describe();
    return errors;
  }
  double error_squares = 0, reference_squares = 0;
  for (int64_t i = 0; i < reference.numel(); ++i) {
    const double got = candidate.get(i), want = reference.get(i);
    if (!std::isfinite(got) || !std::isfinite(want)) {
      errors.refusal = "element " + std::to_string(i) + " is " + std::to_string(got) +
                       ", the reference " + std::to_string(want);
      return errors;
    }
    const double error = std::fabs(got - want);
    error_squares += error * error;
    reference_squares += want * want;
    errors.largest_reference = std::max(errors.largest_reference, std::fabs(want));
    if (error > errors.largest) {
      errors.largest = error;
      errors.worst = i;
    }
  }
  if (reference_squares == 0 && reference.numel() > 0 && !zero_allowed) {
    errors.refusal = "the reference is zero everywhere";
  }
  errors.relative_l2 = error_squares == 0 ? 0 : std::sqrt(error_squares / reference_squares);
  return errors;
}

Verdict judge(const HostTensor& candidate, const HostTensor& reference, double limit,
              bool zero_expected) {
  const Errors errors = measure(candidate, reference, zero_expected);
  if (!errors.refusal.empty()) return {false, errors.refusal};
  if (reference.numel() == 0) return {true, "empty"};
  if (zero_expected) {
    const bool zero = errors.largest == 0 && errors.largest_reference == 0;
    return {zero, zero ? "zero as expected" : "not zero at " + std::to_string(errors.worst)};
  }
  const bool ok =
      errors.relative_l2 <= limit && errors.largest <= 4 * limit * errors.largest_reference;
  char text[256];
  std::snprintf(
      text, sizeof text,
      "relative L2 error %.3g, largest error %.3g at %lld (%.9g, reference %.9g) where the "
      "limits are %.3g and %.3g",
      errors.relative_l2, errors.largest, static_cast<long long>(errors.worst),
      candidate.get(errors.worst), reference.get(errors.worst), limit,
      4 * limit * errors.largest_reference);
  return {ok, text};
}

double unit_roundoff(DType dtype) {
  switch (dtype) {
    case DType::f64:
      return 0x1p-53;
    case DType::bf16:
      return 0x1p-8;
    default:
      return 0x1p-24;
  }
}

}  // namespace

HostTensor::HostTensor(DType dtype, std::vector<int64_t> shape)
    : dtype_(dtype),
      shape_(std::move(shape)),
      numel_(product(shape_)),
      memory_(static_cast<size_t>(numel_ * dtype_bytes(dtype))) {}

HostTensor::HostTensor(DType dtype, std::vector<int64_t> shape, const std::vector<double>& values)
    : HostTensor(dtype, std::move(shape)) {
  DSTRAIN_CHECK(static_cast<int64_t>(values.size()) == numel_, "values do not fill the shape");
  for (int64_t i = 0; i < numel_; ++i) set(i, values[static_cast<size_t>(i)]);
}

Tensor HostTensor::view() const {
  return Tensor(memory_.data(), dtype_, shape_.data(), static_cast<int>(shape_.size()));
}

double HostTensor::get(int64_t i) const {
  DSTRAIN_CHECK(i >= 0 && i < numel_, "element outside of " + view().describe());
  const std::byte* at = memory_.data() + i * dtype_bytes(dtype_);
  const auto load = [at]<class T>(T value) {
    std::memcpy(&value, at, sizeof value);
    return value;
  };
  switch (dtype_) {
    case DType::f32:
      return static_cast<double>(load(float{}));
    case DType::f64:
      return load(double{});
    case DType::bf16:
      return static_cast<double>(bf16_to_float(load(uint16_t{})));
    case DType::i32:
      return load(int32_t{});
    case DType::i64:
      return static_cast<double>(load(int64_t{}));
    case DType::u8:
      return load(uint8_t{});
    case DType::u16:
      return load(uint16_t{});
  }
  return 0;
}

void HostTensor::set(int64_t i, double value) {
  DSTRAIN_CHECK(i >= 0 && i < numel_, "element outside of " + view().describe());
  std::byte* at = memory_.data() + i * dtype_bytes(dtype_);
  const auto store = [at](auto stored) { std::memcpy(at, &stored, sizeof stored); };
  switch (dtype_) {
    case DType::f32:
      return store(static_cast<float>(value));
    case DType::f64:
      return store(value);
    case DType::bf16:
      return store(nearest_bf16(value));
    case DType::i32:
      return store(static_cast<int32_t>(value));
    case DType::i64:
      return store(static_cast<int64_t>(value));
    case DType::u8:
      return store(static_cast<uint8_t>(value));
    case DType::u16:
      return store(static_cast<uint16_t>(value));
  }
}

std::vector<double> HostTensor::values() const {
  std::vector<double> all(static_cast<size_t>(numel_));
  for (int64_t i = 0; i < numel_; ++i) all[static_cast<size_t>(i)] = get(i);
  return all;
}

bool HostTensor::same_bits(const HostTensor& other) const {
  return dtype_ == other.dtype_ && shape_ == other.shape_ &&
         (memory_.empty() ||
          std::memcmp(memory_.data(), other.memory_.data(), memory_.size()) == 0);
}

void HostTensor::round_to_bf16() {
  for (int64_t i = 0; i < numel_; ++i) set(i, double{bf16_to_float(nearest_bf16(get(i)))});
}

std::ostream& operator<<(std::ostream& out, const Verdict& verdict) {
  return out << verdict.text;
}

Verdict compare(const HostTensor& candidate, const HostTensor& reference,
                const Tolerance& tolerance, DType run) {
  const double u = unit_roundoff(candidate.dtype());
  const bool bf16 = run == DType::bf16;
  const double u_sum =
      candidate.dtype() == DType::f64 ? u : unit_roundoff(DType::f32) * (bf16 ? 4 : 1);
  const double u_stored = bf16 ? unit_roundoff(DType::bf16) : 0;
  const double limit =
      u + tolerance.bf16_roundings * u_stored +
      u_sum * (tolerance.roundings + std::sqrt(static_cast<double>(tolerance.sum_length)));
  return judge(candidate, reference, limit, tolerance.expect_exact_zero);
}

Verdict compare(const HostTensor& candidate, const HostTensor& reference,
                const Tolerance& tolerance) {
  return compare(candidate, reference, tolerance, candidate.dtype());
}

Verdict compare_bits(const HostTensor& candidate, const HostTensor& reference) {
  if (candidate.same_bits(reference)) return {true, "the same bits"};
  if (candidate.numel() != reference.numel() || candidate.dtype() != reference.dtype())
    return {false, candidate.view().describe() + " is not " + reference.view().describe()};
  const int64_t bytes = dtype_bytes(candidate.dtype());
  const auto bits_of = [&](const HostTensor& x, int64_t i) {
    return static_cast<const std::byte*>(x.view().raw()) + i * bytes;
  };
  int64_t differences = 0;
  std::string first;
  for (int64_t i = 0; i < candidate.numel(); ++i) {
    if (std::memcmp(bits_of(candidate, i), bits_of(reference, i), static_cast<size_t>(bytes)) == 0)
      continue;
    if (++differences > 3) continue;
    char text[100];
    std::snprintf(text, sizeof text, ", %lld is %.9g and was expected to be %.9g",
                  static_cast<long long>(i), candidate.get(i), reference.get(i));
    first += text;
  }
  return {false, std::to_string(differences) + " of " + std::to_string(candidate.numel()) +
                     " elements differ" + first};
}

Verdict compare_within(const HostTensor& candidate, const HostTensor& reference, double limit) {
  return judge(candidate, reference, limit, false);
}

}  // namespace dstrain::test
