#include "parallel/pipeline_schedule.h"

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <utility>

#include "core/base/error.h"
#include "parallel/pipeline_schedule_check.h"
#include "parallel/pipeline_schedule_timeline.h"
#include "test/support/catch.h"

namespace dstrain {
namespace {

constexpr auto F = ActionKind::forward;
constexpr auto B = ActionKind::backward;
constexpr auto I = ActionKind::backward_input;
constexpr auto W = ActionKind::backward_weight;
using Actions = std::vector<PipelineAction>;

enum class Kind { one_f_one_b, interleaved, zero_bubble, forward_only };

// Calls visit with every schedule of up to 8 stages, 4 chunks and 16 micro-batches.
void for_each_schedule(const std::function<void(Kind, const PipelineSchedule&)>& visit) {
  for (int stages = 1; stages <= 8; ++stages)
    for (int micro_batches = 1; micro_batches <= 16; ++micro_batches) {
      visit(Kind::one_f_one_b, make_one_f_one_b(stages, micro_batches));
      visit(Kind::zero_bubble, make_zero_bubble(stages, micro_batches));
      for (int chunks = 1; chunks <= 4; ++chunks) {
        visit(Kind::forward_only, make_forward_only(stages, chunks, micro_batches));
        if (micro_batches % stages == 0)
          visit(Kind::interleaved, make_interleaved(stages, chunks, micro_batches));
      }
    }
}

std::string joined(const std::vector<std::string>& lines) {
  std::string text;
  for (const std::string& line : lines) text += line + "\n";
  return text;
}

PipelineSchedule schedule_of(int micro_batches, std::vector<Actions> actions, int chunks = 1) {
  return {static_cast<int>(actions.size()), chunks, micro_batches, true, std::move(actions)};
}

bool finds(const PipelineSchedule& schedule, const std::string& what) {
  const std::string problems = joined(check(schedule));
  CAPTURE(what, problems);
  return problems.find(what) != std::string::npos;
}

// Runs a schedule as ranks would, apart from the checker: results go through one queue from each
// rank to each other, and each must be the one that its taker expects. Returns what went wrong.
std::string run_over_queues(const PipelineSchedule& s) {
  using Message = std::tuple<bool, int, int>;  // gradient, global stage, micro-batch

  std::map<std::pair<int, int>, std::deque<Message>> queues;  // from, to
  std::set<Message> local;                                    // one stage hands results to itself
  std::vector<size_t> next(s.actions.size(), 0);
  size_t left = 0;
  for (const Actions& actions : s.actions) left += actions.size();
  for (bool moved = true; moved;) {
    moved = false;
    for (int p = 0; p < s.stages; ++p) {
      const Actions& actions = s.actions[static_cast<size_t>(p)];
      size_t& at = next[static_cast<size_t>(p)];
      if (at == actions.size()) continue;
      const PipelineAction& a = actions[at];
      const bool gradient = a.kind != F;
      const int g = a.chunk * s.stages + p, last = s.stages * s.virtual_stages - 1;
      const int from = gradient ? g + 1 : g - 1, to = gradient ? g - 1 : g + 1;
      const auto has = [&](int other) { return a.kind != W && other >= 0 && other <= last; };
      if (has(from) && s.stages == 1) {
        if (local.count({gradient, from, a.micro_batch}) == 0) continue;
      } else if (has(from)) {
        auto& queue = queues[{from % s.stages, p}];
        if (queue.empty()) continue;
        if (queue.front() != Message(gradient, from, a.micro_batch))
          return "another result was in front";
        queue.pop_front();
      }
      if (has(to)) {
        local.insert({gradient, g, a.micro_batch});
        queues[{p, to % s.stages}].push_back({gradient, g, a.micro_batch});
      }
      ++at, --left, moved = true;
    }
  }
  return left == 0 ? "" : "some actions never ran";
}

}  // namespace

TEST_CASE("pipeline schedules are sound in every layout", "[pipeline]") {
  int visited = 0;
  for_each_schedule([&](Kind, const PipelineSchedule& s) {
    ++visited;
    const std::string problems = joined(check(s)) + run_over_queues(s);
    if (problems.empty()) return;
    CAPTURE(s.stages, s.virtual_stages, s.micro_batches, draw(s));
    FAIL(problems);
  });
  CHECK(visited > 900);
}

TEST_CASE("a pipeline of one stage runs forward, then backward", "[pipeline]") {
  // Several chunks: all of them forward, then all of them backward.
  CHECK(draw(make_interleaved(1, 2, 2)) ==
        "stage 0  F0.0 F0.1 B0.1----- B0.0----- F1.0 F1.1 B1.1----- B1.0-----\n");
  const std::vector<Actions> expected = {{{F, 0, 0}, {B, 0, 0}, {F, 0, 1}, {B, 0, 1}}};
  CHECK(make_one_f_one_b(1, 2).actions == expected);
  CHECK(make_interleaved(1, 1, 2).actions == expected);
  CHECK(make_zero_bubble(1, 2).actions == expected);
  CHECK(in_flight(make_one_f_one_b(1, 2), 0, 0) == 1);
  CHECK(batches_in_flight(make_one_f_one_b(1, 2), 0) == 1);
}

TEST_CASE("pipeline memory: slots in flight", "[pipeline]") {
  for (int stages = 1; stages <= 8; ++stages)
    for (int m = 1; m <= 16; ++m)
      for (int p = 0; p < stages; ++p) {
        CAPTURE(stages, m, p);
        CHECK(in_flight(make_one_f_one_b(stages, m), p, 0) == std::min(stages - p, m));
        CHECK(batches_in_flight(make_one_f_one_b(stages, m), p) == std::min(stages - p, m));
        // Nowhere more than 1F1B needs on its first stage.
        CHECK(in_flight(make_zero_bubble(stages, m), p, 0) == std::min(stages, m));
        CHECK(in_flight(make_forward_only(stages, 2, m), p, 1) == 1);
        CHECK(batches_in_flight(make_forward_only(stages, 2, m), p) == std::min(stages, m));
      }
  // Lower chunks wait longer for their gradient.
  const PipelineSchedule s = make_interleaved(4, 3, 16);
  CHECK(in_flight(s, 0, 0) == 8);
  CHECK(in_flight(s, 0, 1) == 7);
  CHECK(in_flight(s, 0, 2) == 4);
  CHECK(batches_in_flight(s, 0) == 8);
}

TEST_CASE("micro-batches in a window have different places", "[pipeline]") {
  for_each_schedule([&](Kind, const PipelineSchedule& s) {
    for (int p = 0; p < s.stages; ++p) {
      const int window = batches_in_flight(s, p);
      std::map<int, int> chunks_left, holder;
      bool clash = false;
      for (const PipelineAction& a : s.actions[static_cast<size_t>(p)]) {
        const int place = a.micro_batch % window;
        if (chunks_left.try_emplace(a.micro_batch, s.virtual_stages).second)
          clash |= !holder.emplace(place, a.micro_batch).second;
        if (s.frees_slot(a) && --chunks_left[a.micro_batch] == 0) holder.erase(place);
      }
      CAPTURE(s.stages, s.virtual_stages, s.micro_batches, p, window);
      if (clash || !holder.empty()) FAIL("two micro-batches in one place");
    }
  });
}

TEST_CASE("pipeline bubbles are those of the papers", "[pipeline]") {
  for_each_schedule([&](Kind kind, const PipelineSchedule& s) {
    const double m = s.micro_batches, fill = s.stages - 1;
    CAPTURE(s.stages, s.virtual_stages, s.micro_batches, draw(s));
    // A smaller last group waits for itself to come round.
    if (kind == Kind::forward_only && s.virtual_stages > 1 && s.micro_batches % s.stages != 0)
      return;
    const PipelineTimeline timeline = simulate(s);
    for (const double bubble : timeline.bubble) {
      if (kind != Kind::zero_bubble || s.stages == 1)
        REQUIRE(bubble == Approx(fill / (s.virtual_stages * m)).margin(1e-12));
      else if (s.micro_batches >= s.stages)
        REQUIRE(bubble == Approx(fill / (3 * m)).margin(1e-12));
      else
        REQUIRE(bubble <= fill / m + 1e-12);
    }
  });
}

TEST_CASE("pipeline simulation counts unequal costs and messages", "[pipeline]") {
  const PipelineCosts costs{2, 3, 1.5, 0.25};
  // Two stages, one micro-batch: F, message, F, B, message, B.
  const PipelineTimeline t = simulate(make_one_f_one_b(2, 1), costs);
  CHECK(t.makespan == Approx(2 * (2 + 4.5 + 0.25)));
  CHECK(t.spans[1][0].start == Approx(2.25));
  CHECK(t.bubble[0] == Approx((2 + 4.5 + 0.5) / 6.5));
  // Split: the gradient leaves before the weight gradient is done.
  CHECK(simulate(make_zero_bubble(2, 1), costs).makespan == Approx(2 * (2 + 3 + 0.25) + 1.5));
  // Results for the own stage are no messages.
  CHECK(simulate(make_interleaved(1, 2, 1), costs).makespan == Approx(2 * 6.5));
  CHECK(simulate(make_forward_only(3, 1, 4), costs).makespan == Approx(6 * 2 + 2 * 0.25));
}

TEST_CASE("pipeline sends in place delay only interleaved schedules", "[pipeline]") {
  int slower = 0;
  for_each_schedule([&](Kind kind, const PipelineSchedule& s) {
    const double buffered = simulate(s).makespan;
    const double in_place = simulate(s, {}, PipelineSends::in_place).makespan;
    CAPTURE(s.stages, s.virtual_stages, s.micro_batches, draw(s));
    REQUIRE(in_place >= buffered);
    REQUIRE(in_place <= buffered * (kind == Kind::interleaved ? 1.1 : 1.0));
    slower += in_place > buffered;
  });
  CHECK(slower > 0);

  // Stage 0 comes for the first gradient after five forwards, and only then stage 1 goes on.
  std::vector<Actions> stages(2);
  for (int b = 0; b < 5; ++b) {
    stages[0].push_back({F, 0, b});
    stages[1].insert(stages[1].end(), {{F, 0, b}, {I, 0, b}, {W, 0, b}});
  }
  for (int b = 0; b < 5; ++b) stages[0].push_back({B, 0, b});
  const PipelineSchedule s = schedule_of(5, stages);
  CHECK(simulate(s).spans[1][3].start == Approx(4));
  CHECK(simulate(s, {}, PipelineSends::in_place).spans[1][3].start == Approx(5));
}

TEST_CASE("pipeline schedules are drawn as text", "[pipeline]") {
  CHECK(draw(make_one_f_one_b(1, 2)) == "stage 0  F0 B0--- F1 B1---\n");
  CHECK(draw(make_one_f_one_b(2, 3)) ==
        "stage 0  F0 F1 .  .  B0--- F2 B1--- .  B2---\n"
        "stage 1  .  F0 B0--- F1 B1--- F2 B2---\n");
  CHECK(draw(make_interleaved(2, 2, 2)) ==
        "stage 0  F0.0 F1.0 F0.1 F1.1 .    .    B0.1----- .    B1.1----- B0.0----- B1.0-----\n"
        "stage 1  .    F0.0 F1.0 F0.1 B0.1----- F1.1 B1.1----- B0.0----- B1.0-----\n");
  CHECK(draw(make_zero_bubble(3, 4)) ==
        "stage 0  F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3\n"
        "stage 1  .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3\n"
        "stage 2  .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3\n");
  CHECK(draw(make_forward_only(2, 2, 3)) ==
        "stage 0  F0.0 F1.0 F0.1 F1.1 F2.0 .    F2.1\n"
        "stage 1  .    F0.0 F1.0 F0.1 F1.1 F2.0 .    F2.1\n");
  CHECK(draw(make_forward_only(11, 1, 11)).substr(0, 12) == "stage  0  F0");
  // A schedule that does not end, as far as it comes.
  CHECK(draw(schedule_of(1, {{{B, 0, 0}, {F, 0, 0}}, {{F, 0, 0}, {B, 0, 0}}})) ==
        "stage 0  B0?\nstage 1  F0?\n");
  CHECK(draw(schedule_of(1, {{{F, 0, 0}, {W, 0, 0}, {I, 0, 0}}})) == "stage 0  F0 W0?\n");
}

TEST_CASE("the pipeline checker finds every lost, doubled or altered action", "[pipeline]") {
  for (const PipelineSchedule& sound :
       {make_one_f_one_b(3, 4), make_interleaved(2, 2, 4), make_zero_bubble(3, 4),
        make_forward_only(2, 2, 3), make_one_f_one_b(1, 1)})
    for (size_t p = 0; p < sound.actions.size(); ++p)
      for (size_t i = 0; i < sound.actions[p].size(); ++i) {
        const auto at = static_cast<std::ptrdiff_t>(i);
        CAPTURE(draw(sound), p, i);
        PipelineSchedule lost = sound, doubled = sound;
        lost.actions[p].erase(lost.actions[p].begin() + at);
        CHECK(finds(lost, "is missing"));
        doubled.actions[p].push_back(sound.actions[p][i]);
        CHECK(finds(doubled, "runs 2 times"));
        for (const ActionKind kind : {F, B, I, W}) {
          PipelineSchedule altered = sound;
          altered.actions[p][i].kind = kind;
          CHECK(check(altered).empty() == (kind == sound.actions[p][i].kind));
        }
      }
}

TEST_CASE("the pipeline checker and a run over queues agree about every swap", "[pipeline]") {
  int broken = 0, sound = 0;
  for (const PipelineSchedule& original :
       {make_one_f_one_b(3, 4), make_interleaved(2, 2, 4), make_zero_bubble(3, 4)})
    for (size_t p = 0; p < original.actions.size(); ++p)
      for (size_t i = 0; i < original.actions[p].size(); ++i)
        for (size_t j = 0; j < i; ++j) {
          PipelineSchedule swapped = original;
          std::swap(swapped.actions[p][i], swapped.actions[p][j]);
          const std::vector<std::string> problems = check(swapped);
          (problems.empty() ? sound : broken) += 1;
          // Queues know nothing of own order and slots.
          const bool beyond_queues =
              !problems.empty() && (problems[0].find("comes after") != std::string::npos ||
                                    problems[0].find("slot") != std::string::npos);
          if (beyond_queues) continue;
          CAPTURE(draw(original), draw(swapped), joined(problems));
          CHECK(problems.empty() == run_over_queues(swapped).empty());
        }
  CHECK(broken > 300);
  CHECK(sound > 0);
}

TEST_CASE("the pipeline checker names what is wrong", "[pipeline]") {
  const Actions good = {{F, 0, 0}, {B, 0, 0}, {F, 0, 1}, {B, 0, 1}};
  CHECK(
      finds(schedule_of(1, {{{F, 0, 0}, {W, 0, 0}, {I, 0, 0}}}),
            "stage 0: backward_input of micro-batch 0 in chunk 0 comes after its backward_weight"));
  CHECK(finds(schedule_of(1, {{{B, 0, 0}, {F, 0, 0}}}), "comes after its backward"));
  CHECK(finds(schedule_of(1, {{{F, 0, 0}, {B, 0, 0}, {W, 0, 0}}}), "runs whole and in parts"));
  CHECK(finds(schedule_of(2, {good, {{F, 0, 0}, {F, 0, 1}, {B, 0, 0}, {B, 0, 1}}}),
              "deadlock: stage 0 waits in action 1, backward of micro-batch 0 in chunk 0, for the "
              "gradient of chunk 0 on stage 1\n"
              "deadlock: stage 1 waits in action 1, forward of micro-batch 1 in chunk 0, for the "
              "output of chunk 0 on stage 0"));
  // All forward, then all backward needs more memory but is sound; stages that disagree are not.
  const Actions all_forward = {{F, 0, 0}, {F, 0, 1}, {B, 0, 0}, {B, 0, 1}};
  CHECK(joined(check(schedule_of(2, {all_forward, all_forward}))).empty());
  CHECK(finds(
      schedule_of(2, {all_forward, {{F, 0, 1}, {F, 0, 0}, {B, 0, 0}, {B, 0, 1}}}),
      "stage 0 sends stage 1 messages in another order than it takes them: message 0 is the "
      "output of micro-batch 0 in chunk 0, expected is the output of micro-batch 1 in chunk 0"));
  CHECK(finds(schedule_of(2, {all_forward, {{F, 0, 0}, {F, 0, 1}, {B, 0, 1}, {B, 0, 0}}}),
              "stage 1 sends stage 0 messages in another order"));
  // Stage 0 sends the third only when stage 1 takes the second, for which it wants the first to go.
  PipelineSchedule evaluation = make_forward_only(2, 2, 3);
  for (Actions& actions : evaluation.actions)
    actions = {{F, 0, 0}, {F, 0, 1}, {F, 0, 2}, {F, 1, 0}, {F, 1, 1}, {F, 1, 2}};
  CHECK(finds(evaluation,
              "deadlock where slots hold what was sent until it is received: stage 0 does not get "
              "past action 2, forward of micro-batch 2 in chunk 0"));
  // All forward, chunk by chunk: a stage sends as many as there are micro-batches before it takes
  // one.
  PipelineSchedule whole_chunks = make_interleaved(2, 2, 10);
  for (Actions& actions : whole_chunks.actions) {
    actions.clear();
    for (const int chunk : {0, 1})
      for (int m = 0; m < 10; ++m) actions.push_back({F, chunk, m});
    for (const int chunk : {1, 0})
      for (int m = 0; m < 10; ++m) actions.push_back({B, chunk, m});
  }
  CHECK(
      finds(whole_chunks,
            "deadlock where 3 messages at most are under way from a stage to another: stage 0 does "
            "not get past action 7, forward of micro-batch 7 in chunk 0"));
  // Two in flight, and both want slot 0.
  const Actions strides = {{F, 0, 0}, {F, 0, 2}, {B, 0, 0}, {B, 0, 2}, {F, 0, 1}, {B, 0, 1}};
  CHECK(finds(schedule_of(3, {strides}),
              "stage 0: forward of micro-batch 2 in chunk 0 begins while "
              "its slot, of 2, still holds micro-batch 0"));
}

TEST_CASE("the pipeline checker takes any numbers", "[pipeline]") {
  CHECK(finds({0, 1, 1, true, {}}, "make no pipeline"));
  CHECK(finds({1 << 20, 1 << 20, 1, true, {}}, "make no pipeline"));
  CHECK(finds({2, 1, 1, true, {{}}}, "2 stages have 1 lists of actions"));
  const Actions good = {{F, 0, 0}, {B, 0, 0}};
  for (const PipelineAction bad :
       {PipelineAction{F, -1, 0}, PipelineAction{F, 1, 0}, PipelineAction{F, 0, -1},
        PipelineAction{F, 0, 1}, PipelineAction{static_cast<ActionKind>(7), 0, 0}}) {
    PipelineSchedule s = schedule_of(1, {good});
    s.actions[0].push_back(bad);
    CHECK(finds(s, "stage 0, action 2: "));
    CHECK(finds(s, "is out of range"));
  }
  PipelineSchedule evaluation = make_forward_only(1, 1, 1);
  evaluation.actions[0].push_back({W, 0, 0});
  CHECK(finds(evaluation, "runs in a schedule without training"));
}

TEST_CASE("pipeline schedules by the job's words", "[pipeline]") {
  const auto make = make_pipeline_schedule;
  using Order = PipelineOrder;
  CHECK(make(Order::one_f_one_b, 3, 1, 5).actions == make_one_f_one_b(3, 5).actions);
  CHECK(make(Order::interleaved, 2, 3, 4).actions == make_interleaved(2, 3, 4).actions);
  CHECK(make(Order::zero_bubble, 3, 1, 5).actions == make_zero_bubble(3, 5).actions);
  CHECK(make(Order::zero_bubble, 3, 1, 5).splits_backward());
  CHECK_FALSE(make(Order::zero_bubble, 1, 1, 5).splits_backward());
  CHECK_FALSE(make(Order::one_f_one_b, 3, 1, 5).splits_backward());

  CHECK_THROWS_WITH(make(Order::zero_bubble, 2, 3, 4),
                    "parallel.schedule zero_bubble takes 1 virtual stage, not 3: write 1 under "
                    "parallel.virtual_stages, or parallel.schedule: interleaved");
  CHECK_THROWS_WITH(
      make(Order::interleaved, 4, 2, 6),
      "parallel.schedule interleaved over 4 stages takes a multiple of 4 micro-batches "
      "a step, not 6: change train.global_batch, or write parallel.schedule: 1f1b");
  CHECK_THROWS_AS(make(Order::one_f_one_b, 2, 2, 4), ConfigError);
  CHECK_THROWS_AS(make(Order::one_f_one_b, 0, 1, 4), ConfigError);
  CHECK_THROWS_AS(make(Order::interleaved, 2, 0, 4), ConfigError);
  CHECK_THROWS_AS(make(Order::interleaved, 1, 1 << 20, 1 << 20), ConfigError);
  CHECK_THROWS_AS(make_forward_only(2, 1, 0), ConfigError);
  CHECK_THROWS_AS(make_forward_only(1 << 20, 1 << 20, 1), ConfigError);
}

}  // namespace dstrain
