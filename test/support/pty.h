// A terminal that a test can watch.
#pragma once

#include <fcntl.h>
#include <stdlib.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <array>
#include <string>

#include "test/support/catch.h"

namespace dstrain {

// A pseudo-terminal of the given width; read() returns what was written to it so far.
class Pty {
 public:
  explicit Pty(unsigned short columns) {
    master_ = ::posix_openpt(O_RDWR | O_NOCTTY | O_NONBLOCK);
    REQUIRE(master_ >= 0);
    REQUIRE(::grantpt(master_) == 0);
    REQUIRE(::unlockpt(master_) == 0);
    slave_ = ::open(::ptsname(master_), O_RDWR | O_NOCTTY);
    REQUIRE(slave_ >= 0);
    resize(columns);
  }
  ~Pty() {
    ::close(slave_);
    ::close(master_);
  }
  Pty(const Pty&) = delete;
  Pty& operator=(const Pty&) = delete;

  int fd() const { return slave_; }
  void resize(unsigned short columns) {
    winsize size{};
    size.ws_col = columns;
    size.ws_row = 24;
    REQUIRE(::ioctl(slave_, TIOCSWINSZ, &size) == 0);
  }
  std::string read() {
    std::string out;
    std::array<char, 4096> buffer;
    for (ssize_t got; (got = ::read(master_, buffer.data(), buffer.size())) > 0;)
      out.append(buffer.data(), static_cast<size_t>(got));
    return out;
  }

 private:
  int master_ = -1;
  int slave_ = -1;
};

}  // namespace dstrain
