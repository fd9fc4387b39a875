// Element types of safetensors files: names, sizes and conversion to f32.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>

#include "core/base/error.h"
#include "core/checkpoint/safetensors.h"

namespace dstrain {
namespace {

struct TypeInfo {
  SafetensorsType type;
  const char* name;
  int64_t bytes;
};

constexpr TypeInfo kTypes[] = {
    {SafetensorsType::boolean, "BOOL", 1},    {SafetensorsType::u8, "U8", 1},
    {SafetensorsType::i8, "I8", 1},           {SafetensorsType::f8_e4m3, "F8_E4M3", 1},
    {SafetensorsType::f8_e5m2, "F8_E5M2", 1}, {SafetensorsType::f8_e8m0, "F8_E8M0", 1},
    {SafetensorsType::u16, "U16", 2},         {SafetensorsType::i16, "I16", 2},
    {SafetensorsType::f16, "F16", 2},         {SafetensorsType::bf16, "BF16", 2},
    {SafetensorsType::u32, "U32", 4},         {SafetensorsType::i32, "I32", 4},
    {SafetensorsType::f32, "F32", 4},         {SafetensorsType::u64, "U64", 8},
    {SafetensorsType::i64, "I64", 8},         {SafetensorsType::f64, "F64", 8},
};

const TypeInfo& info_of(SafetensorsType type) {
  return kTypes[static_cast<size_t>(type)];
}

float bf16_to_f32(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float f16_to_f32(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  const uint32_t exponent = bits >> 10 & 0x1F, mantissa = bits & 0x3FF;
  if (exponent == 0) {  // zero and subnormals: mantissa x 2^-24, exact in f32
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
  }
  // Infinity and NaN keep an exponent of all ones; others move from bias 15 to bias 127.
  const uint32_t f32_exponent = exponent == 0x1F ? 0xFF : exponent + 127 - 15;
  return std::bit_cast<float>(sign | f32_exponent << 23 | mantissa << 13);
}

// A NaN keeps the payload bits that fit, and one where none does.
uint16_t f32_to_bf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFF) > 0x7F800000)
    return static_cast<uint16_t>(bits >> 16 | ((bits & 0x7F0000) == 0 ? 0x40 : 0));
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

uint16_t f32_to_f16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7FFFFFFF;
  uint32_t f16 = 0;
  if (magnitude > 0x7F800000) {
    const uint32_t payload = magnitude >> 13 & 0x3FF;
    f16 = 0x7C00 | (payload == 0 ? 0x200 : payload);
  } else if (magnitude < 0x38800000) {
    // Below 2^-14 steps are 2^-24, which is also the step of f32 at 0.5: the sum rounds to it.
    const float sum = std::bit_cast<float>(magnitude) + 0.5f;
    f16 = std::bit_cast<uint32_t>(sum) - std::bit_cast<uint32_t>(0.5f);
  } else {
    // From bias 127 to bias 15; a carry out of the mantissa is the next exponent, at last infinity.
    const uint32_t rounded = magnitude + 0xFFF + (magnitude >> 13 & 1);
    f16 = std::min<uint32_t>((rounded - (112u << 23)) >> 13, 0x7C00);
  }
  return static_cast<uint16_t>(sign | f16);
}

// `is_infinite` tells whether a stored value is.
template <class Stored, class Convert, class IsInfinite>
bool convert_back(const float* src, int64_t count, void* dst, Convert convert,
                  IsInfinite is_infinite) {
  char* bytes = static_cast<char*>(dst);
  bool fits = true;
  for (int64_t i = 0; i < count; ++i) {
    const Stored value = convert(src[i]);
    fits = fits && (!is_infinite(value) || std::isinf(src[i]));
    std::memcpy(bytes + i * static_cast<int64_t>(sizeof value), &value, sizeof value);
  }
  return fits;
}

template <class Stored, class Convert>
void convert_each(const void* src, int64_t count, float* dst, Convert convert) {
  const char* bytes = static_cast<const char*>(src);
  for (int64_t i = 0; i < count; ++i) {
    Stored value;
    std::memcpy(&value, bytes + i * static_cast<int64_t>(sizeof value), sizeof value);
    dst[i] = convert(value);
  }
}

}  // namespace

const char* safetensors_type_name(SafetensorsType type) {
  return info_of(type).name;
}
int64_t safetensors_type_bytes(SafetensorsType type) {
  return info_of(type).bytes;
}

std::optional<SafetensorsType> parse_safetensors_type(std::string_view name) {
  for (const TypeInfo& info : kTypes)
    if (name == info.name) return info.type;
  return std::nullopt;
}

SafetensorsType to_safetensors_type(DType dtype) {
  switch (dtype) {
    case DType::f32:
      return SafetensorsType::f32;
    case DType::f64:
      return SafetensorsType::f64;
    case DType::bf16:
      return SafetensorsType::bf16;
    case DType::i32:
      return SafetensorsType::i32;
    case DType::i64:
      return SafetensorsType::i64;
    case DType::u8:
      return SafetensorsType::u8;
    case DType::u16:
      return SafetensorsType::u16;
  }
  throw RuntimeFailure("an element type has no name in safetensors files");
}

std::optional<DType> to_dtype(SafetensorsType type) {
  for (const DType dtype : {DType::f32, DType::f64, DType::bf16, DType::i32, DType::i64, DType::u8,
                            DType::u16})
    if (to_safetensors_type(dtype) == type) return dtype;
  return std::nullopt;
}

void convert_to_f32(SafetensorsType type, const void* src, int64_t count, float* dst) {
  switch (type) {
    case SafetensorsType::f32:
      if (count > 0) std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(float));
      return;
    case SafetensorsType::f64:
      return convert_each<double>(src, count, dst, [](double x) { return static_cast<float>(x); });
    case SafetensorsType::bf16:
      return convert_each<uint16_t>(src, count, dst, bf16_to_f32);
    case SafetensorsType::f16:
      return convert_each<uint16_t>(src, count, dst, f16_to_f32);
    default:
      throw DataError(fmt::format("cannot convert {} to F32; F16, BF16, F32 and F64 are supported",
                                  safetensors_type_name(type)));
  }
}

bool convert_from_f32(SafetensorsType type, const float* src, int64_t count, void* dst) {
  switch (type) {
    case SafetensorsType::f32:
      if (count > 0) std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(float));
      return true;
    case SafetensorsType::f64:
      return convert_back<double>(
          src, count, dst, [](float x) { return static_cast<double>(x); },
          [](double) { return false; });
    case SafetensorsType::bf16:
      return convert_back<uint16_t>(src, count, dst, f32_to_bf16,
                                    [](uint16_t x) { return (x & 0x7FFF) == 0x7F80; });
    case SafetensorsType::f16:
      return convert_back<uint16_t>(src, count, dst, f32_to_f16,
                                    [](uint16_t x) { return (x & 0x7FFF) == 0x7C00; });
    default:
      throw DataError(fmt::format("cannot convert F32 to {}; F16, BF16, F32 and F64 are supported",
                                  safetensors_type_name(type)));
  }
}

std::optional<int64_t> checked_tensor_bytes(std::span<const int64_t> shape, int64_t element_bytes) {
  int64_t bytes = element_bytes;
  bool empty = false;
  for (const int64_t size : shape) {
    if (size < 0) return std::nullopt;
    if (size == 0)
      empty = true;
    else if (__builtin_mul_overflow(bytes, size, &bytes))
      return std::nullopt;
  }
  return empty ? 0 : bytes;
}

}  // namespace dstrain
