#include "test/support/stream_order.h"

#include <fmt/format.h>

#include <algorithm>

namespace dstrain::test {
namespace {

uintptr_t begin_of(const MemoryRange& range) {
  return reinterpret_cast<uintptr_t>(range.begin);
}

uintptr_t end_of(const MemoryRange& range) {
  return begin_of(range) + static_cast<uintptr_t>(range.bytes);
}

}  // namespace

void add_ranges(const Tensor& x, std::vector<MemoryRange>& ranges) {
  if (!x.defined() || x.numel() == 0) return;
  if (x.contiguous()) {
    ranges.push_back({x.raw(), x.bytes()});
    return;
  }
  const int64_t element = dtype_bytes(x.dtype());
  for (int64_t row = 0; row < x.size(0); ++row)
    ranges.push_back({static_cast<const char*>(x.raw()) + row * x.row_stride() * element,
                      x.row_numel() * element});
}

std::vector<MemoryRange> ranges_of(const Tensor& x) {
  std::vector<MemoryRange> ranges;
  add_ranges(x, ranges);
  return ranges;
}

int StreamOrder::add_lane(std::string name) {
  const std::lock_guard lock(mutex_);
  names_.push_back(std::move(name));
  clocks_.emplace_back();
  return static_cast<int>(clocks_.size()) - 1;
}

StreamOrder::Clock StreamOrder::now(int lane) {
  const std::lock_guard lock(mutex_);
  Clock clock = clocks_[static_cast<size_t>(lane)];
  join(clock, host_);
  return clock;
}

void StreamOrder::wait(int lane, const Clock& clock) {
  const std::lock_guard lock(mutex_);
  join(clocks_[static_cast<size_t>(lane)], clock);
}

void StreamOrder::host_waits(const Clock& clock) {
  const std::lock_guard lock(mutex_);
  join(host_, clock);
}

void StreamOrder::call(int lane, const char* name, const std::vector<MemoryRange>& reads,
                       const std::vector<MemoryRange>& writes) {
  const std::lock_guard lock(mutex_);
  ++calls_;
  Clock& clock = clocks_[static_cast<size_t>(lane)];
  join(clock, host_);
  clock.resize(std::max(clock.size(), static_cast<size_t>(lane) + 1));
  const Access access{lane, ++clock[static_cast<size_t>(lane)], name};
  for (const MemoryRange& range : reads) read(access, clock, range);
  for (const MemoryRange& range : writes) write(access, clock, range);
}

void StreamOrder::give_back(const void* begin, int64_t bytes) {
  const std::lock_guard lock(mutex_);
  write({-1, 0, "deallocation"}, host_, {begin, bytes});
}

std::vector<std::string> StreamOrder::conflicts() const {
  const std::lock_guard lock(mutex_);
  return conflicts_;
}

bool StreamOrder::is_over(const Access& access, const Clock& clock) {
  const auto lane = static_cast<size_t>(access.lane);
  return access.lane < 0 || (lane < clock.size() && clock[lane] >= access.number);
}

void StreamOrder::join(Clock& clock, const Clock& other) {
  clock.resize(std::max(clock.size(), other.size()));
  for (size_t lane = 0; lane < other.size(); ++lane)
    clock[lane] = std::max(clock[lane], other[lane]);
}

void StreamOrder::split(uintptr_t at) {
  auto after = segments_.upper_bound(at);
  if (after == segments_.begin()) return;
  const auto around = std::prev(after);
  if (around->first == at || around->second.end <= at) return;
  Segment rest = around->second;
  around->second.end = at;
  segments_.emplace(at, std::move(rest));
}

// No segment lies across the range's begin or end afterwards.
StreamOrder::Segments::iterator StreamOrder::first_in(const MemoryRange& range) {
  split(begin_of(range));
  split(end_of(range));
  return segments_.lower_bound(begin_of(range));
}

void StreamOrder::read(const Access& access, const Clock& clock, const MemoryRange& range) {
  uintptr_t at = begin_of(range);
  const uintptr_t end = end_of(range);
  for (auto segment = first_in(range); at < end;) {
    if (segment == segments_.end() || segment->first > at) {  // nobody has touched it yet
      const uintptr_t until = segment == segments_.end() ? end : std::min(end, segment->first);
      segment = segments_.emplace_hint(segment, at, Segment{until, {}, {}});
    }
    Segment& here = segment->second;
    if (!is_over(here.writer, clock)) report(access, "reads", here.writer, "writes");
    std::erase_if(here.readers, [&](const Access& reader) { return reader.lane == access.lane; });
    here.readers.push_back(access);
    at = here.end;
    ++segment;
  }
}

void StreamOrder::write(const Access& access, const Clock& clock, const MemoryRange& range) {
  if (range.bytes == 0) return;
  auto segment = first_in(range);
  while (segment != segments_.end() && segment->first < end_of(range)) {
    const Segment& here = segment->second;
    if (!is_over(here.writer, clock)) report(access, "writes", here.writer, "writes");
    for (const Access& reader : here.readers)
      if (!is_over(reader, clock)) report(access, "writes", reader, "reads");
    segment = segments_.erase(segment);
  }
  segments_.emplace_hint(segment, begin_of(range), Segment{end_of(range), access, {}});
}

void StreamOrder::report(const Access& access, const char* verb, const Access& earlier,
                         const char* earlier_verb) {
  const auto name = [&](const Access& of) {
    return of.lane < 0 ? "the host" : names_[static_cast<size_t>(of.lane)];
  };
  std::string text = fmt::format("{} on {} {} what {} on {} {}", access.name, name(access), verb,
                                 earlier.name, name(earlier), earlier_verb);
  if (seen_.insert(text).second) conflicts_.push_back(std::move(text));
}

}  // namespace dstrain::test
