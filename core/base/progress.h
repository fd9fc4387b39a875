// What a terminal is and one line of it that is rewritten in place. Nothing here reads the
// environment: apps/ looks variables up and passes them in.
#pragma once

#include <chrono>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>

namespace dstrain {

enum class ColorMode { automatic, always, never };

bool is_terminal(int fd);

// Columns of the terminal behind fd, or 80 where that is unknown.
int terminal_width(int fd);

// Whether to colour what goes to fd. Automatic means: fd is a terminal, NO_COLOR is unset or empty,
// and TERM is set and not "dumb". The two variables may be null.
bool decide_color(ColorMode mode, int fd, const char* no_color, const char* term);

// Whether a line on fd can be rewritten: a terminal that understands cursor control.
bool can_rewrite_line(int fd, const char* term);

// The longest start of `text` that takes at most `columns` columns. Escape sequences take none and
// are all kept, so that a colour that was switched on is switched off; a UTF-8 character takes one.
std::string clip_columns(std::string_view text, int columns);

// Writes lines to a file descriptor and, where `live` is set, keeps one more line under them that
// is rewritten at most ten times a second. Thread-safe. A write that fails is dropped: the screen
// is not worth a run. The destructor removes the live line.
class LiveLine {
 public:
  using TimePoint = std::chrono::steady_clock::time_point;

  // columns: of the terminal that others pass on to what is written to fd; 0 asks fd itself.
  LiveLine(int fd, bool live, int columns = 0) : fd_(fd), live_(live), columns_(columns) {}
  ~LiveLine() { clear(); }
  LiveLine(const LiveLine&) = delete;
  LiveLine& operator=(const LiveLine&) = delete;

  bool live() const { return live_; }
  int width() const { return columns_ > 0 ? columns_ : terminal_width(fd_); }

  // Whether show() would draw now, so that callers need not format a text in vain.
  bool due(TimePoint now) const;
  // Replaces the live line, clipped to the terminal. Nothing happens where not live or not due.
  void show(std::string_view text, TimePoint now);
  // Writes a permanent line (or several, separated by newlines) above the live one.
  void print(std::string_view line);
  void clear();

 private:
  std::string painted() const;  // the live line, clipped, with what removes the old one

  const int fd_;
  const bool live_;
  const int columns_;
  mutable std::mutex mutex_;
  std::string text_;  // what the live line shows; empty = nothing
  std::optional<TimePoint> last_;
};

// Time left, from the time between updates: the mean of the first twenty and a moving average after
// that. The time up to the first update counts nothing, since first steps warm caches up.
class EtaEstimator {
 public:
  using TimePoint = LiveLine::TimePoint;

  // `done` of `total` are finished at `now`. Seconds left; empty until two updates have been seen.
  std::optional<double> update(int64_t done, int64_t total, TimePoint now);

 private:
  std::optional<TimePoint> last_;
  int64_t last_done_ = 0;
  int64_t intervals_ = 0;
  double seconds_each_ = 0;
};

}  // namespace dstrain
