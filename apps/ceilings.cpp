#include "apps/ceilings.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/backend/op_clock.h"
#include "core/backend/ops.h"

namespace dstrain {
namespace {

constexpr int kRepeats = 5;

// The median time of `calls` calls in a row, which keeps a GPU as warm as a step does.
template <class Run>
double median_seconds(Stream& stream, OpClock& clock, int calls, const Run& run) {
  run();
  std::vector<double> seconds;
  for (int i = 0; i < kRepeats; ++i) {
    const int begin = clock.mark(stream);
    for (int call = 0; call < calls; ++call) run();
    seconds.push_back(clock.seconds_between(begin, clock.mark(stream)) / calls);
  }
  std::sort(seconds.begin(), seconds.end());
  return seconds[kRepeats / 2];
}

Ops::SliceOf whole(int64_t n) {
  Ops::SliceOf slice;
  slice.extent = slice.global = n;
  return slice;
}

}  // namespace

double Ceilings::least_seconds(double work, double traffic) const {
  return std::max(work / flops, traffic / bytes);
}

Ceilings measure_ceilings(Backend& backend, DType dtype) {
  const bool cpu = backend.is_cpu();
  const int64_t N = cpu ? 1024 : 8192, copied = int64_t{cpu ? 64 : 512} << 20;
  const std::unique_ptr<Stream> stream = backend.make_stream();
  const std::unique_ptr<OpClock> clock = backend.make_clock();
  Ceilings ceilings;
  {
    const DeviceMemory from(backend, copied, MemoryKind::device),
        to(backend, copied, MemoryKind::device);
    backend.ops().fill(*stream, Tensor(from.data(), DType::f32, {copied / 4}), 1);
    const double seconds = median_seconds(*stream, *clock, cpu ? 1 : 8, [&] {
      backend.copy(*stream, to.data(), from.data(), copied);
    });
    ceilings.bytes = 2 * static_cast<double>(copied) / seconds;
  }
  std::vector<DeviceMemory> memory;
  std::vector<Tensor> matrices;
  for (uint64_t i = 0; i < 3; ++i) {
    memory.emplace_back(backend, N * N * dtype_bytes(dtype), MemoryKind::device);
    matrices.emplace_back(memory.back().data(), dtype, std::initializer_list<int64_t>{N, N});
    backend.ops().fill_normal(*stream, matrices.back(), 1, i, 1.0, whole(N * N));
  }
  const double seconds = median_seconds(*stream, *clock, cpu ? 1 : 16, [&] {
    backend.ops().matmul(*stream, Trans::no, Trans::yes, 1, matrices[0], matrices[1], 0,
                         matrices[2]);
  });
  const double n = static_cast<double>(N);
  ceilings.flops = 2 * n * n * n / seconds;
  stream->synchronize();
  return ceilings;
}

}  // namespace dstrain
