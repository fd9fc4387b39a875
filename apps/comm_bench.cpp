#include "apps/comm_bench.h"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <functional>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>

#include "core/backend/ops.h"
#include "core/base/error.h"
#include "core/base/format_units.h"

namespace dstrain {
namespace {

constexpr int64_t kLargestSize = int64_t{1} << 36;
constexpr int kWarmUp = 3;
constexpr double kMeasuredSeconds = 0.2;
constexpr int64_t kMinCalls = 4, kMaxCalls = 1000;

struct CommBench {
  Communicator& ranks;
  Backend& backend;
  std::unique_ptr<Stream> stream;
  DeviceMemory from, to;
};

double seconds_of(CommBench& bench, int64_t calls, const std::function<void()>& call) {
  bench.ranks.barrier();
  const auto begin = std::chrono::steady_clock::now();
  for (int64_t i = 0; i < calls; ++i) call();
  bench.stream->synchronize();
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - begin;
  return passed.count() / static_cast<double>(calls);
}

// The mean over ranks; they get the same, which decides how often they call next.
double mean_over_ranks(Communicator& ranks, double seconds) {
  const std::vector<std::string> all = ranks.all_gather_text(fmt::format("{:.17g}", seconds));
  double sum = 0;
  for (const std::string& text : all) sum += std::stod(text);
  return sum / static_cast<double>(all.size());
}

double time_call(CommBench& bench, const std::function<void()>& call) {
  seconds_of(bench, kWarmUp, call);
  const double once = mean_over_ranks(bench.ranks, seconds_of(bench, 1, call));
  const double wanted = kMeasuredSeconds / std::max(once, 1e-9);
  const int64_t calls =
      std::clamp(static_cast<int64_t>(std::min(wanted, 1e9)), kMinCalls, kMaxCalls);
  return mean_over_ranks(bench.ranks, seconds_of(bench, calls, call));
}

int64_t parse_size(std::string_view text, const char* option) {
  constexpr std::pair<std::string_view, int> kUnits[] = {
      {"", 0}, {"K", 10}, {"KiB", 10}, {"M", 20}, {"MiB", 20}, {"G", 30}, {"GiB", 30}};
  int64_t size = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), size);
  const std::string_view unit = text.substr(static_cast<size_t>(end - text.data()));
  for (const auto& [name, shift] : kUnits)
    if (error == std::errc() && unit == name && size >= 1 && size <= kLargestSize >> shift)
      return size << shift;
  throw UsageError(
      fmt::format("{}: '{}' is no size from 1 to 64GiB, such as 4096, 64K or 1GiB", option, text));
}

std::vector<CommTiming> time_size(CommBench& bench, DType dtype, int64_t bytes) {
  Communicator& ranks = bench.ranks;
  Stream& stream = *bench.stream;
  const int64_t n = ranks.size(), part = bytes / dtype_bytes(dtype) / n;
  if (part == 0) return {};
  const Tensor x = Tensor(bench.from.data(), dtype, {n * part});
  const Tensor y = Tensor(bench.to.data(), dtype, {n * part});
  const Tensor x_part = Tensor(bench.from.data(), dtype, {part});
  const Tensor y_part = Tensor(bench.to.data(), dtype, {part});
  const Tensor rows = x.view({n, part}), other_rows = y.view({n, part});
  std::vector<int64_t> offsets;
  for (int64_t r = 0; r <= n; ++r) offsets.push_back(r);
  const int next = (ranks.rank() + 1) % ranks.size();
  const int previous = (ranks.rank() + ranks.size() - 1) % ranks.size();
  const double others = static_cast<double>(n - 1) / static_cast<double>(n);

  std::vector<CommTiming> timings;
  const auto time = [&](const char* name, double bus_factor, const std::function<void()>& call) {
    timings.push_back({name, dtype, x.bytes(), time_call(bench, call), bus_factor});
  };
  time("all_reduce", 2 * others, [&] { ranks.all_reduce_sum(stream, x); });
  time("reduce_scatter", others, [&] { ranks.reduce_scatter_sum(stream, x, y_part); });
  time("all_gather", others, [&] { ranks.all_gather(stream, x_part, y); });
  time("all_to_all", others, [&] { ranks.all_to_all(stream, rows, offsets, other_rows, offsets); });
  time("send_recv", 1, [&] {
    ranks.send(stream, x, next);
    ranks.recv(stream, y, previous);
    ranks.wait_send(stream, x);
  });
  return timings;
}

}  // namespace

std::vector<int64_t> parse_sizes(std::string_view text, const char* option) {
  std::vector<int64_t> sizes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    sizes.push_back(parse_size(text.substr(begin, end - begin), option));
    begin = end + 1;
  }
  return sizes;
}

std::vector<int64_t> default_sizes(bool on_gpus) {
  std::vector<int64_t> sizes;
  const int64_t largest = int64_t{on_gpus ? 1024 : 64} << 20;
  for (int64_t size = 4096; size <= largest; size *= 4) sizes.push_back(size);
  return sizes;
}

std::vector<CommTiming> bench_comm(Communicator& ranks, Backend& backend,
                                   const std::vector<int64_t>& sizes) {
  DSTRAIN_CHECK(ranks.size() > 1, "one rank exchanges nothing");
  ranks.prepare(Connections::exchanges);
  ranks.prepare(Connections::messages);
  const int64_t largest = (*std::max_element(sizes.begin(), sizes.end()) + 3) / 4 * 4;
  CommBench bench{ranks, backend, backend.make_stream(),
                  DeviceMemory(backend, largest, MemoryKind::device),
                  DeviceMemory(backend, largest, MemoryKind::device)};
  for (const DeviceMemory* memory : {&bench.from, &bench.to})  // sums of zeros stay zeros
    backend.ops().fill(*bench.stream, Tensor(memory->data(), DType::f32, {largest / 4}), 0.0);
  std::vector<CommTiming> timings;
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const int64_t size : sizes)
      for (CommTiming& timing : time_size(bench, dtype, size)) timings.push_back(std::move(timing));
  return timings;
}

std::string comm_table(const std::vector<CommTiming>& timings) {
  std::vector<const CommTiming*> rows;
  for (const CommTiming& timing : timings) rows.push_back(&timing);
  // Call by call, each by type and size as they were timed.
  std::stable_sort(rows.begin(), rows.end(),
                   [](const auto* a, const auto* b) { return a->call < b->call; });
  std::string text = fmt::format("{:<15}{:<6}{:>12}{:>13}{:>17}{:>11}\n", "call", "type", "size",
                                 "time us", "algorithm GB/s", "bus GB/s");
  for (const CommTiming* row : rows)
    text += fmt::format("{:<15}{:<6}{:>12}{:>13.1f}{:>17.2f}{:>11.2f}\n", row->call,
                        dtype_name(row->dtype), format_bytes(row->bytes), 1e6 * row->seconds,
                        1e-9 * row->algorithm_rate(), 1e-9 * row->bus_rate());
  return text;
}

std::string comm_json(const std::vector<CommTiming>& timings, int ranks,
                      const std::string& device) {
  std::string text;
  for (const CommTiming& row : timings) {
    const nlohmann::json object = {{"call", row.call},
                                   {"dtype", dtype_name(row.dtype)},
                                   {"bytes", row.bytes},
                                   {"us", 1e6 * row.seconds},
                                   {"algorithm_gb_per_s", 1e-9 * row.algorithm_rate()},
                                   {"bus_gb_per_s", 1e-9 * row.bus_rate()},
                                   {"ranks", ranks},
                                   {"device", device}};
    text += object.dump() + "\n";
  }
  return text;
}

}  // namespace dstrain
