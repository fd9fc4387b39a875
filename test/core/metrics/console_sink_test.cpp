#include "core/metrics/console_sink.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>

#include "core/base/log.h"
#include "test/core/metrics/records.h"
#include "test/core/metrics/temp_folder.h"
#include "test/support/catch.h"
#include "test/support/pty.h"

namespace dstrain {
namespace {

using namespace std::chrono_literals;

// A sink that writes into a file, as with a redirected standard error. One second passes between
// two looks at the clock.
class Redirected {
 public:
  explicit Redirected(ConsoleMode mode, int64_t log_every = 1)
      : fd_(::open(folder_.file("out").c_str(), O_WRONLY | O_CREAT, 0600)),
        line_(fd_, false),
        sink_(line_, {.mode = mode, .log_every = log_every, .now = [this] { return now_ += 1s; }}) {
  }
  ~Redirected() { ::close(fd_); }

  ConsoleSink& sink() { return sink_; }
  std::vector<std::string> lines() const { return split_lines(read_text(folder_.file("out"))); }

 private:
  TempFolder folder_;
  int fd_;
  LiveLine line_;
  LiveLine::TimePoint now_{1000s};
  ConsoleSink sink_;
};

void whole_run(ConsoleSink& sink, int64_t steps) {
  sink.on_start(example_start());
  for (int64_t step = 1; step <= steps; ++step) sink.on_step(example_step(step, steps));
  sink.on_eval(example_eval(steps));
  sink.on_checkpoint(example_checkpoint(steps));
  sink.on_end(example_summary());
}

}  // namespace

TEST_CASE("step_text: all figures where there is room") {
  CHECK(step_text(example_step(120), 192.0, 100, false) ==
        "step 120/600  loss 3.4123  grad 0.81  lr 9.8e-04  4.61k tok/s  load 1.32x dead 0  ETA "
        "3m12s");
  StepRecord record = example_step(7);
  record.mtp_loss = 4.5;
  record.mfu = 0.415;
  record.skipped = true;
  record.skipped_total = 2;
  CHECK(step_text(record, std::nullopt, 200, false) ==
        "step   7/600  loss 3.4123  mtp 4.5000  grad 0.81  skipped (2 so far)  lr 9.8e-04  "
        "4.61k tok/s  load 1.32x dead 0  mfu 41.5%");
  record.experts.reset();
  CHECK_THAT(step_text(record, std::nullopt, 200, false), !Catch::Contains("load"));
}

TEST_CASE("step_text: fits the width and keeps what matters most") {
  const StepRecord record = example_step(120);
  for (int columns = 27; columns <= 240; ++columns) {
    const std::string text = step_text(record, 192.0, columns, false);
    REQUIRE(static_cast<int>(text.size()) <= columns);
    REQUIRE_THAT(text, Catch::Contains("step 120/600  loss 3.4123"));
  }
  CHECK(step_text(record, 192.0, 40, false) == "step 120/600  loss 3.4123  ETA 3m12s");
  CHECK(step_text(record, std::nullopt, 80, false) ==
        "step 120/600  loss 3.4123  grad 0.81  lr 9.8e-04  4.61k tok/s  load 1.32x dead 0");
  CHECK(step_text(record, 192.0, 79, false) ==
        "step 120/600  loss 3.4123  grad 0.81  4.61k tok/s  load 1.32x dead 0  ETA 3m12s");
  CHECK_THAT(step_text(record, 192.0, 200, false),
             Catch::StartsWith("[====                ]  20%  step 120"));
  CHECK(step_text(record, 192.0, 1, false) == "step 120/600  loss 3.4123");  // the line clips it
}

TEST_CASE("step_text: the bar is empty at first and full at last") {
  CHECK_THAT(step_text(example_step(1), 1.0, 200, false),
             Catch::StartsWith("[                    ]   0%"));
  CHECK_THAT(step_text(example_step(599), 1.0, 200, false),
             Catch::StartsWith("[=================== ]  99%"));
  CHECK_THAT(step_text(example_step(600), 1.0, 200, false),
             Catch::StartsWith("[====================] 100%"));
  CHECK_THAT(step_text(example_step(5, 0), 1.0, 200, false), Catch::Contains("100%"));
}

TEST_CASE("step_text: colour only where asked for, and it does not count as width") {
  StepRecord record = example_step(120);
  record.loss = std::copysign(std::numeric_limits<double>::quiet_NaN(), -1.0);
  CHECK(step_text(record, std::nullopt, 30, false) == "step 120/600  loss nan");
  CHECK(step_text(record, std::nullopt, 30, true) == "step 120/600  \033[31mloss nan\033[0m");
}

TEST_CASE("ConsoleSink lines: one line a step, table before, report after") {
  Redirected console(ConsoleMode::lines);
  whole_run(console.sink(), 4);
  std::vector<std::string> lines = console.lines();
  std::vector<std::string> steps;
  for (const std::string& line : lines) {
    CHECK(line.find('\033') == std::string::npos);
    CHECK(line.find('\r') == std::string::npos);
    if (line.rfind("step ", 0) == 0) steps.push_back(line);
  }
  REQUIRE(steps.size() == 4);
  CHECK_THAT(steps[0], Catch::StartsWith("step 1/4  loss 3.4123  grad 0.81  lr 9.8e-04") &&
                           !Catch::Contains("ETA"));
  CHECK_THAT(steps[1], Catch::EndsWith("load 1.32x dead 0  ETA 2.0s"));
  CHECK_THAT(lines.front(), Catch::StartsWith("deepseek-train 0.1.0"));
  CHECK(std::find(lines.begin(), lines.end(),
                  "eval  step 4  valid  loss 3.5200  perplexity 33.78  1.8512 bits/byte  "
                  "51.2k tokens in 4.2s") != lines.end());
  CHECK(std::find(lines.begin(), lines.end(),
                  "checkpoint  step 4  85.5 MiB in 1.2s, training waited 41ms") != lines.end());
  CHECK_THAT(lines.back(), Catch::Contains("deepseek-train export runs/kjv-moe"));
}

TEST_CASE("ConsoleSink lines: log_every keeps the first, the last and skipped steps") {
  Redirected console(ConsoleMode::lines, 10);
  for (int64_t step = 1; step <= 25; ++step) {
    StepRecord record = example_step(step, 25);
    record.skipped = step == 13;
    console.sink().on_step(record);
  }
  std::string steps;
  for (const std::string& line : console.lines()) steps += line.substr(5, 2) + ",";
  CHECK(steps == " 1,10,13,20,25,");
}

TEST_CASE("ConsoleSink quiet: one line with the result, and failed saves") {
  Redirected console(ConsoleMode::quiet);
  whole_run(console.sink(), 4);
  CHECK(console.lines() == std::vector<std::string>{
                               "finished at step 600 of 600: 2.46M tokens, loss 3.2914, valid loss "
                               "3.5200, 1.8512 bits/byte, 4.61k tok/s, checkpoint "
                               "runs/kjv-moe/checkpoints/step_00000600"});
  CheckpointRecord failed = example_checkpoint(5);
  failed.ok = false;
  failed.error = "No space left on device";
  console.sink().on_checkpoint(failed);
  CHECK(console.lines().back() == "checkpoint  step 5  FAILED after 1.2s: No space left on device");
}

TEST_CASE("ConsoleSink json: nothing but JSON, one object a line") {
  Redirected console(ConsoleMode::json, 2);
  whole_run(console.sink(), 4);
  std::string events;
  for (const std::string& line : console.lines()) {
    const auto object = nlohmann::json::parse(line);
    events += object["event"].get<std::string>() + object["step"].dump() + " ";
  }
  CHECK(events == "start0 step1 step2 step4 eval4 checkpoint4 end600 ");
}

TEST_CASE("ConsoleSink live: a line of the terminal's width, permanent lines every tenth") {
  for (const unsigned short columns : {40, 80, 200}) {
    Pty pty(columns);
    LiveLine line(pty.fd(), true);
    LiveLine::TimePoint now{1000s};
    ConsoleSink sink(line, {.mode = ConsoleMode::live, .now = [&] { return now += 50ms; }});
    std::string all;
    for (int64_t step = 1; step <= 600; ++step) {
      sink.on_step(example_step(step));
      all += pty.read();
    }
    size_t permanent = 0, redraws = 0;
    for (size_t at = 0; at < all.size();) {
      const size_t end = std::min(all.find("\r", at + 1), all.size());
      std::string part = all.substr(at, end - at);
      const bool drawn = part.rfind("\r\033[K", 0) == 0;
      if (drawn) part = part.substr(4);
      if (end < all.size() && all[end + 1] == '\n')
        ++permanent;
      else if (drawn && !part.empty())
        ++redraws;
      REQUIRE(part.size() <= columns);
      at = end;
    }
    CHECK(permanent == 11);      // the first and every 60th
    CHECK(redraws >= 300);       // of 600 steps in 30 s
    CHECK(redraws <= 300 + 11);  // and once more below each permanent line
    CHECK_THAT(all, Catch::Contains("loss 3.4123  ETA ") || Catch::Contains("tok/s"));
  }
}

TEST_CASE("ConsoleSink live: a long silence is broken by a permanent line") {
  Pty pty(80);
  LiveLine line(pty.fd(), true);
  LiveLine::TimePoint now{1000s};
  ConsoleSink sink(line, {.mode = ConsoleMode::live, .now = [&] { return now += 5min; }});
  for (int64_t step = 1; step <= 5; ++step) sink.on_step(example_step(step, 100000));
  const std::string text = pty.read();
  size_t permanent = 0;
  for (size_t at = 0; (at = text.find("\r\n", at)) != std::string::npos; ++at) ++permanent;
  CHECK(permanent == 3);  // steps 1, 3 and 5
}

TEST_CASE("ConsoleSink live: warnings, evaluations and checkpoints go above the line") {
  Pty pty(80);
  LiveLine line(pty.fd(), true);
  LiveLine::TimePoint now{1000s};
  {
    ConsoleSink sink(line,
                     {.mode = ConsoleMode::live, .color = true, .now = [&] { return now += 1s; }});
    sink.on_step(example_step(61));
    sink.on_step(example_step(62));
    pty.read();
    log_warning("the disk is slow");
    const std::string live = "\r\033[Kstep  62/600  loss 3.4123";
    CHECK_THAT(pty.read(), Catch::StartsWith("\r\033[Kwarning: the disk is slow\r\n" + live));
    sink.on_eval(example_eval(62));
    CHECK_THAT(pty.read(),
               Catch::StartsWith("\r\033[K\033[36meval  step 62") && Catch::Contains(live));
    CheckpointRecord failed = example_checkpoint(62);
    failed.ok = false;
    sink.on_checkpoint(failed);
    CHECK_THAT(pty.read(), Catch::StartsWith("\r\033[K\033[31mcheckpoint  step 62  FAILED"));
    sink.on_end(example_summary());
    CHECK_THAT(pty.read(), Catch::StartsWith("\r\033[K") && !Catch::Contains("step  62"));
  }
}

TEST_CASE("decide_console_mode: json, then quiet, then what the stream is") {
  Pty pty(80);
  CHECK(decide_console_mode(true, true, pty.fd(), "xterm") == ConsoleMode::json);
  CHECK(decide_console_mode(true, false, pty.fd(), "xterm") == ConsoleMode::quiet);
  CHECK(decide_console_mode(false, false, pty.fd(), "xterm") == ConsoleMode::live);
  CHECK(decide_console_mode(false, false, pty.fd(), "dumb") == ConsoleMode::lines);
  CHECK(decide_console_mode(false, false, -1, "xterm") == ConsoleMode::lines);
}

}  // namespace dstrain
