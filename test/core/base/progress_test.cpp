#include "core/base/progress.h"

#include <fcntl.h>
#include <unistd.h>

#include <string>

#include "core/base/log.h"
#include "test/support/catch.h"
#include "test/support/pty.h"

namespace dstrain {
namespace {

using namespace std::chrono_literals;

const LiveLine::TimePoint kStart{1000s};

}  // namespace

TEST_CASE(
    "decide_color: automatic asks the terminal, NO_COLOR and TERM, else the user decides") {
  Pty pty(80);
  int pipe_fds[2];
  REQUIRE(::pipe(pipe_fds) == 0);
  CHECK(decide_color(ColorMode::automatic, pty.fd(), nullptr, "xterm"));
  CHECK(decide_color(ColorMode::automatic, pty.fd(), "", "xterm"));
  CHECK_FALSE(decide_color(ColorMode::automatic, pty.fd(), "1", "xterm"));
  CHECK_FALSE(decide_color(ColorMode::automatic, pty.fd(), nullptr, "dumb"));
  CHECK_FALSE(decide_color(ColorMode::automatic, pty.fd(), nullptr, nullptr));
  CHECK_FALSE(decide_color(ColorMode::automatic, pipe_fds[1], nullptr, "xterm"));
  CHECK(decide_color(ColorMode::always, pipe_fds[1], "1", "dumb"));
  CHECK_FALSE(decide_color(ColorMode::never, pty.fd(), nullptr, "xterm"));
  CHECK(can_rewrite_line(pty.fd(), "xterm"));
  CHECK_FALSE(can_rewrite_line(pty.fd(), "dumb"));
  CHECK_FALSE(can_rewrite_line(pipe_fds[1], "xterm"));
  ::close(pipe_fds[0]);
  ::close(pipe_fds[1]);
}

TEST_CASE("terminal_width: asks the terminal, else 80") {
  Pty pty(132);
  CHECK(terminal_width(pty.fd()) == 132);
  pty.resize(0);
  CHECK(terminal_width(pty.fd()) == 80);
  CHECK(terminal_width(-1) == 80);
}

TEST_CASE("clip_columns: counts characters, not bytes, and keeps colours closed") {
  CHECK(clip_columns("abcdef", 10) == "abcdef");
  CHECK(clip_columns("abcdef", 3) == "abc");
  CHECK(clip_columns("abcdef", 0).empty());
  CHECK(clip_columns("abcdef", -5).empty());
  CHECK(clip_columns("äöü", 2) == "äö");
  CHECK(clip_columns("\033[31mabcdef\033[0m", 2) == "\033[31mab\033[0m");
  CHECK(clip_columns("ab\033", 5) == "ab\033");
  CHECK(clip_columns("ab\033[", 5) == "ab\033[");
  CHECK(clip_columns("", 5).empty());
}

TEST_CASE("LiveLine: rewritten at most ten times a second, clipped to the width of the moment") {
  Pty pty(20);
  LiveLine line(pty.fd(), true);
  CHECK(line.due(kStart));
  line.show("one", kStart);
  CHECK(pty.read() == "\r\033[Kone");
  CHECK_FALSE(line.due(kStart + 99ms));
  line.show("two", kStart + 99ms);
  CHECK(pty.read().empty());
  line.show("three", kStart + 100ms);
  CHECK(pty.read() == "\r\033[Kthree");
  line.show("a text of more than twenty", kStart + 1s);
  CHECK(pty.read() == "\r\033[Ka text of more than");  // 19 columns: the last stays free
  pty.resize(8);
  line.show("a text of more than twenty", kStart + 2s);
  CHECK(pty.read() == "\r\033[Ka text ");
}

TEST_CASE("LiveLine: permanent lines go above the live one, the end removes it") {
  Pty pty(80);
  {
    LiveLine line(pty.fd(), true);
    line.print("before");
    CHECK(pty.read() == "before\r\n");
    line.show("working", kStart);
    pty.read();
    line.print("saved");
    CHECK(pty.read() == "\r\033[Ksaved\r\n\r\033[Kworking");
    line.clear();
    CHECK(pty.read() == "\r\033[K");
    line.print("after");
    CHECK(pty.read() == "after\r\n");
    line.show("again", kStart);  // clear() ends the wait, too
    pty.read();
  }
  CHECK(pty.read() == "\r\033[K");
}

TEST_CASE(
    "LiveLine: where not live only permanent lines are written, and a bad descriptor is no error") {
  Pty pty(80);
  LiveLine line(pty.fd(), false);
  CHECK_FALSE(line.due(kStart));
  line.show("working", kStart);
  CHECK(pty.read().empty());
  line.print("saved");
  CHECK(pty.read() == "saved\r\n");
  const int full = ::open("/dev/full", O_WRONLY);
  REQUIRE(full >= 0);
  LiveLine(full, true).print("lost");
  LiveLine(-1, true).print("lost");
  ::close(full);
}

TEST_CASE("set_log_writer: log lines pass through it, with level and filter") {
  std::string seen;
  set_log_writer([&](std::string_view line) { seen.append(line).append("|"); });
  log_debug("too quiet");
  log_warning("disk {}", "slow");
  log_info("plain");
  set_log_writer({});
  CHECK(seen == "warning: disk slow|plain|");
}

TEST_CASE("LiveLine: the width of a terminal behind a pipe is told, not asked for") {
  Pty pty(80);
  LiveLine line(pty.fd(), true, /*columns=*/8);
  CHECK(line.width() == 8);
  line.show("a text of more than eight", kStart);
  CHECK(pty.read() == "\r\033[Ka text ");
}

TEST_CASE("init_log: the ranks after the first begin their lines with their number") {
  std::string seen;
  set_log_writer([&](std::string_view line) { seen.append(line).append("|"); });
  init_log({.rank = 3, .world_size = 4});
  log_warning("disk slow");
  log_info("plain");
  init_log({.world_size = 4});
  log_warning("disk slow");
  init_log({.json = true, .rank = 3, .world_size = 4});
  log_info("plain");
  init_log({});
  set_log_writer({});
  CHECK_THAT(seen, Catch::StartsWith("rank 3: warning: disk slow|rank 3: plain|"
                                     "warning: disk slow|{"));
  CHECK_THAT(seen, Catch::Contains("\"rank\":3,\"message\":\"plain\"}|"));
}

TEST_CASE("EtaEstimator: from the time between updates, without the first") {
  EtaEstimator eta;
  CHECK_FALSE(eta.update(1, 100, kStart));  // the slow first step counts nothing
  CHECK(eta.update(2, 100, kStart + 2s).value() == Approx(196));
  CHECK(eta.update(4, 100, kStart + 4s).value() == Approx(96 * 1.5));  // mean of 2 s and 1 s a step
  CHECK(eta.update(4, 100, kStart + 5s).value() == Approx(96 * 1.5));  // no step: no change
  CHECK(eta.update(5, 100, kStart + 7s).value() == Approx(95 * 2.0));  // 3 s since the last step
  CHECK(eta.update(100, 100, kStart + 8s).value() == 0);
}

TEST_CASE("EtaEstimator: an old speed is forgotten") {
  EtaEstimator eta;
  LiveLine::TimePoint now = kStart;
  int64_t step = 0;
  for (; step < 50; ++step) eta.update(step, 1000, now += 10s);
  for (; step < 200; ++step) eta.update(step, 1000, now += 1s);
  CHECK(eta.update(200, 1000, now + 1s).value() == Approx(800).epsilon(0.01));
}

}  // namespace dstrain
