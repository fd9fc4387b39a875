// Which accesses to memory are ordered by streams and events, and which are not: a data race
// between streams is found in one run, whether or not it would have shown. Every call on a stream
// says what it reads and writes; vector clocks (Fidge 1988, Mattern 1989) tell whether an earlier
// access to the same bytes is over before it begins.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "core/tensor/tensor.h"

namespace dstrain::test {

struct MemoryRange {
  const void* begin = nullptr;
  int64_t bytes = 0;
};
// Of a tensor, row by row where rows lie apart; none of an absent one.
void add_ranges(const Tensor& x, std::vector<MemoryRange>& ranges);
std::vector<MemoryRange> ranges_of(const Tensor& x);

// A stream is a lane; so is whatever runs beside streams. Any thread may call.
class StreamOrder {
 public:
  // Of each lane, how many of its calls are over.
  using Clock = std::vector<int64_t>;

  int add_lane(std::string name);
  // What is over once the lane has come here: all that was queued on it, and what that waited for.
  Clock now(int lane);
  // Calls on the lane from now on happen after `clock`.
  void wait(int lane, const Clock& clock);
  // So do all calls that the host makes from now on.
  void host_waits(const Clock& clock);

  // A call on a lane. Reports every earlier access that conflicts and is not over.
  void call(int lane, const char* name, const std::vector<MemoryRange>& reads,
            const std::vector<MemoryRange>& writes);
  // The host gives memory back, and what was done to it does not matter any more. Reports what is
  // not over.
  void give_back(const void* begin, int64_t bytes);

  // "fill on stream 3 writes what add on stream 1 reads": each kind once, in order of appearance.
  // The later access stands first.
  std::vector<std::string> conflicts() const;
  int64_t calls() const { return calls_; }

 private:
  struct Access {
    int lane = -1;  // none; the host
    int64_t number = 0;
    const char* name = "";
  };
  struct Segment {
    uintptr_t end = 0;
    Access writer;
    std::vector<Access> readers;  // since then; the last one of each lane
  };
  using Segments = std::map<uintptr_t, Segment>;  // by begin

  static bool is_over(const Access& access, const Clock& clock);
  static void join(Clock& clock, const Clock& other);
  void split(uintptr_t at);
  Segments::iterator first_in(const MemoryRange& range);
  void read(const Access& access, const Clock& clock, const MemoryRange& range);
  void write(const Access& access, const Clock& clock, const MemoryRange& range);
  void report(const Access& access, const char* verb, const Access& earlier,
              const char* earlier_verb);

  mutable std::mutex mutex_;
  std::vector<std::string> names_;  // of lanes
  std::vector<Clock> clocks_;       // of lanes
  Clock host_;
  Segments segments_;
  std::set<std::string> seen_;
  std::vector<std::string> conflicts_;
  int64_t calls_ = 0;
};

}  // namespace dstrain::test
