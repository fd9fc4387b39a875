#include "core/base/progress.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>

namespace dstrain {
namespace {

constexpr std::string_view kEraseLine = "\r\033[K";
constexpr std::chrono::milliseconds kRedrawInterval{100};
constexpr int kDefaultWidth = 80;

bool understands_escapes(const char* term) {
  return term != nullptr && *term != '\0' && std::string_view(term) != "dumb";
}

void write_or_drop(int fd, std::string_view text) {
  while (!text.empty()) {
    const ssize_t written = ::write(fd, text.data(), text.size());
    if (written < 0 && errno == EINTR) continue;
    if (written <= 0) return;
    text.remove_prefix(static_cast<size_t>(written));
  }
}

// Bytes of the escape sequence that starts at text[at], which is ESC.
size_t escape_length(std::string_view text, size_t at) {
  size_t end = at + 1;
  if (end < text.size() && text[end] == '[') {
    ++end;
    while (end < text.size() && (text[end] < '@' || text[end] > '~')) ++end;
  }
  return std::min(end + 1, text.size()) - at;
}

}  // namespace

bool is_terminal(int fd) {
  return ::isatty(fd) == 1;
}

int terminal_width(int fd) {
  winsize size{};
  if (::ioctl(fd, TIOCGWINSZ, &size) == 0 && size.ws_col > 0) return size.ws_col;
  return kDefaultWidth;
}

bool decide_color(ColorMode mode, int fd, const char* no_color, const char* term) {
  if (mode != ColorMode::automatic) return mode == ColorMode::always;
  if (no_color != nullptr && *no_color != '\0') return false;
  return is_terminal(fd) && understands_escapes(term);
}

bool can_rewrite_line(int fd, const char* term) {
  return is_terminal(fd) && understands_escapes(term);
}

std::string clip_columns(std::string_view text, int columns) {
  std::string out;
  int used = 0;
  for (size_t at = 0; at < text.size();) {
    if (text[at] == '\033') {
      const size_t length = escape_length(text, at);
      out += text.substr(at, length);
      at += length;
      continue;
    }
    size_t end = at + 1;  // the bytes 10xxxxxx belong to the character before them
    while (end < text.size() && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) ++end;
    if (used < columns) out += text.substr(at, end - at);
    ++used;
    at = end;
  }
  return out;
}

bool LiveLine::due(TimePoint now) const {
  const std::lock_guard lock(mutex_);
  return live_ && (!last_ || now - *last_ >= kRedrawInterval);
}

void LiveLine::show(std::string_view text, TimePoint now) {
  const std::lock_guard lock(mutex_);
  if (!live_ || (last_ && now - *last_ < kRedrawInterval)) return;
  last_ = now;
  text_ = text;
  write_or_drop(fd_, painted());
}

void LiveLine::print(std::string_view line) {
  const std::lock_guard lock(mutex_);
  std::string out;
  if (!text_.empty()) out += kEraseLine;
  out += line;
  out += '\n';
  if (!text_.empty()) out += painted();
  write_or_drop(fd_, out);
}

void LiveLine::clear() {
  const std::lock_guard lock(mutex_);
  if (!text_.empty()) write_or_drop(fd_, kEraseLine);
  text_.clear();
  last_.reset();
}

// The last column stays free: writing there makes some terminals wrap.
std::string LiveLine::painted() const {
  return std::string(kEraseLine) + clip_columns(text_, width() - 1);
}

std::optional<double> EtaEstimator::update(int64_t done, int64_t total, TimePoint now) {
  constexpr int64_t kMeanOf = 20;
  if (!last_) {
    last_ = now;
    last_done_ = done;
  } else if (done > last_done_) {
    const double seconds = std::chrono::duration<double>(now - *last_).count();
    const double each = seconds / static_cast<double>(done - last_done_);
    intervals_ = std::min(intervals_ + 1, kMeanOf);
    seconds_each_ += (each - seconds_each_) / static_cast<double>(intervals_);
    last_ = now;
    last_done_ = done;
  }
  if (intervals_ == 0) return std::nullopt;
  return seconds_each_ * static_cast<double>(std::max<int64_t>(total - done, 0));
}

}  // namespace dstrain
