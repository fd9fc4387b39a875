// A stream of this process that others' output is passed on to, with lines of our own between.
#pragma once

#include <string_view>

namespace dstrain {

// Writes at once and never blocks for longer than a reader takes for a page, if ready() said so. A
// stream that nobody reads any more swallows everything: training goes on. One thread.
class OutputRelay {
 public:
  // live: what is passed may be a line that is rewritten in place.
  OutputRelay(int fd, bool live) : fd_(fd), live_(live) {}

  // Bytes that pass() takes at a time.
  static constexpr int kPage = 4096;
  int fd() const { return fd_; }
  bool is_ready() const;
  void pass(std::string_view bytes);
  // A line of our own, on a line of its own: one that is under way is ended, or removed if live.
  void line(std::string_view text);

 private:
  const int fd_;
  const bool live_;
  bool is_gone_ = false;
  bool is_mid_line_ = false;
};

}  // namespace dstrain
