#include "apps/output_relay.h"

#include <poll.h>
#include <unistd.h>

#include <cerrno>
#include <string>

namespace dstrain {

bool OutputRelay::is_ready() const {
  pollfd poll{fd_, POLLOUT, 0};
  return is_gone_ || ::poll(&poll, 1, 0) != 0;
}

void OutputRelay::pass(std::string_view bytes) {
  if (!bytes.empty()) is_mid_line_ = bytes.back() != '\n';
  while (!bytes.empty() && !is_gone_) {
    const ssize_t written = ::write(fd_, bytes.data(), bytes.size());
    if (written < 0 && errno == EINTR) continue;
    if (written < 0 && errno == EAGAIN) {  // whoever shares the stream made it so
      pollfd wait{fd_, POLLOUT, 0};
      ::poll(&wait, 1, -1);
      continue;
    }
    if (written < 0) is_gone_ = true;
    if (written > 0) bytes.remove_prefix(static_cast<size_t>(written));
  }
}

void OutputRelay::line(std::string_view text) {
  std::string whole = is_mid_line_ ? (live_ ? "\r\033[K" : "\n") : "";
  whole.append(text).append("\n");
  pass(whole);
}

}  // namespace dstrain
