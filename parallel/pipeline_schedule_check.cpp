#include "parallel/pipeline_schedule_check.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <limits>
#include <map>
#include <utility>

#include "parallel/pipeline_schedule_timeline.h"

namespace dstrain {
namespace {

using Problems = std::vector<std::string>;

const char* text(ActionKind kind) {
  switch (kind) {
    case ActionKind::forward:
      return "forward";
    case ActionKind::backward:
      return "backward";
    case ActionKind::backward_input:
      return "backward_input";
    case ActionKind::backward_weight:
      return "backward_weight";
  }
  return "unknown kind";
}

std::string text(const PipelineAction& action) {
  return fmt::format("{} of micro-batch {} in chunk {}", text(action.kind), action.micro_batch,
                     action.chunk);
}

void check_ranges(const PipelineSchedule& s, Problems& problems) {
  constexpr int64_t kMost = std::numeric_limits<int>::max();
  if (s.stages < 1 || s.virtual_stages < 1 || s.micro_batches < 1 ||
      int64_t{s.stages} * s.virtual_stages > kMost) {
    problems.push_back(
        fmt::format("{} stages with {} chunks each and {} micro-batches make no pipeline", s.stages,
                    s.virtual_stages, s.micro_batches));
    return;
  }
  if (s.actions.size() != static_cast<size_t>(s.stages))
    problems.push_back(
        fmt::format("{} stages have {} lists of actions", s.stages, s.actions.size()));
  for (size_t stage = 0; stage < s.actions.size(); ++stage)
    for (size_t i = 0; i < s.actions[stage].size(); ++i) {
      const PipelineAction& a = s.actions[stage][i];
      if (a.chunk < 0 || a.chunk >= s.virtual_stages || a.micro_batch < 0 ||
          a.micro_batch >= s.micro_batches || a.kind < ActionKind::forward ||
          a.kind > ActionKind::backward_weight)
        problems.push_back(
            fmt::format("stage {}, action {}: {} is out of range", stage, i, text(a)));
    }
}

// How often a chunk of a stage runs each kind for one micro-batch.
using Counts = std::array<int, 4>;

void check_counts_of(const PipelineSchedule& s, int stage, int chunk, int b, const Counts& counts,
                     Problems& problems) {
  const auto count = [&](ActionKind kind) { return counts[static_cast<size_t>(kind)]; };
  const auto report = [&](ActionKind kind, const std::string& what) {
    problems.push_back(fmt::format("stage {}: {} {}", stage, text({kind, chunk, b}), what));
  };
  const auto expect_one = [&](ActionKind kind) {
    if (count(kind) == 0) report(kind, "is missing");
    if (count(kind) > 1) report(kind, fmt::format("runs {} times", count(kind)));
  };
  expect_one(ActionKind::forward);
  const int parts = count(ActionKind::backward_input) + count(ActionKind::backward_weight);
  if (!s.training) {
    if (count(ActionKind::backward) + parts > 0)
      report(ActionKind::backward, "runs in a schedule without training");
  } else if (parts == 0) {
    expect_one(ActionKind::backward);
  } else if (count(ActionKind::backward) > 0) {
    report(ActionKind::backward, "runs whole and in parts");
  } else {
    expect_one(ActionKind::backward_input);
    expect_one(ActionKind::backward_weight);
  }
}

void check_counts(const PipelineSchedule& s, Problems& problems) {
  for (int stage = 0; stage < s.stages; ++stage) {
    const auto micro_batches = static_cast<size_t>(s.micro_batches);
    std::vector<Counts> counts(static_cast<size_t>(s.virtual_stages) * micro_batches, Counts{});
    const auto index = [&](int chunk, int b) {
      return static_cast<size_t>(chunk) * micro_batches + static_cast<size_t>(b);
    };
    for (const PipelineAction& a : s.actions[static_cast<size_t>(stage)])
      ++counts[index(a.chunk, a.micro_batch)][static_cast<size_t>(a.kind)];
    for (int chunk = 0; chunk < s.virtual_stages; ++chunk)
      for (int b = 0; b < s.micro_batches; ++b)
        check_counts_of(s, stage, chunk, b, counts[index(chunk, b)], problems);
  }
}

// Each action of a chunk's micro-batch is of a later kind than the one before it.
void check_own_order(const PipelineSchedule& s, Problems& problems) {
  for (size_t stage = 0; stage < s.actions.size(); ++stage) {
    const auto micro_batches = static_cast<size_t>(s.micro_batches);
    std::vector<ActionKind> last(static_cast<size_t>(s.virtual_stages) * micro_batches,
                                 ActionKind::forward);
    for (const PipelineAction& a : s.actions[stage]) {
      ActionKind& before =
          last[static_cast<size_t>(a.chunk) * micro_batches + static_cast<size_t>(a.micro_batch)];
      if (a.kind < before)
        problems.push_back(
            fmt::format("stage {}: {} comes after its {}", stage, text(a), text(before)));
      before = std::max(before, a.kind);
    }
  }
}

void check_deadlock(const PipelineSchedule& s, Problems& problems) {
  const PipelineTimeline timeline = simulate(s);
  for (int stage = 0; stage < s.stages; ++stage) {
    const auto& actions = s.actions[static_cast<size_t>(stage)];
    const size_t done = timeline.spans[static_cast<size_t>(stage)].size();
    if (done == actions.size()) continue;
    const PipelineResult missing = *needs(s, stage, actions[done]);  // one that needs none ran
    problems.push_back(
        fmt::format("deadlock: stage {} waits in action {}, {}, for the {} of chunk {} on stage {}",
                    stage, done, text(actions[done]), missing.gradient ? "gradient" : "output",
                    missing.global_stage / s.stages, missing.global_stage % s.stages));
  }
}

// What stage `from` sends stage `to`, in the order of the sender or, with `taken`, of the receiver.
std::vector<PipelineResult> messages(const PipelineSchedule& s, int from, int to, bool taken) {
  std::vector<PipelineResult> list;
  for (const PipelineAction& a : s.actions[static_cast<size_t>(taken ? to : from)]) {
    if (a.kind == ActionKind::backward_weight) continue;
    const bool gradient = a.kind != ActionKind::forward;
    const int g = s.global_stage(taken ? to : from, a.chunk), step = gradient ? -1 : 1;
    const int other = taken ? g - step : g + step;
    if (other >= 0 && other < s.global_stages() && other % s.stages == (taken ? from : to))
      list.push_back({gradient, taken ? other : g, a.micro_batch});
  }
  return list;
}

void check_channel(const PipelineSchedule& s, int from, int to, Problems& problems) {
  const auto sent = messages(s, from, to, false), taken = messages(s, from, to, true);
  const auto [it, other] = std::mismatch(sent.begin(), sent.end(), taken.begin(), taken.end());
  if (it == sent.end()) return;  // no action is missing, so both are of one length
  const auto name = [&](const PipelineResult& result) {
    return fmt::format("the {} of micro-batch {} in chunk {}",
                       result.gradient ? "gradient" : "output", result.micro_batch,
                       result.global_stage / s.stages);
  };
  problems.push_back(fmt::format(
      "stage {} sends stage {} messages in another order than it takes them: message {} "
      "is {}, expected is {}",
      from, to, it - sent.begin(), name(*it), name(*other)));
}

void check_channels(const PipelineSchedule& s, Problems& problems) {
  if (s.stages == 1) return;  // nothing is sent
  for (int stage = 0; stage < s.stages; ++stage) {
    const int next = (stage + 1) % s.stages, previous = (stage + s.stages - 1) % s.stages;
    check_channel(s, stage, next, problems);
    if (previous != next) check_channel(s, stage, previous, problems);
  }
}

void check_slots(const PipelineSchedule& s, Problems& problems) {
  constexpr int kFree = -1;
  for (int stage = 0; stage < s.stages; ++stage) {
    std::vector<std::vector<int>> slots;  // the micro-batch in each slot of each chunk
    for (int chunk = 0; chunk < s.virtual_stages; ++chunk)
      slots.emplace_back(static_cast<size_t>(in_flight(s, stage, chunk)), kFree);
    for (const PipelineAction& a : s.actions[static_cast<size_t>(stage)]) {
      auto& of_chunk = slots[static_cast<size_t>(a.chunk)];
      int& slot = of_chunk[static_cast<size_t>(a.micro_batch) % of_chunk.size()];
      if (a.kind == ActionKind::forward) {
        if (slot != kFree)
          problems.push_back(
              fmt::format("stage {}: {} begins while its slot, of {}, still holds micro-batch {}",
                          stage, text(a), of_chunk.size(), slot));
        slot = a.micro_batch;
      }
      if (s.frees_slot(a)) slot = kFree;
    }
  }
}

// An end without deadlock was shown for buffered sends.
void check_slot_reuse(const PipelineSchedule& s, Problems& problems) {
  const PipelineTimeline timeline = simulate(s, {}, PipelineSends::in_place);
  for (int stage = 0; stage < s.stages; ++stage) {
    const auto& actions = s.actions[static_cast<size_t>(stage)];
    const size_t done = timeline.spans[static_cast<size_t>(stage)].size();
    if (done < actions.size())
      problems.push_back(
          fmt::format("deadlock where slots hold what was sent until it is received: stage {} does "
                      "not get past "
                      "action {}, {}",
                      stage, done, text(actions[done])));
  }
}

// What a stage does with messages, in order. Those from one stage to another are numbered from 0.
struct MessageStep {
  enum class Kind { send, receive, reuse } kind;  // reuse: of the memory that was sent
  int other, number;
  size_t action;
};

std::vector<MessageStep> message_steps(const PipelineSchedule& s, int stage) {
  std::vector<MessageStep> steps;
  std::map<int, int> sent, received;                                // by the other stage
  std::map<std::pair<int, int>, std::vector<MessageStep>> in_slot;  // by chunk and slot
  const auto& actions = s.actions[static_cast<size_t>(stage)];
  for (size_t i = 0; i < actions.size(); ++i) {
    const PipelineAction& a = actions[i];
    if (a.kind == ActionKind::backward_weight) continue;
    auto& slot = in_slot[{a.chunk, a.micro_batch % in_flight(s, stage, a.chunk)}];
    if (a.kind == ActionKind::forward) {
      steps.insert(steps.end(), slot.begin(), slot.end());
      slot.clear();
    }
    const int g = s.global_stage(stage, a.chunk), step = a.kind == ActionKind::forward ? 1 : -1;
    const auto other = [&](int global) {
      return global < 0 || global >= s.global_stages() ? stage : global % s.stages;
    };
    if (const int from = other(g - step); from != stage)
      steps.push_back({MessageStep::Kind::receive, from, received[from]++, i});
    if (const int to = other(g + step); to != stage) {
      steps.push_back({MessageStep::Kind::send, to, sent[to]++, i});
      slot.push_back({MessageStep::Kind::reuse, to, steps.back().number, i});
    }
  }
  return steps;
}

void check_room_for_messages(const PipelineSchedule& s, Problems& problems) {
  std::vector<std::vector<MessageStep>> steps;
  for (int stage = 0; stage < s.stages; ++stage) steps.push_back(message_steps(s, stage));
  std::vector<size_t> next(steps.size(), 0);
  std::map<std::pair<int, int>, int> sent, received;  // by the sender and the receiver
  const auto passes = [&](int stage, const MessageStep& step) {
    const std::pair there{stage, step.other}, here{step.other, stage};
    switch (step.kind) {
      case MessageStep::Kind::receive:
        return sent[here] > step.number && ++received[here] > 0;
      case MessageStep::Kind::reuse:
        return received[there] > step.number;
      case MessageStep::Kind::send:
        break;
    }
    return sent[there] - received[there] < messages_under_way(s.stages) && ++sent[there] > 0;
  };
  for (bool moved = true; moved;) {
    moved = false;
    for (size_t stage = 0; stage < steps.size(); ++stage)
      for (size_t& at = next[stage];
           at < steps[stage].size() && passes(static_cast<int>(stage), steps[stage][at]); ++at)
        moved = true;
  }
  for (size_t stage = 0; stage < steps.size(); ++stage) {
    if (next[stage] == steps[stage].size()) continue;
    const size_t action = steps[stage][next[stage]].action;
    problems.push_back(
        fmt::format("deadlock where {} messages at most are under way from a stage to another: "
                    "stage {} does not get past action {}, {}",
                    messages_under_way(s.stages), stage, action, text(s.actions[stage][action])));
  }
}

}  // namespace

std::vector<std::string> check(const PipelineSchedule& schedule) {
  Problems problems;
  for (const auto& rule :
       {check_ranges, check_counts, check_own_order, check_deadlock, check_channels, check_slots,
        check_slot_reuse, check_room_for_messages}) {
    rule(schedule, problems);
    if (!problems.empty()) break;
  }
  return problems;
}

}  // namespace dstrain
