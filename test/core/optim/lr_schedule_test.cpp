#include "core/optim/lr_schedule.h"

#include <cmath>
#include <vector>

#include "test/support/catch.h"

namespace dstrain {
namespace {

ScheduleConfig schedule(ScheduleName name, StepCount warmup, double min_lr_ratio,
                        StepCount decay = {20, true}) {
  return {name, warmup, min_lr_ratio, decay};
}

struct Point {
  int64_t step;
  double lr;
};

void check(const ScheduleConfig& s, int64_t steps, const std::vector<Point>& points) {
  for (const auto& [step, lr] : points) {
    CAPTURE(step);
    CHECK(learning_rate(s, 2.0, step, steps) == Catch::Approx(lr).epsilon(1e-12).margin(1e-15));
  }
}

}  // namespace

TEST_CASE("learning_rate: values by hand, peak 2", "[optim]") {
  const StepCount ten{10, false}, none{0, false}, ten_percent{10, true};
  SECTION("constant after warm-up") {
    check(schedule(ScheduleName::constant, ten, 0.1), 100,
          {{1, 0.2}, {5, 1.0}, {10, 2.0}, {11, 2.0}, {100, 2.0}});
  }
  SECTION("linear to the last step") {
    check(schedule(ScheduleName::linear, ten, 0.1), 110,
          {{1, 0.2}, {10, 2.0}, {11, 2 - 1.8 / 100}, {60, 1.1}, {110, 0.2}});
  }
  SECTION("cosine: quarter, half, end") {
    const double quarter = 0.1 + 0.9 * 0.5 * (1 + std::sqrt(0.5));
    check(schedule(ScheduleName::cosine, ten, 0.1), 110,
          {{10, 2.0}, {35, 2 * quarter}, {60, 1.1}, {110, 0.2}});
  }
  SECTION("cosine to zero without warm-up") {
    check(schedule(ScheduleName::cosine, none, 0), 4,
          {{1, 1 + std::sqrt(0.5)}, {2, 1.0}, {3, 1 - std::sqrt(0.5)}, {4, 0.0}});
  }
  SECTION("warm-up, stable, decay") {
    check(schedule(ScheduleName::wsd, ten, 0.5, {20, false}), 100,
          {{1, 0.2}, {10, 2.0}, {50, 2.0}, {80, 2.0}, {81, 1.95}, {90, 1.5}, {100, 1.0}});
  }
  SECTION("shares of the run") {
    check(schedule(ScheduleName::wsd, ten_percent, 0, {25, true}), 200,
          {{10, 1.0}, {20, 2.0}, {150, 2.0}, {175, 1.0}, {200, 0.0}});
    check(schedule(ScheduleName::linear, {2.5, true}, 0), 100,
          {{1, 2.0 / 3}, {3, 2.0}, {100, 0.0}});
  }
  SECTION("a decay longer than what warm-up leaves begins after warm-up") {
    check(schedule(ScheduleName::wsd, ten, 0, {1000, false}), 20,
          {{10, 2.0}, {11, 1.8}, {15, 1.0}, {20, 0.0}});
  }
  SECTION("warm-up as long as the run reaches the peak at the end, a longer one never") {
    check(schedule(ScheduleName::cosine, {100, true}, 0.1), 4, {{1, 0.5}, {4, 2.0}});
    check(schedule(ScheduleName::cosine, {1000, false}, 0.1), 4, {{1, 0.002}, {4, 0.008}});
  }
  SECTION("one step") {
    check(schedule(ScheduleName::cosine, none, 0.1), 1, {{1, 0.2}});
    check(schedule(ScheduleName::constant, none, 0.1), 1, {{1, 2.0}});
  }
  SECTION("steps beyond the end keep the last rate") {
    check(schedule(ScheduleName::cosine, ten, 0.1), 100, {{100, 0.2}, {101, 0.2}, {150, 0.2}});
    check(schedule(ScheduleName::wsd, ten, 0.1, {20, false}), 100, {{150, 0.2}});
  }
}

TEST_CASE("learning_rate: rises through warm-up, then never rises again", "[optim]") {
  const ScheduleName name = GENERATE(ScheduleName::constant, ScheduleName::linear,
                                     ScheduleName::cosine, ScheduleName::wsd);
  const int64_t steps = GENERATE(1, 2, 7, 100, 1001);
  const ScheduleConfig s = schedule(name, {5, true}, 0.1);
  const int64_t warmup = s.warmup.resolve(steps);
  for (int64_t step = 2; step <= steps; ++step) {
    const double before = learning_rate(s, 3.0, step - 1, steps);
    const double now = learning_rate(s, 3.0, step, steps);
    REQUIRE((step <= warmup ? now > before : now <= before));
    REQUIRE((step <= warmup || now >= 0.3 * 0.999999));
    REQUIRE(now <= 3.0);
  }
}

}  // namespace dstrain
