#include "core/engine/parameter_io.h"

#include <cstring>

namespace dstrain {
namespace {

float widen_bf16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

}  // namespace

std::vector<double> read_doubles(Backend& backend, Stream& stream, const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous(), "reads whole tensors");
  std::vector<char> raw(static_cast<size_t>(x.bytes()));
  backend.copy(stream, raw.data(), x.raw(), x.bytes());
  stream.synchronize();
  std::vector<double> out(static_cast<size_t>(x.numel()));
  for (size_t i = 0; i < out.size(); ++i) {
    if (x.dtype() == DType::f64)
      out[i] = reinterpret_cast<const double*>(raw.data())[i];
    else if (x.dtype() == DType::bf16)
      out[i] = widen_bf16(reinterpret_cast<const uint16_t*>(raw.data())[i]);
    else
      out[i] = reinterpret_cast<const float*>(raw.data())[i];
  }
  return out;
}

std::vector<float> read_tensor(Backend& backend, Stream& stream, const Tensor& x) {
  const std::vector<double> wide = read_doubles(backend, stream, x);
  return {wide.begin(), wide.end()};
}

void write_tensor(Backend& backend, Stream& stream, const std::vector<float>& values, const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous() && x.numel() == std::ssize(values), "writes whole tensors");
  if (x.dtype() == DType::f64) {
    const std::vector<double> wide(values.begin(), values.end());
    backend.copy(stream, x.raw(), wide.data(), x.bytes());
    stream.synchronize();
    return;
  }
  DSTRAIN_CHECK(x.dtype() == DType::f32, "parameters are f32 or f64");
  backend.copy(stream, x.raw(), values.data(), x.bytes());
  stream.synchronize();
}

}  // namespace dstrain
