#include "core/engine/parameter_io.h"

#include <algorithm>

#include "core/base/bf16.h"

namespace dstrain {
namespace {

template <class T>
std::vector<T> download(Backend& backend, Stream& stream, const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous(), "reads whole tensors");
  std::vector<T> host(static_cast<size_t>(x.numel()));
  backend.copy(stream, host.data(), x.raw(), x.bytes());
  stream.synchronize();
  return host;
}

template <class T>
void upload(Backend& backend, Stream& stream, const std::vector<T>& host, const Tensor& x) {
  DSTRAIN_CHECK(x.contiguous() && x.numel() == std::ssize(host), "writes whole tensors");
  backend.copy(stream, x.raw(), host.data(), x.bytes());
  stream.synchronize();
}

std::vector<float> widened(const std::vector<uint16_t>& bits) {
  std::vector<float> values(bits.size());
  std::transform(bits.begin(), bits.end(), values.begin(), bf16_to_f32);
  return values;
}

}  // namespace

std::vector<double> read_doubles(Backend& backend, Stream& stream, const Tensor& x) {
  if (x.dtype() == DType::f64) return download<double>(backend, stream, x);
  const std::vector<float> narrow = read_tensor(backend, stream, x);
  return {narrow.begin(), narrow.end()};
}

std::vector<float> read_tensor(Backend& backend, Stream& stream, const Tensor& x) {
  switch (x.dtype()) {
    case DType::f32:
      return download<float>(backend, stream, x);
    case DType::bf16:
      return widened(download<uint16_t>(backend, stream, x));
    case DType::f64: {
      const std::vector<double> wide = download<double>(backend, stream, x);
      return {wide.begin(), wide.end()};
    }
    default:
      check_failed("a type of values", __FILE__, __LINE__,
                   x.describe() + " holds no values of parameters");
  }
}

void write_tensor(Backend& backend, Stream& stream, const std::vector<float>& values,
                  const Tensor& x) {
  switch (x.dtype()) {
    case DType::f32:
      return upload(backend, stream, values, x);
    case DType::bf16: {
      std::vector<uint16_t> bits(values.size());
      std::transform(values.begin(), values.end(), bits.begin(), f32_to_bf16);
      return upload(backend, stream, bits, x);
    }
    case DType::f64:
      return upload(backend, stream, std::vector<double>(values.begin(), values.end()), x);
    default:
      check_failed("a type of values", __FILE__, __LINE__,
                   x.describe() + " takes no values of parameters");
  }
}

std::vector<float> read_slice(Backend& backend, Stream& stream, const StateSlice& slice) {
  if (!slice.low.defined()) return read_tensor(backend, stream, slice.data);
  const std::vector<uint16_t> high = download<uint16_t>(backend, stream, slice.data);
  const std::vector<uint16_t> low = download<uint16_t>(backend, stream, slice.low);
  DSTRAIN_CHECK(high.size() == low.size(),
                "the halves of '" + slice.parameter->spec.name + "' differ in length");
  std::vector<float> values(high.size());
  for (size_t i = 0; i < values.size(); ++i) values[i] = join_master({high[i], low[i]});
  return values;
}

void write_slice(Backend& backend, Stream& stream, const std::vector<float>& values,
                 const StateSlice& slice) {
  if (slice.kind != "param" || slice.data.dtype() != DType::bf16)
    return write_tensor(backend, stream, values, slice.data);
  std::vector<uint16_t> high(values.size()), low(values.size());
  for (size_t i = 0; i < values.size(); ++i) {
    const MasterHalves halves = split_master(values[i]);
    high[i] = halves.high;
    low[i] = halves.low;
  }
  upload(backend, stream, high, slice.data);
  if (slice.low.defined()) upload(backend, stream, low, slice.low);
}

}  // namespace dstrain
