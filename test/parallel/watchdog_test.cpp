#include "parallel/watchdog.h"

#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>

#include "test/support/catch.h"

namespace dstrain {
namespace {

void sleep_s(double seconds) {
  std::this_thread::sleep_for(std::chrono::duration<double>(seconds));
}

}  // namespace

TEST_CASE("watchdog: a rank that enters phases lives", "[watchdog]") {
  RankProgress progress;
  std::atomic<int> barks{0};
  const Watchdog watchdog(progress, 0.5, [&](const RankState&) { ++barks; });
  for (int64_t step = 0; step < 40; ++step) {
    progress.enter(RankPhase::forward_backward, step);
    sleep_s(0.02);
  }
  CHECK(barks == 0);
}

TEST_CASE("watchdog: a rank that stands still is reported once, with its place", "[watchdog]") {
  RankProgress progress;
  std::atomic<int> barks{0};
  RankState seen;
  const Watchdog watchdog(progress, 0.2, [&](const RankState& state) {
    seen = state;
    ++barks;
  });
  progress.enter(RankPhase::reducing, 812);
  while (barks == 0) sleep_s(0.01);
  sleep_s(0.3);
  CHECK(barks == 1);
  CHECK(seen.step == 812);
  CHECK(seen.phase == RankPhase::reducing);
  CHECK(seen.seconds >= 0.2);
  seen.seconds = 61.2;
  CHECK(place_text(seen) == "step 812, summing gradients for 61 s");
}

TEST_CASE("watchdog: ends at once when there is nothing to watch any more", "[watchdog]") {
  RankProgress progress;
  const int64_t begin = monotonic_ns();
  {
    const Watchdog watchdog(progress, 3600, [](const RankState&) {});
  }
  CHECK(monotonic_ns() - begin < 500'000'000);
}

TEST_CASE("watchdog: the time in which the process was stopped does not count", "[watchdog]") {
  const pid_t child = ::fork();
  if (child == 0) {
    RankProgress progress;
    const Watchdog watchdog(progress, 1.0, [](const RankState&) { ::_exit(3); });
    sleep_s(2.2);  // of which 1.6 s stopped, as the wall clock goes
    ::_exit(0);
  }
  sleep_s(0.2);
  REQUIRE(::kill(child, SIGSTOP) == 0);
  sleep_s(1.6);
  REQUIRE(::kill(child, SIGCONT) == 0);
  int status = -1;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFEXITED(status));
  CHECK(WEXITSTATUS(status) == 0);
}

}  // namespace dstrain
